"""Decides which files of a user's folder are for training, and which for validation. In: a folder. Out: its Roles.

The words in names decide. For example, my_val.txt contains the word "val", but latest.jsonl does not contain "test".
The words of a file's own name count first, then those of the nearest subfolder, and so on:

    test, testing               validation if no file is named val or eval, otherwise not read; never training
    val, valid, validation, dev validation
    eval, evaluation            validation if no file is named val, otherwise not read
    train, training             training
    none of these words         training

If there is no validation file, about 1% of the documents become the validation set. A hash of their text chooses them.
They are thus spread evenly over all files, and all copies of a document have the same role.
"""

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax import config
from nanochat_jax.config import UserError
from nanochat_jax.data import hub, text_files
from nanochat_jax.files import copies

# The first role that matches counts, so a file named train_test is held out.
WORDS = {
    "test": {"test", "testing"},
    "val": {"val", "valid", "validation", "dev"},
    "eval": {"eval", "evaluation"},
    "train": {"train", "training"},
}
HELD_OUT = ("val", "eval", "test")  # the first of these roles that has files is the validation set
ONE_IN = 100  # if there is no validation file, about one in ONE_IN documents is for validation
SHOWN = 5  # maximum number of file names in a printed list


@dataclass(frozen=True)
class Roles:
    """What each file of a folder is for."""

    folder: Path
    train: tuple[Path, ...]
    val: tuple[Path, ...]  # empty: a hash of the text decides which documents are for validation
    unread: tuple[tuple[str, tuple[Path, ...]], ...]  # (reason, files that are not read)

    @property
    def files(self) -> list[Path]:
        """The files that are read, sorted by path."""
        return sorted([*self.train, *self.val])

    def lines(self) -> list[str]:
        """Returns one line about training, one about validation, and one about the files that are not read, if any."""
        by_hash = f"1 in {ONE_IN} documents, by a hash of their text (no file is named val, dev, eval or test)"
        lines = [f"training: {self._names(self.train)}"]
        lines.append(f"validation: {self._names(self.val) if self.val else by_hash}")
        if self.unread:
            lines.append("not read: " + "; ".join(f"{self._names(files)} ({why})" for why, files in self.unread))
        return lines

    def _names(self, files: tuple[Path, ...]) -> str:
        names = [str(path.relative_to(self.folder)) for path in files]
        more = len(names) - SHOWN
        return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def roles(folder: Path) -> Roles:
    """Returns what each file in a folder and its subfolders is for. Raises UserError if nothing is left to train on."""
    if not folder.is_dir():
        reason = "this is a file; give the folder it is in" if folder.exists() else "no such folder"
        raise UserError(f"--data_dir={folder}: {reason}")
    files, unread = _readable(folder)
    by_role: dict[str, list[Path]] = {name: [] for name in WORDS}
    pinned = _pinned(files)
    for path in files:
        by_role["val" if path == pinned else role_of(path.relative_to(folder))].append(path)
    chosen = next((name for name in HELD_OUT if by_role[name]), None)
    others = sorted(path for name in HELD_OUT if name != chosen for path in by_role[name])
    unread[f"held out; the files named {chosen} are the validation set"] = others
    by_reason = tuple((why, tuple(paths)) for why, paths in unread.items() if paths)
    result = Roles(folder, tuple(by_role["train"]), tuple(by_role[chosen]) if chosen else (), by_reason)
    if not result.train:
        met = "; ".join(result.lines()[2:]) or "the folder has none"
        if chosen:
            held_out = result._names(tuple(path for name in HELD_OUT for path in by_role[name]))
            raise UserError(f"--data_dir={folder}: no training files, since a held-out file is never one: {held_out}")
        raise UserError(f"--data_dir={folder}: no files ending in {text_files.READABLE}; {met}")
    if same := copies(result.val, result.train):
        held_out, trained = (result._names((path,)) for path in same)
        raise UserError(f"--data_dir={folder}: {held_out} is a copy of {trained}: hold out other text, or delete it")
    return result


