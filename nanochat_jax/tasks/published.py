"""Downloads two files of the original nanochat: a word list for spelling, and conversations about the model's identity.

The files are kept in the folder task_data in the base folder. They are not on the Hugging Face hub, but data/hub.py
transfers them, so an interrupted download is resumed, and failures are retried. A downloaded file must have the pinned
SHA-256.

If a download fails, the tasks use other words or conversations. The failure is recorded in a file next to the missing
one, and the download is not tried again while the record exists. Otherwise, a later download might succeed, and a run
that began with the other words or conversations could not be resumed. A dry run begins nothing, so it records nothing.
"""

import contextlib
import contextvars
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.config import base_dir
from nanochat_jax.data import transfer
from nanochat_jax.files import Locked, exclusive, write_text


@dataclass(frozen=True)
class PublishedFile:
    """A file with its pinned content. `size` is in bytes."""

    name: str
    url: str
    sha256: str
    size: int


# The address names a commit, so its content never changes.
WORDS = PublishedFile(
    "words_alpha.txt",
    "https://raw.githubusercontent.com/dwyl/english-words/20f5cc9b3f0ccc8ce45d814c532b7c2031bba31c/words_alpha.txt",
    "3ed0c94610d8bcf7c11bbb49c56aa49c7234d32b66824df91f554169e572da48",
    4_234_910,
)
# The original nanochat does not publish a hash of this file. The hash below is that of a copy that originalzen/nanochat
# on GitHub took from the address below in December 2025.
IDENTITY = PublishedFile(
    "identity_conversations.jsonl",
    "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl",
    "feb2388880cb4c451e82815b137a96f5fbf10c1cccd1a81cdc684deab6eb6abf",
    2_288_735,
)


_record_failures = contextvars.ContextVar("record_failures", default=True)


@contextlib.contextmanager
def without_records() -> Generator[None]:
    """Within the `with` block, a failed download is not recorded. For a dry run, which must not affect a later run."""
    token = _record_failures.set(False)
    try:
        yield
    finally:
        _record_failures.reset(token)


def find(file: PublishedFile) -> tuple[Path | None, str]:
    """Returns (the path of the file, ""), or (None, why there is no file). Downloads the file on first use."""
    path = base_dir() / "task_data" / file.name
    failure = path.with_name(f"{file.name}.failed")
    with _one_at_a_time(path.parent):
        if not path.is_file() and not failure.is_file() and (reason := _download(file, path)):
            if not _record_failures.get():
                return None, f"download failed: {reason}"
            write_text(failure, f"{time.strftime('%Y-%m-%d')}: {reason}\n")
    if path.is_file():
        return path, ""
    reason = failure.read_text(encoding="utf-8").strip()
    return None, f"download failed on {reason}; to try again, delete {failure}"


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Generator[None]:
    """Waits until no other process holds the folder's lock. Then holds the lock for the `with` block."""
    with contextlib.ExitStack() as lock:
        while True:
            try:
                lock.enter_context(exclusive(folder, f"another process is downloading into {folder}"))
                break
            except Locked:
                time.sleep(0.2)
        yield


def _download(file: PublishedFile, path: Path) -> str:
    """Downloads the file. Returns "" on success, or one line with the reason for the failure."""

    def once(job: transfer.Job, name: str) -> None:
        part = path.with_name(f"{name}.{file.sha256[:16]}.part")
        transfer.complete(job, name, file.url, part, file.size, headers={})  # never sends the hub's access token
        transfer.accept(part, path, file.sha256, file.size)

    print(f"downloading {file.url} to {path}", flush=True)
    job = transfer.Job(file.url, path.parent, received={file.name: 0})
    return transfer.fetch(job, file.name, once)
