"""Decides which files of a folder of conversations are for training, and which for the test. In: a folder. Out: its
files by role.

The words in a file's name decide, as in a folder of pretraining text (data/text_folder.py): a file named val, dev, eval
or test is never trained on. If no file is named so, the caller has to divide the conversations of the training files.
"""

from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.config import UserError
from nanochat_jax.data.text_folder import HELD_OUT, SHOWN, WORDS, role_of
from nanochat_jax.files import copies

SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class ChatFolder:
    """What each file of a folder is for."""

    folder: Path
    train: tuple[Path, ...]
    test: tuple[Path, ...]  # empty: no file is held out
    unread: tuple[tuple[str, tuple[Path, ...]], ...]  # (reason, files that are not read)

    def describe(self, by_hash: str) -> str:
        """Returns a line about training, one about the test, and one about the files that are not read, if any.

        `by_hash` says how the conversations are divided if no file is held out.
        """
        otherwise = f"{by_hash} (no file is named val, dev, eval or test)"
        lines = [f"training: {self._names(self.train)}"]
        lines.append(f"test: {self._names(self.test) if self.test else otherwise}")
        if self.unread:
            lines.append("not read: " + "; ".join(f"{self._names(files)} ({why})" for why, files in self.unread))
        return "\n".join([f"conversations: {self.folder}", *(f"  {line}" for line in lines)])

    def _names(self, files: tuple[Path, ...]) -> str:
        more = len(files) - SHOWN
        names = ", ".join(str(path.relative_to(self.folder)) for path in files[:SHOWN])
        return names + (f" and {more:,} more" if more > 0 else "")


def read(folder: Path) -> ChatFolder:
    """Returns what each file in `folder` is for. Hidden files are in none of the lists.

    Raises UserError if there are files, but none to train on.
    """
    files: dict[str, Path] = {}  # the name without its suffix -> file
    other: list[Path] = []
    nested: list[Path] = []
    compressed: list[Path] = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
        if len(parts) > 1:
            nested.append(path)
        elif not path.name.endswith(SUFFIXES):
            other.append(path)
        elif stem in files:  # "a.jsonl" comes before "a.jsonl.gz"
            compressed.append(path)
        else:
            files[stem] = path
    by_role: dict[str, list[Path]] = {name: [] for name in WORDS}
    for stem in sorted(files):
        by_role[role_of(Path(files[stem].name))].append(files[stem])
    chosen = next((name for name in HELD_OUT if by_role[name]), None)
    unread = {
        f"only {' and '.join(SUFFIXES)} are read": other,
        "in a subfolder": nested,
        "a compressed copy of a file that is read": compressed,
        f"held out; the files named {chosen} are the test": [
            path for name in HELD_OUT if name != chosen for path in by_role[name]
        ],
    }
    test = tuple(by_role[chosen]) if chosen else ()
    by_reason = tuple((why, tuple(paths)) for why, paths in unread.items() if paths)
    result = ChatFolder(folder, tuple(by_role["train"]), test, by_reason)
    if not result.train and files:
        held_out = result._names(tuple(sorted(files.values())))
        raise UserError(f"{folder}: no training files, since a held-out file is never one: {held_out}")
    if not files and by_reason:
        met = result.describe("").splitlines()[-1].strip()
        raise UserError(f"{folder}: no files ending in {' or '.join(SUFFIXES)}; {met}")
    if same := copies(result.test, result.train):
        held_out, trained = same
        raise UserError(f"{held_out} is a copy of {trained.name}: hold out other conversations, or delete it")
    return result
