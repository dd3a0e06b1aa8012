"""Finds the pretraining text. `open` takes a folder or a source's name, and returns the training and validation files.

    python -m nanochat_jax.dataset -n 240    downloads 240 training shards from the Hugging Face hub (hub.py)
    --data=local                             selects a small corpus, built from the installed documentation
    --data_dir=FOLDER                        selects a folder of parquet, jsonl or txt files

All files are parquet files with a string column `text`. The validation files are never used for training.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_jax import config
from nanochat_jax.config import UserError
from nanochat_jax.data import hub, local_corpus, parquet
from nanochat_jax.data.text_files import SUFFIXES, documents, shuffled
from nanochat_jax.files import sha256


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

    def texts(self, split: str) -> Iterator[str]:
        """Yields the documents of the split "train" or "val", in file order. Waits for shards that are still
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


def open(source: str | None = None, data_dir: str | Path | None = None, num_files: int = -1) -> Source:
    """Returns the corpus named `source`, or the corpus in the folder `data_dir`. Raises UserError if the corpus is
    missing or unusable.

    If neither `source` nor `data_dir` is given, returns the corpus that the tokenizer was trained on, so that all
    stages read the same text. If there is no tokenizer yet, returns the local corpus.

    A hub corpus has the first `num_files` training shards (-1: all shards that `download` was asked for). Some of these
    shards may still be downloading. Callers write sources.open(cfg.data), like gzip.open(path).
    """
    recorded = config.base_dir() / "tokenizer" / "source.json"
    if not source and not data_dir and recorded.exists():
        record = json.loads(recorded.read_text(encoding="utf-8"))
        source, data_dir = record.get("source"), record.get("data_dir")
    if data_dir:
        return _open_folder(Path(data_dir).expanduser().resolve())
    source = source or "local"
    if source == "local":
        return _open_local()
    if source not in hub.SOURCES:
        known = ", ".join(hub.SOURCES)
        raise UserError(f"--data={source}: unknown source, expected {known} or local (or give --data_dir)")
    train, val = hub.shards_of(source, num_files)
    # Only the validation shard is hashed, so that the hash does not depend on `num_files`.
    return Source(source, tuple(train), (val,), _fingerprint([val]))


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
        manifest = {"source": name, "hash": digest.hexdigest(), "documents": counts, **notes}
        (tmp / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        try:
            tmp.rename(target)
        except OSError:  # another process may already have written the same corpus
            if not (target / "manifest.json").exists():
                raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return _open_built(target)


def _open_built(folder: Path) -> Source:
    """Opens the corpus that `_build` wrote into `folder`."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    train, val = (tuple(sorted(folder.glob(f"{split}_*.parquet"))) for split in ("train", "val"))
    return Source(manifest["source"], train, val, manifest["hash"])


def _open_local() -> Source:
    """Returns the corpus of installed documentation. The first call builds it. Later calls reuse it, even if other
    packages are installed by then."""
    folder = config.base_dir() / "data" / "local"
    if (folder / "manifest.json").exists():
        return _open_built(folder)
    print("building the local corpus from installed documentation (once, under a minute)", flush=True)
    train, val, versions = local_corpus.build(local_corpus.PACKAGES)
    source = _build(folder, "local", train, val, row_group=256, versions=versions)
    chars = sum(map(len, train)) / 1e6
    print(f"local corpus: {chars:.1f}M characters in {len(train):,} documents, {folder}", flush=True)
    return source


def _open_folder(folder: Path) -> Source:
    """Returns the corpus in a user's folder. The last file is the validation set. If there is only one file, the last
    1% of its documents are the validation set.

    A folder of two or more parquet files is read in place. In all other cases, the first call converts the files to
    parquet and shuffles the training documents.
    """
    if not folder.is_dir():
        reason = "this is a file; give the folder it is in" if folder.exists() else "no such folder"
        raise UserError(f"--data_dir={folder}: {reason}")
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name.endswith(SUFFIXES) and p.name[0] != ".")
    if not files:
        raise UserError(f"--data_dir={folder}: no files ending in {', '.join(SUFFIXES)}")
    if len(files) > 1 and all(p.suffix == ".parquet" for p in files):
        for path in files:
            with parquet.open(path) as file:
                if not file.metadata.num_rows:
                    raise UserError(f"{path}: no documents")
        return Source(folder.name, tuple(files[:-1]), tuple(files[-1:]), _fingerprint(files))
    stamps = [f"{p}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files]
    key = hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:8]
    target = config.base_dir() / "data" / f"{folder.name}-{key}"
    if (target / "manifest.json").exists():
        return _open_built(target)
    print(f"converting {len(files)} files in {folder} to parquet (once)", flush=True)
    counts = Counter()
    train, val = _split_files(files, counts)
    notes = {"files": [p.name for p in files], "met": counts}
    source = _build(target, folder.name, shuffled(train), val, parquet.ROW_GROUP, **notes)
    summary = ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items()))
    print(f"{folder.name}: {summary}; {target}", flush=True)
    return source


def _split_files(files: list[Path], counts: Counter[str]) -> tuple[Iterator[str], Iterator[str]]:
    """Returns the training documents and the validation documents. Updates `counts` as `text_files.documents` does."""
    lengths = {}
    for path in files:
        lengths[path] = sum(1 for _ in documents(path, counts))
        if not lengths[path]:
            raise UserError(f"{path}: no documents")
    if len(files) > 1:
        return (text for path in files[:-1] for text in documents(path)), documents(files[-1])
    [(path, length)] = lengths.items()
    if length < 2:
        raise UserError(f"{path}: one document cannot be both the training and the validation set; add a file")
    first_val = length - max(1, length // 100)
    train = (text for i, text in enumerate(documents(path)) if i < first_val)
    return train, (text for i, text in enumerate(documents(path)) if i >= first_val)


def _fingerprint(files: list[Path]) -> str:
    """Returns the SHA-256 (hex) of the files' names and sizes."""
    lines = [f"{p.name}:{p.stat().st_size}" for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
