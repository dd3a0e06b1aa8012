"""Finds the pretraining text. `open` takes a folder or a source's name, and returns the training and validation files.

    python -m nanochat_jax.dataset -n 240    downloads 240 training shards from the Hugging Face hub (hub.py)
    --data=local                             selects a small corpus, built from the installed documentation
    --data_dir=FOLDER                        selects a folder of text in several formats (text_folder.py)

All files are parquet files with a string column `text`. The validation files are never used for training. `open` prints
which text it chose, and why.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_jax import config
from nanochat_jax.config import UserError
from nanochat_jax.data import hub, local_corpus, parquet, text_folder
from nanochat_jax.data.text_files import shuffled
from nanochat_jax.files import read_json, sha256

# The name of a converted folder contains a hash of this text. Change the text when text_folder.py divides documents in
# another way, so that the folder is converted again.
SPLIT = "roles by name, else 1% by hash"


@dataclass(frozen=True)
class Source:
    """A corpus on disk. `hash` identifies its contents.

    If this module wrote the files, `hash` is a hash of the whole text. Otherwise, it is a hash of file names and sizes,
    because the files may be too large to read twice.
    """

    name: str
    train_files: tuple[Path, ...]
    val_files: tuple[Path, ...]
    hash: str
    folder: Path | None = None  # the user's folder that the text comes from
    about: str = field(default="", compare=False)  # what `open` prints: the text, why it was chosen, what is not read

    def texts(self, split: str) -> Iterator[str]:
        """Yields the documents of a split ("train" or "val"), file by file. Waits for shards that are still
        downloading."""
        for path in {"train": self.train_files, "val": self.val_files}[split]:
            hub.wait_for_shard(path)
            yield from filter(None, parquet.texts_of(path))

    def val_hash(self) -> str:
        """Returns the SHA-256 (hex) of the validation files. Two runs with the same hash have comparable scores."""
        digest = hashlib.sha256()
        for path in self.val_files:
            digest.update(bytes.fromhex(sha256(path)))
        return digest.hexdigest()


class Choice(NamedTuple):
    """Which text to read: a source's name or a user's folder. `why` is printed."""

    source: str
    data_dir: str
    why: str


def open(
    source: str | None = None,
    data_dir: str | Path | None = None,
    num_files: int = -1,
    default: Callable[[], Choice] | None = None,
    build: bool = True,
    preset: str = "",
) -> Source:
    """Returns the corpus named `source`, or the corpus in the folder `data_dir`, and prints which one it is and why.
    Raises UserError if the corpus is missing or unusable.

    If neither `source` nor `data_dir` is given, the function `default` chooses the corpus. If `default` is None, the
    function `recorded` chooses it, so that all stages read the text that the tokenizer was trained on.

    The training files of a hub corpus are its first `num_files` training shards (-1: all shards that `download` was
    asked for). Some of them may still be downloading. Other corpora have no shards to count, so `num_files` is refused,
    unless a preset may have given it. Then `open` prints that it is not used.

    If `build` is False, nothing is printed, and a corpus that must first be built or converted causes a UserError.
    Callers write sources.open(cfg.data), like gzip.open(path).
    """
    if data_dir:
        flag = "--data_dir" + (f", which replaces --data={source}" if source else "")
        choice = Choice("", str(data_dir), _beside_recorded(flag, "", str(data_dir)))
    elif source:
        choice = Choice(source, "", _beside_recorded("--data", source, ""))
    else:
        choice = (default or recorded)()
    if choice.data_dir:
        folder = config.user_path(choice.data_dir).resolve()
        roles = text_folder.roles(folder)
        about = "\n".join([f"text: {folder.name}, {folder} ({choice.why})", *(f"  {line}" for line in roles.lines())])
    elif choice.source == "local":
        roles, about = None, f"text: local, the documentation of this Python installation ({choice.why})"
    elif choice.source in hub.SOURCES:
        roles, about = None, f"text: {hub.state(choice.source, num_files)} ({choice.why})"
    else:
        known = ", ".join(hub.SOURCES)
        raise UserError(f"--data={choice.source}: unknown source, expected {known} or local (or give --data_dir)")
    if num_files != -1 and (choice.data_dir or choice.source == "local"):
        if not preset:
            raise UserError(
                f"--num_files={num_files}: {choice.data_dir or choice.source} is always read whole: leave it out"
            )
        about += f"\n  num_files={num_files} is not used, because this text is always read whole"
    if build:
        print(about, flush=True)
    if roles:
        opened = _open_folder(roles, build)
    elif choice.source == "local":
        opened = _open_local(build)
    else:
        train, val = hub.shards_of(choice.source, num_files)
        # Only the validation shard is hashed, so that the hash does not depend on `num_files`.
        opened = Source(choice.source, tuple(train), (val,), _fingerprint([val], val.parent))
    return replace(opened, about=about)


# -----------------------------------------------------------------------------
# Which text is read if no flag names one


def recorded() -> Choice:
    """Returns the text that the tokenizer was trained on. If there is no tokenizer yet, returns the text that it would
    be trained on.

    Raises UserError if the tokenizer does not say what it was trained on, or if this was a folder that is gone.
    """
    folder = config.base_dir() / "tokenizer"
    if not folder.exists():
        return downloaded()
    record = read_json(folder / "source.json")
    source, data_dir = record.get("source") or "", record.get("data_dir") or ""
    if not source and not data_dir:
        raise UserError(
            f"{folder} does not say which text it was trained on (source.json is missing or damaged): choose the text "
            f"with --data={_hub_or_local()} or --data_dir=FOLDER"
        )
    if data_dir and not Path(data_dir).is_dir():
        raise UserError(
            f"the tokenizer was trained on {data_dir}, which is gone: name its new place with --data_dir=FOLDER, or "
            f"choose another text with --data={_hub_or_local()}"
        )
    return Choice(source, data_dir, "the tokenizer was trained on it")


def downloaded() -> Choice:
    """Returns the text that `scripts.tok_train` reads without a flag.

    This is the source that was downloaded. If nothing was downloaded, it is the folder that was converted, or the
    folder that the current tokenizer was trained on. If there is no such folder either, it is the local corpus. Raises
    UserError if there are several downloads, or several folders.
    """
    record = read_json(config.base_dir() / "tokenizer" / "source.json")
    names = [name for name in hub.SOURCES if hub.has_begun(name)]
    if len(names) > 1:
        flags = " or ".join(f"--data={name}" for name in names)
        raise UserError(f"{len(names)} texts were downloaded ({', '.join(names)}): choose one with {flags}")
    if names:
        why = f"the text that was downloaded; --data=local reads the local corpus{_other_than(record, names[0], '')}"
        return Choice(names[0], "", why)
    folders = set()
    for path in sorted((config.base_dir() / "data").glob("*/manifest.json")):
        manifest = read_json(path)
        # A damaged manifest is an error, because it may have named the folder to read. The temporary folders of
        # conversions that were killed are skipped.
        if not manifest and path.parent.name != "local" and ".tmp-" not in path.parent.name:
            raise _damaged(path.parent, "manifest.json cannot be read")
        if (folder := manifest.get("folder")) and Path(folder).is_dir():
            folders.add(folder)
    folders |= {folder} if (folder := record.get("data_dir")) and Path(folder).is_dir() else set()
    if len(folders) > 1:
        flags = " or ".join(f"--data_dir={folder}" for folder in sorted(folders))
        raise UserError(f"{len(folders)} folders of text were converted or used before: choose one with {flags}")
    if folders:
        [folder] = folders
        why = f"the text used before; --data=local reads the local corpus{_other_than(record, '', folder)}"
        return Choice("", folder, why)
    why = "nothing was downloaded; python -m nanochat_jax.dataset -n 240 downloads FineWeb-Edu"
    return Choice("local", "", why + _other_than(record, "local", ""))


def _hub_or_local() -> str:
    begun = [name for name in hub.SOURCES if hub.has_begun(name)]
    return begun[0] if len(begun) == 1 else "local"


def _beside_recorded(why: str, source: str, data_dir: str) -> str:
    """Adds a note to `why` if the tokenizer was trained on another text. The note names that text."""
    folder = str(config.user_path(data_dir).resolve()) if data_dir else ""
    return why + _other_than(read_json(config.base_dir() / "tokenizer" / "source.json"), source, folder)


def _other_than(record: dict, source: str, data_dir: str) -> str:
    """Returns a note that names the text that the current tokenizer was trained on. Returns "" if there is no
    tokenizer, or if it was trained on the given text."""
    before = record.get("data_dir") or record.get("source")
    return f"; the current tokenizer was trained on {before}" if before and before != (data_dir or source) else ""


# -----------------------------------------------------------------------------
# Corpora that this module writes: the local corpus, and folders that it converts to parquet


def _build(target: Path, name: str, train: Iterable[str], val: Iterable[str], row_group: int, **notes: Any) -> Source:
    """Writes the documents and a manifest into the new folder `target`, and opens the result as a corpus. If writing
    fails, `target` is not created."""
    tmp = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        digest = hashlib.sha256()
        counts = {"val": parquet.write_shards(tmp, "val", val, digest, row_group)}
        counts["train"] = parquet.write_shards(tmp, "train", train, digest, row_group)
        for split, count in counts.items():
            if not count:
                raise UserError(f"{name}: no usable documents for {split}; add more text")
        sizes = {path.name: path.stat().st_size for path in sorted(tmp.glob("*.parquet"))}
        manifest = {"source": name, "hash": digest.hexdigest(), "documents": counts, "sizes": sizes, **notes}
        (tmp / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        try:
            tmp.rename(target)
        except OSError:  # another process may already have written the same corpus
            if not (target / "manifest.json").exists():
                raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return _open_built(target)


def _is_built(folder: Path) -> bool:
    """Returns whether `_build` wrote a corpus into `folder`. Raises UserError if something else is there."""
    if (folder / "manifest.json").exists():
        return True
    if folder.is_dir() and any(folder.iterdir()):
        raise _damaged(folder, "manifest.json is missing")
    return False


def _open_built(folder: Path) -> Source:
    """Opens the corpus that `_build` wrote into `folder`. Raises UserError if it is no longer complete.

    The files must have the names and sizes in the manifest. The manifests of early versions have only the number of
    documents.
    """
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest.get("source"), str) or not isinstance(manifest.get("hash"), str):
        raise _damaged(folder, "manifest.json cannot be read")
    sizes = manifest.get("sizes")
    here = {path.name: path for path in sorted(folder.glob("*.parquet"))}
    if sizes is not None:
        for name, size in sizes.items():
            if name not in here:
                raise _damaged(folder, f"{name} is missing")
            if (now := here[name].stat().st_size) != size:
                raise _damaged(folder, f"{name} has {now:,} bytes instead of {size:,}")
        here = {name: here[name] for name in sizes}
    train, val = (tuple(path for name, path in here.items() if name.startswith(f"{s}_")) for s in ("train", "val"))
    for split, files in (("train", train), ("val", val)):
        if not files:
            raise _damaged(folder, f"{split}_00000.parquet is missing")
        expected = manifest.get("documents", {}).get(split) if sizes is None else None
        if expected is not None and (count := _count(files)) != expected:
            raise _damaged(folder, f"{split}_*.parquet have {count:,} documents instead of {expected:,}")
    return Source(manifest["source"], train, val, manifest["hash"])


def _count(files: Iterable[Path]) -> int:
    """Returns the number of documents in parquet files. Only their metadata is read."""
    total = 0
    for path in files:
        with parquet.open(path) as file:
            total += file.metadata.num_rows
    return total


def _damaged(folder: Path, why: str) -> UserError:
    return UserError(f"{folder} is damaged ({why}): delete this folder, and scripts.tok_train writes it again")


def _open_local(build: bool) -> Source:
    """Returns the corpus of installed documentation. The first call builds it. Later calls reuse it, even if other
    packages are installed by then."""
    folder = config.base_dir() / "data" / "local"
    if _is_built(folder):
        return _open_built(folder)
    if not build:
        raise UserError("local: not built yet; training the tokenizer builds it")
    print("building the local corpus from installed documentation (once, under a minute)", flush=True)
    train, val, versions = local_corpus.build(local_corpus.PACKAGES)
    source = _build(folder, "local", train, val, row_group=256, versions=versions)
    chars = sum(map(len, train)) / 1e6
    print(f"local corpus: {chars:.1f}M characters in {len(train):,} documents, {folder}", flush=True)
    return source


def _open_folder(roles: text_folder.Roles, build: bool) -> Source:
    """Returns the corpus in a user's folder.

    If all files are parquet files, and their names tell training from validation, the files are read in place. In all
    other cases, the first call converts the files to parquet and shuffles the training documents. If two files in
    different subfolders have the same name, the files are converted too, because the token cache needs unique names.
    """
    folder, files = roles.folder, roles.files
    one_name_each = len({path.stem for path in files}) == len(files)
    if roles.val and one_name_each and all(path.suffix.lower() == ".parquet" for path in files):
        for path in files:
            with parquet.open(path) as file:
                if not file.metadata.num_rows:
                    raise UserError(f"{path}: no documents")
        return Source(folder.name, roles.train, roles.val, _fingerprint(files, folder), folder)
    stats = [(path.relative_to(folder), path.stat()) for path in files]
    stamps = [f"{path}:{stat.st_size}:{stat.st_mtime_ns}" for path, stat in stats]
    key = hashlib.sha256("\n".join([str(folder), SPLIT, *stamps]).encode()).hexdigest()[:8]
    target = config.base_dir() / "data" / f"{folder.name}-{key}"
    if _is_built(target):
        return replace(_open_built(target), folder=folder)
    if not build:
        raise UserError(f"{folder}: not converted yet; training the tokenizer converts it")
    print(f"converting {len(files)} files in {folder} to parquet (once)", flush=True)
    counts = Counter()
    train, val = text_folder.divide(roles, counts)
    notes = {"folder": str(folder), "files": [str(path) for path, _ in stats], "met": counts}
    source = _build(target, folder.name, shuffled(_pieces(train)), _pieces(val), parquet.ROW_GROUP, **notes)
    summary = ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items()))
    print(f"{folder.name}: {summary}; {target}", flush=True)
    return replace(source, folder=folder)


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Splits long documents."""
    return (piece for text in texts for piece in parquet.split_long(text))


def _fingerprint(files: list[Path], folder: Path) -> str:
    """Returns the SHA-256 (hex) of the files' sizes and names. The names are relative to `folder`."""
    lines = [f"{path.relative_to(folder)}:{path.stat().st_size}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
