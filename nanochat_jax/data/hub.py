"""Shards of text from the Hugging Face hub: in parallel, resumed after an interruption, verified.

    <base>/data/<source>/shard_00000.parquet          whole and verified, or not there
    <base>/data/<source>/shard_00000.parquet.sha256   what it hashes to, as `sha256sum -c` reads it
    <base>/data/<source>/shard_00000.parquet.*.part   its beginning, named after the version it is of
    <base>/data/<source>/manifest.json                how many were asked for

Addresses, tokens, mirrors and offline mode are huggingface_hub's: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE. The transfer
is not: the library (2.4) throws away what it has when it is interrupted, compares sizes but no hashes, and needs 23 s
to notice that nobody answers. The hash is the hub's; where a mirror gives none, it is the first download's.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from nanochat_jax import config
from nanochat_jax.config import UserError, first_line
from nanochat_jax.files import exclusive, read_json, sha256, write_text
from nanochat_jax.progress import Progress

# name: (hub repository, number of its last shard). That last shard is the validation set, whatever else is on disk.
SOURCES = {
    "fineweb-edu": ("karpathy/fineweb-edu-100b-shuffle", 1822),
    "climbmix": ("karpathy/climbmix-400b-shuffle", 6542),
}
TRIES = 5  # in a row without a new byte
FEW_TRIES = 3  # where no server answers, or it sends the wrong bytes
PAUSE = 0.5  # seconds before the second try, doubled before each further one
LONGEST_PAUSE = 300.0  # seconds; the hub counts requests over five minutes


def shard(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def folder_of(source: str) -> Path:
    return config.base_dir() / "data" / source


def shards_of(source: str, num_files: int = -1) -> tuple[list[Path], Path]:
    """(training shards, validation shard) that `download` was asked for, arrived or not, so that their order never
    depends on what has arrived; with `num_files` as many of them, asked for yet or not. UserError where nothing was."""
    folder, last = folder_of(source), shard(SOURCES[source][1])
    if num_files == 0 or not -1 <= num_files <= SOURCES[source][1]:
        raise UserError(f"--num_files={num_files}: expected 1 to {SOURCES[source][1]} shards of {source} (-1: all)")
    command = f"python -m nanochat_jax.dataset --data {source} -n 8"
    if not (folder / last).exists():
        raise UserError(f"{source}: no validation shard {folder / last}; run {command}")
    count = read_json(folder / "manifest.json").get("shards")
    if num_files > 0:
        train = [folder / shard(i) for i in range(num_files)]
    elif count is None:  # put here by other means
        train = [p for p in sorted(folder.glob("shard_*.parquet")) if p.name != last]
    else:
        train = [folder / shard(i) for i in range(count)]
    if not train:
        raise UserError(f"{source}: no training shards in {folder}; run {command}")
    return train, folder / last


def download(source: str, num_files: int = -1, workers: int = 4, verify: bool = False) -> None:
    """Fetches the validation shard and the first `num_files` training shards (-1: all) into the data folder; what is
    there is kept, what was begun goes on. Files that have changed since they were verified are hashed again, with
    `verify` all of them, and the damaged ones fetched anew. UserError if any shard is missing in the end."""
    if source not in SOURCES:
        raise UserError(f"--data={source}: unknown source, expected {' or '.join(SOURCES)}")
    repo, last = SOURCES[source]
    if num_files > last or num_files == 0 or num_files < -1 or workers < 1:
        raise UserError(f"-n {num_files} -w {workers}: expected 1 to {last} shards (-1: all) and at least one worker")
    count = last if num_files == -1 else num_files
    names = [shard(i) for i in range(count)]
    folder = folder_of(source)
    # Two downloads into one folder would write the same partial files.
    with exclusive(folder, f"another download into {folder} is running: wait for it, or end it"):
        job = Job(repo, folder)
        there = [name for name in [shard(last), *names] if (folder / name).exists()]
        with job.threads(workers) as pool, Progress("verifying, files", len(there)) as progress:
            for _ in pool.map(lambda name: _verify(job, name, verify), there):
                job.alive()
                progress.advance()
        # The validation shard comes first and alone: it is needed whatever happens, and where the hub cannot be
        # reached this says so once and soon.
        if failures := _fetch_all(job, [shard(last)], f"{source}, validation shard, MB", 1):
            raise UserError(f"{repo}: {failures[0]} (without the hub: --data=local, or --data_dir=FOLDER)")
        asked = max(count, read_json(folder / "manifest.json").get("shards", 0))  # asking for less takes nothing away
        write_text(folder / "manifest.json", json.dumps({"source": source, "repo": repo, "shards": asked}) + "\n")
        if failures := _fetch_all(job, names, f"{source}, MB", workers):
            left = sum(not (folder / name).exists() for name in names)
            first = f"{left} of {count} shards missing, the first because {failures[0]}"
            raise UserError(f"{first}; run it again to resume")


# -----------------------------------------------------------------------------
# Waiting for a shard, in another process than the one that downloads it


def wait_for_shard(path: Path, stop: threading.Event | None = None, patience: float = 120.0) -> None:
    """Blocks until a shard that is being downloaded has arrived, so that training can start on the first ones.
    UserError when nothing has changed in its folder for `patience` seconds; InterruptedError once `stop` is set."""
    stop = stop or threading.Event()
    if not path.exists():
        print(f"waiting for {path} to arrive", file=sys.stderr, flush=True)
    while not path.exists():
        if time.time() - _last_change(path.parent) > patience:
            raise UserError(f"{path}: missing, and no download is running; run python -m nanochat_jax.dataset again")
        if stop.wait(0.5):
            raise InterruptedError(f"stopped waiting for {path}")


def _last_change(folder: Path) -> float:
    """When something in a folder was written last; a download that only waits touches its lock."""
    times = [0.0]
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # a temporary file that was renamed meanwhile
                times.append(entry.stat().st_mtime)
    return max(times)


# -----------------------------------------------------------------------------
# A download


@dataclass
class Job:
    """What the threads of one download share; each writes under the names of its own shards alone."""

    repo: str
    folder: Path
    stop: threading.Event = field(default_factory=threading.Event)
    came: dict[str, int] = field(default_factory=dict)  # bytes of a shard that were transferred
    to_come: dict[str, int] = field(default_factory=dict)  # and how many these will have been in the end

    def alive(self) -> None:
        """Tells those who wait for a shard that somebody is at work on it."""
        os.utime(self.folder / "lock")

    @contextlib.contextmanager
    def threads(self, workers: int) -> Iterator[ThreadPoolExecutor]:
        """Ends what its threads are doing when the block ends, in whatever way."""
        pool = ThreadPoolExecutor(workers)
        try:
            yield pool
        except KeyboardInterrupt:
            print("\nstopping; run it again to resume", file=sys.stderr, flush=True)
            raise
        finally:
            self.stop.set()
            pool.shutdown(cancel_futures=True)
            self.stop.clear()


class Stopped(Exception):
    """The download is to end."""


class Wrong(Exception):
    """What arrived is not what was promised."""


def _fetch_all(job: Job, names: list[str], label: str, workers: int) -> list[str]:
    """Fetches the shards that are missing, in parallel. Returns what went wrong, one line a shard; stops early where
    it goes wrong again and again."""
    missing = [name for name in names if not (job.folder / name).exists()]
    job.came, job.to_come = dict.fromkeys(missing, 0), {}
    failures = []
    with job.threads(workers) as pool, Progress(label, None) as progress:
        pending = {pool.submit(_fetch, job, name) for name in missing}
        while pending and len(failures) < 2 * workers:  # many: it is not about single shards
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            job.alive()
            failures += [failure for future in done if (failure := future.result())]
            arrived = len(missing) - len(pending) - len(failures)
            begun, here = list(job.to_come.values()), sum(list(job.came.values()))
            # Shards are about of one size, so those that have not begun are as large as the others.
            progress.total = int(sum(begun) / max(1, len(begun)) * (len(missing) - len(failures)) / 1e6) or None
            speed = here / 1e6 / max(progress.seconds, 1e-9)
            progress.reach(int(here / 1e6), f"{arrived}/{len(missing)} files, {speed:.1f} MB/s")
    return failures


# -----------------------------------------------------------------------------
# One shard


def _fetch(job: Job, name: str) -> str:
    """Fetches one shard. Returns "" or, in one line, why it is not there."""
    tries = 0
    while True:
        before = job.came[name]
        try:
            _transfer(job, name)
            return ""
        except Stopped:
            return f"{name}: stopped"
        except Exception as error:  # the library's, those of its HTTP client, ours: each ends as a line
            reason = f"{name}: {first_line(error)}"
            progressed = job.came[name] > before and not isinstance(error, Wrong)
            tries = 1 if progressed else tries + 1
            allowed, pause = _patience(error)
            if tries >= allowed or job.stop.wait(pause or min(PAUSE * 2 ** (tries - 1), LONGEST_PAUSE)):
                return reason


def _patience(error: Exception) -> tuple[int, float]:
    """How many tries an error is worth, and the seconds to wait where the server says how long (0: it does not)."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return 1, 0
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return 1, 0
    response = getattr(error, "response", None)
    if response is None:
        return FEW_TRIES, 0
    if response.status_code not in (408, 429) and response.status_code < 500:
        return 1, 0  # it is not there, or not for us
    limits = response.headers.get("Retry-After", ""), response.headers.get("RateLimit", "")
    told = re.fullmatch(r"(\d+)", limits[0]) or re.search(r"\bt=(\d+)", limits[1])
    return TRIES, min(float(told[1]), LONGEST_PAUSE) if told else 0


