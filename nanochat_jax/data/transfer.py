"""Downloads single files: parallel transfers that are retried, resumed and verified. Used for shards of text and for
published files of tasks."""

import contextlib
import errno
import os
import re
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from nanochat_jax.config import first_line
from nanochat_jax.files import sha256, write_text

TRIES = 5  # a shard fails after this many consecutive tries without any progress
FEW_TRIES = 3  # replaces TRIES if the server does not answer or sends wrong data
PAUSE = 0.5  # seconds before the second try; the pause doubles with each further try
LONGEST_PAUSE = 300.0  # seconds; long enough, since the hub limits the number of requests per five minutes


@dataclass
class Job:
    """The state that the threads of a download share. In the dicts, each thread writes only the entries of the files
    that it fetches."""

    origin: str  # the repository or the address that the files come from
    folder: Path
    stop: threading.Event = field(default_factory=threading.Event)
    received: dict[str, int] = field(default_factory=dict)  # file -> bytes transferred so far
    expected: dict[str, int] = field(default_factory=dict)  # file -> bytes transferred when the file is complete

    def touch_lock(self) -> None:
        """Touches the lock file, so that `wait_for_shard` in other processes sees that the download is running."""
        os.utime(self.folder / "lock")

    @contextlib.contextmanager
    def threads(self, workers: int) -> Generator[ThreadPoolExecutor, None, None]:
        """Opens a thread pool for a `with` block. The threads stop when the block ends or raises an exception."""
        pool = ThreadPoolExecutor(workers)
        try:
            yield pool
        except KeyboardInterrupt:
            print("\nstopping; run the command again to resume", file=sys.stderr, flush=True)
            raise
        finally:
            self.stop.set()
            pool.shutdown(cancel_futures=True)
            self.stop.clear()


class Stopped(Exception):
    """Raised in a thread that stops because `Job.stop` is set."""


class BadContent(Exception):
    """Raised if a complete file has the wrong size, hash or format."""


def fetch(job: Job, name: str, transfer: Callable[[Job, str], None]) -> str:
    """Fetches one file, with retries. Each try is a call of `transfer`.

    Returns "" on success, or one line with the reason for the failure.
    """
    tries = 0
    while True:
        before = job.received[name]
        try:
            transfer(job, name)
            return ""
        except Stopped:
            return f"{name}: stopped"
        except Exception as error:  # raised by huggingface_hub, its HTTP client or our code
            reason = f"{name}: {first_line(error)}"
            progressed = job.received[name] > before and not isinstance(error, BadContent)
            tries = 1 if progressed else tries + 1
            allowed, pause = _retry_limits(error)
            if tries >= allowed or job.stop.wait(pause or min(PAUSE * 2 ** (tries - 1), LONGEST_PAUSE)):
                return reason


def _retry_limits(error: Exception) -> tuple[int, float]:
    """Returns the number of tries that `error` allows, and the pause in seconds that the server asks for (0: none)."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return 1, 0
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return 1, 0
    response = getattr(error, "response", None)
    if response is None:
        return FEW_TRIES, 0
    if response.status_code not in (408, 429) and response.status_code < 500:
        return 1, 0  # for example, the file does not exist or access is denied
    limits = response.headers.get("Retry-After", ""), response.headers.get("RateLimit", "")
    seconds = re.fullmatch(r"(\d+)", limits[0]) or re.search(r"\bt=(\d+)", limits[1])
    return TRIES, min(float(seconds[1]), LONGEST_PAUSE) if seconds else 0


def complete(job: Job, name: str, url: str, part: Path, size: int | None, headers: dict[str, str]) -> None:
    """Downloads the rest of a partial file, or the whole file if the server does not support HTTP ranges."""
    from huggingface_hub import get_session, hf_raise_for_status

    start = part.stat().st_size if part.exists() else 0
    if size is not None and start == size:
        return
    if size is not None and start > size:
        start = 0
    headers = headers | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    timeout = seconds_from("HF_HUB_DOWNLOAD_TIMEOUT", 10.0)
    before = job.received[name]
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if response.status_code != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0  # the server sends the whole file
        job.expected[name] = before + (int(response.headers.get("Content-Length", 0)) if size is None else size - start)
        with open(part, "r+b" if start else "wb") as file:
            file.seek(start)
            for block in response.iter_bytes():
                file.write(block)
                job.received[name] += len(block)
                if job.stop.is_set():
                    raise Stopped
            file.flush()
            os.fsync(file.fileno())


def accept(
    part: Path, path: Path, expected: str, size: int | None, problem_of: Callable[[Path], str] = lambda _: ""
) -> None:
    """Verifies the downloaded file `part` and renames it to `path`.

    If the content is wrong, deletes `part` and raises BadContent. If `part` is too short, raises ConnectionError.
    `expected` begins with the required SHA-256, or is "" if none is known. `problem_of` returns "" if the file's format
    is right, or else says what is wrong with it.
    """
    length, digest = part.stat().st_size, sha256(part)
    if size is not None and length < size:
        raise ConnectionError(f"got {length:,} of {size:,} bytes")  # the next try may download the rest
    if size is not None and length > size:
        problem = f"got {length:,} bytes instead of {size:,}"
    elif expected and not expected.startswith(digest):
        problem = f"got bytes with SHA-256 {digest}, expected {expected}"
    else:
        problem = problem_of(part)
    if problem:
        part.unlink()
        raise BadContent(problem)
    # The hash is written before the file is renamed, so that every downloaded file has a recorded hash.
    write_text(hash_file(path), f"{digest}  {path.name}\n")
    os.replace(part, path)


def hash_file(path: Path) -> Path:
    """shard_00000.parquet -> shard_00000.parquet.sha256."""
    return path.with_name(path.name + ".sha256")


def seconds_from(variable: str, default: float) -> float:
    """Returns the number in an environment variable, or `default` if the variable holds no number."""
    try:
        return float(os.environ.get(variable) or default)
    except ValueError:
        return default