def role_of(path: Path) -> str:
    """Returns the role that a relative path names: data/validation/x.parquet -> "val". The default is "train"."""
    for part in reversed(path.parts):
        words = set()
        for word in re.findall(r"[^\W\d_]+", part):
            words.update(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", word).lower().split())  # trainData -> train, data
        for role, names in WORDS.items():
            if words & names:
                return role
    return "train"


def _pinned(files: list[Path]) -> Path | None:
    """Returns the validation shard, such as shard_01822.parquet, if the files are shards of a hub source. Returns None
    if they are not, or if the validation shard is missing."""
    shards = {path.name: path for path in files}
    if not all(re.fullmatch(r"shard_\d{5}\.parquet", name) for name in shards) or len(shards) < len(files):
        return None
    last = max(files, key=lambda path: path.name, default=None)
    return last if last and last.name in {hub.shard_name(index) for _, index in hub.SOURCES.values()} else None


def _readable(folder: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """Returns (files to read, {reason: files skipped for this reason}). All lists are sorted by path.

    Hidden files, temporary files and markers such as _SUCCESS are in none of the lists.
    """
    files, seen = [], {}
    unread: dict[str, list[Path]] = {
        "no known text format": [], "no text in it": [], "another name of a file that is read": [],
        "a compressed copy of a file that is read": [], "a readme or licence": [], "a broken link": [],
    }  # fmt: skip
    for path in sorted(_walk(folder)):
        kind, name = text_files.form(path), path.name.lower()
        if name[0] == "." or ".tmp-" in name or name.endswith((".part", ".sha256")) or name == "lock":
            continue
        if name.startswith(("readme", "license", "licence")) or (kind is None and name[0] == "_"):
            if kind:
                unread["a readme or licence"].append(path)
        elif not path.is_file():
            unread["a broken link"] += [path] if path.is_symlink() else []
        elif kind is None:
            unread["no known text format"].append(path)
        elif (inode := (path.stat().st_dev, path.stat().st_ino)) in seen:
            unread["another name of a file that is read"].append(path)
        elif kind[0] == ".json" and not text_files.holds_text(path):
            unread["no text in it"].append(path)
        else:
            seen[inode] = path
            files.append(path)
    plain = set(files)
    copies = {
        path for path in files if path.suffix.lower() in text_files.COMPRESSIONS and path.with_suffix("") in plain
    }
    unread["a compressed copy of a file that is read"] += sorted(copies)
    return [path for path in files if path not in copies], unread


def _walk(folder: Path) -> list[Path]:
    """Returns the files in a folder and its subfolders. Links to folders are followed, but each folder is read once.
    Hidden folders are skipped, and so is the base folder, which holds the converted text.

    Raises UserError if a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"--data_dir={folder}: {error.filename} cannot be read ({error.strerror})") from error

    base, seen, files = config.base_dir().resolve(), set(), []
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        here = Path(root).resolve()
        if here in seen or (here == base and Path(root) != folder):
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        files += [Path(root, name) for name in names]
    return files


def hash_of(text: str) -> float:
    """Returns a number from 0 to 1 that depends only on the text. White space at the ends does not count."""
    digest = hashlib.sha256(text.strip().encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def divide(roles: Roles, counts: Counter[str]) -> tuple[Iterator[str], Iterator[str]]:
    """Returns the training documents and the validation documents. Updates `counts` as `text_files.documents` does."""
    lowest, highest = 1.0, 0.0
    for path in roles.files:
        empty = True
        for text in text_files.documents(path, counts):
            empty = False
            if not roles.val:
                place = hash_of(text)
                lowest, highest = min(lowest, place), max(highest, place)
        if empty:
            raise UserError(f"{path}: no documents")

    def texts(files: Iterable[Path]) -> Iterator[str]:
        return (text for path in files for text in text_files.documents(path))

    if roles.val:
        return texts(roles.train), texts(roles.val)
    if lowest >= highest:
        raise UserError(
            f"{roles.folder}: one document cannot be both the training and the validation set; add more text"
        )
    # A small corpus may have no document in the lowest 1% of hashes. Then the document with the lowest hash is held
    # out. If all hashes are that low, the document with the highest hash is trained on.
    limit = min(max(1 / ONE_IN, math.nextafter(lowest, 2)), highest)
    train = (text for text in texts(roles.train) if hash_of(text) >= limit)
    return train, (text for text in texts(roles.train) if hash_of(text) < limit)
