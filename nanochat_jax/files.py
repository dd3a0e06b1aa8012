"""Files: atomic writes, JSON that may be missing, hashes, and a folder's lock against a second process."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from nanochat_jax.config import UserError


@contextlib.contextmanager
def atomic_write(path: Path) -> Generator[BinaryIO]:
    """A file to write, renamed to `path` once it is complete and on the disk.

    Readers, also after a crash, see either the old file or the new one, never a part of it.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically; creates its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} if the file is missing or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def exclusive(folder: Path, refusal: str) -> Generator[None]:
    """Creates the folder and holds its lock file; UserError(refusal) if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(refusal) from None
        yield
