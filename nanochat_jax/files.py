"""Writes files atomically, reads JSON files that may be missing, hashes files, and locks folders."""

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
    """Opens a temporary file for writing. At the end of the `with` block, flushes it to disk and renames it to `path`.

    A reader of `path` sees either the old file or the complete new file, even after a crash.
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
    """Writes a file atomically, and creates its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file, or {} if the file is missing or holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def sha256(path: Path) -> str:
    """Returns the SHA-256 hash of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def exclusive(folder: Path, refusal: str) -> Generator[None]:
    """Locks the folder until the `with` block ends. Creates the folder if needed.

    Raises UserError(refusal) if another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(refusal) from None
        yield
