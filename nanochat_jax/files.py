"""Writes files atomically, reads JSON files that may be missing, hashes and compares files, and locks folders."""

import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import re
import socket
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import BinaryIO

from nanochat_jax.config import UserError

LOCK = "lock"  # the name of a folder's lock file
TRIES = 1000  # attempts to lock a folder while other processes create and remove it
# The errors of a file system that has no locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


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
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def sha256(path: Path) -> str:
    """Returns the SHA-256 hash of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copies(files: Iterable[Path], others: Iterable[Path]) -> tuple[Path, Path] | None:
    """Returns the first file that has the same bytes as one of `others`, and that other file. Returns None if there is
    no such file. Files that do not exist are ignored. Only files of the same size are read."""
    by_size: dict[int, list[Path]] = {}
    for other in others:
        if other.is_file():
            by_size.setdefault(other.stat().st_size, []).append(other)
    for path in files:
        alike = by_size.get(path.stat().st_size, []) if path.is_file() else []
        digest = sha256(path) if alike else ""
        for other in alike:
            if sha256(other) == digest:
                return path, other
    return None


def remove_parts(path: Path) -> None:
    """Removes the temporary files that killed processes left behind when they wrote `path` with `atomic_write`.

    The caller must ensure that no other process is writing `path`.
    """
    for part in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        if re.fullmatch(r"[0-9]+", part.name.removeprefix(f"{path.name}.").removesuffix(".part")):
            part.unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# Locks


class Locked(UserError):
    """Raised if another process holds the lock of a folder."""


@contextlib.contextmanager
def exclusive(folder: Path, refusal: str) -> Generator[None]:
    """Locks the folder until the `with` block ends. Creates the folder if needed.

    If the folder holds only the lock file at the end, removes the folder and the parents that were created with it. If
    the file system has no locks (some NFS and Lustre mounts have none), prints a warning and continues without a lock.

    The lock file says which process holds the lock. If another process does, raises Locked. Its message is `refusal`,
    followed by the id and the host of that process. Raises UserError if the folder cannot be written to.
    """
    try:
        lock, unused = _take(folder, refusal)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{folder} cannot be written to ({error.strerror}): set NANOCHAT_BASE_DIR") from None
    with lock:
        try:
            yield
        finally:
            _remove_unused(lock, unused)


def _take(folder: Path, refusal: str) -> tuple[BinaryIO, list[Path]]:
    """Returns the locked lock file and a list of folders, innermost first.

    The caller removes these folders at the end if they hold nothing but the lock file. If locks are not available, the
    list is empty, because another process may be using the folder.
    """
    path, problem = folder / LOCK, None
    for _ in range(TRIES):
        created = [parent for parent in folder.parents if not parent.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(path, "ab")  # noqa: SIM115  # the caller closes it
        except (FileNotFoundError, FileExistsError) as error:  # another process may just have removed the folder
            problem = error
            continue
        try:
            locked = _lock(lock, folder)
            if _is_at(lock, path):
                lock.truncate(0)
                lock.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                lock.flush()
                return lock, [folder, *created] if locked else []
        except BlockingIOError:
            lock.close()
            raise Locked(f"{refusal} ({_holder(path)})") from None
        except BaseException:
            lock.close()
            raise
        lock.close()  # another process has removed this lock file: try again with a new one
    raise problem or BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _holder(lock: Path) -> str:
    """Returns which process holds a lock, as far as the lock file tells."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if text := lock.read_text(encoding="utf-8").strip():
            return text
    return f"it holds {lock}"


def _lock(lock: BinaryIO, folder: Path) -> bool:
    """Locks an open file and returns True. If locks are not available, prints a warning and returns False.

    Raises BlockingIOError if another process has locked the file.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        print_once(f"this system has no file locks: start only one process that writes to {folder}")
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        reason = os.strerror(error.errno or 0)
        print_once(f"{folder} cannot be locked ({reason}): start only one process that writes to it")
        return False
    return True


def _remove_unused(lock: BinaryIO, folders: list[Path]) -> None:
    """Removes `folders`, which are sorted innermost first, if they hold nothing but the lock file."""
    path = Path(lock.name)
    with contextlib.suppress(OSError):
        if folders and _is_at(lock, path) and os.listdir(path.parent) == [LOCK]:
            path.unlink()
            for folder in folders:
                folder.rmdir()  # fails if another process has since put something into it


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@functools.cache
def print_once(text: str) -> None:
    """Prints a line, unless this process has already printed it with this function."""
    print(text, flush=True)