def _transfer(job: Job, name: str) -> None:
    """One try: asks for the shard's size and hash, continues its partial file, verifies and names it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    # The endpoint is read here, since the library reads it once when it is imported.
    url = hf_hub_url(job.repo, name, repo_type="dataset", endpoint=os.environ.get("HF_ENDPOINT") or None)
    about = get_hf_file_metadata(url, timeout=_seconds("HF_HUB_ETAG_TIMEOUT", 5.0))
    path = job.folder / name
    digest, pinned = _sha256_of(about.etag), _pinned(path)
    if digest and pinned and digest != pinned:
        print(f"{name}: the hub has another version now, SHA-256 {digest}, once {pinned}", flush=True)
    version = hashlib.sha256((about.etag or "").encode()).hexdigest()[:16]
    part = path.with_name(f"{name}.{version}.part")
    for other in path.parent.glob(f"{name}.*.part"):
        if other != part:
            other.unlink()
    _append(job, name, url, part, about.size)
    expected = digest or (f"{pinned} as the first time ({_pin(path).name})" if pinned else "")
    _accept(part, path, expected, about.size)


def _append(job: Job, name: str, url: str, part: Path, size: int | None) -> None:
    """Adds to the partial file what is missing."""
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers

    start = part.stat().st_size if part.exists() else 0
    if size is not None and start == size:
        return
    if size is not None and start > size:
        start = 0
    headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    timeout = _seconds("HF_HUB_DOWNLOAD_TIMEOUT", 10.0)
    came = job.came[name]
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as answer:
        hf_raise_for_status(answer)
        if answer.status_code != 206 or not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0  # the whole file is coming
        job.to_come[name] = came + (int(answer.headers.get("Content-Length", 0)) if size is None else size - start)
        with open(part, "r+b" if start else "wb") as file:
            file.seek(start)
            for block in answer.iter_bytes():
                file.write(block)
                job.came[name] += len(block)
                if job.stop.is_set():
                    raise Stopped
            file.flush()
            os.fsync(file.fileno())


def _accept(part: Path, path: Path, expected: str, size: int | None) -> None:
    """Gives a partial file its name if it is whole. `expected` begins with its SHA-256, or is "" if nobody knows it."""
    length, found = part.stat().st_size, sha256(part)
    if size is not None and length < size:
        raise ConnectionError(f"got {length:,} of {size:,} bytes")  # the rest may still come
    if size is not None and length > size:
        problem = f"got {length:,} bytes instead of {size:,}"
    elif expected and not expected.startswith(found):
        problem = f"got bytes with SHA-256 {found}, expected {expected}"
    else:
        problem = _problem(part)
    if problem:
        part.unlink()
        raise Wrong(problem)
    write_text(_pin(path), f"{found}  {path.name}\n")  # first: a shard that is there has its hash
    os.replace(part, path)


def _verify(job: Job, name: str, always: bool) -> None:
    """Removes a shard that is damaged, so that it is fetched again."""
    path = job.folder / name
    pinned = _pinned(path)
    if pinned and not always and path.stat().st_mtime <= _pin(path).stat().st_mtime:
        return
    found = sha256(path)
    problem = _problem(path)  # all there is to go by for a file that was put here by other means
    if pinned and found != pinned:
        problem = f"SHA-256 {found}, expected {pinned}"
    if problem:
        print(f"{path} is damaged ({problem}): fetching it again", flush=True)
        path.unlink()
    else:
        write_text(_pin(path), f"{found}  {name}\n")


def _problem(path: Path) -> str:
    """What keeps a file from being read as parquet, in one line; "" if nothing does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        return f"not a readable parquet file: {first_line(error)}"
    return ""


def _pin(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _pinned(path: Path) -> str:
    """The SHA-256 recorded for a shard, "" if there is none."""
    try:
        return _sha256_of(_pin(path).read_text(encoding="utf-8").split(" ")[0])
    except (OSError, UnicodeDecodeError):
        return ""


def _sha256_of(etag: str | None) -> str:
    """The hub's tag of a large file is its SHA-256; that of other servers may be anything."""
    return etag if etag and re.fullmatch(r"[0-9a-f]{64}", etag) else ""


def _seconds(variable: str, default: float) -> float:
    try:
        return float(os.environ.get(variable) or default)
    except ValueError:
        return default
