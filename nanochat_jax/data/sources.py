"""Finds the pretraining text. In: a source's name or a folder. Out: a Source, with training and validation files.

    python -m nanochat_jax.dataset -n 240    downloads a named source from the Hugging Face hub (hub.py)
    --data=local                             a small corpus made of the documentation installed with Python
    --data_dir=FOLDER                        a folder of parquet, jsonl or txt files

Every file has one string column `text`. The validation files are never trained on.
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
    """A corpus on disk. `hash` identifies its contents. If this module wrote the files, the hash covers the whole text.
    Otherwise it covers only the names and sizes of files, since parquet files that are read in place may be too large
    to read twice."""

    name: str
    train_files: tuple[Path, ...]
    val_files: tuple[Path, ...]
    hash: str

    def texts(self, split: str) -> Iterator[str]:
        """The documents of "train" or "val" in file order, as plain text. Waits for shards that are still arriving."""
        for path in {"train": self.train_files, "val": self.val_files}[split]:
            hub.wait_for_shard(path)
            yield from filter(None, parquet.texts_of(path))

    def val_hash(self) -> str:
        """SHA-256 (hex) of the validation files. Runs with the same hash have comparable scores."""
        digest = hashlib.sha256()
        for path in self.val_files:
            digest.update(bytes.fromhex(sha256(path)))
        return digest.hexdigest()


def open(source: str | None = None, data_dir: str | Path | None = None, num_files: int = -1) -> Source:
    """The corpus named `source`, or the corpus in `data_dir`. Raises UserError if the corpus is missing or unusable.

    If neither is given, the function opens the corpus that the tokenizer was trained on, so that all stages read the
    same text. If there is no tokenizer yet, it opens the local corpus. Of a source on the hub, only the first
    `num_files` training shards are used (-1: all shards that were requested), and these may still be downloading. Like
    gzip.open, the function is called through its module: sources.open(cfg.data).
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
    return Source(source, tuple(train), (val,), _fingerprint([val]))  # the hash is the same for every num_files


# -----------------------------------------------------------------------------
# Corpora that are written here: the local one, and folders in other formats


def _build(target: Path, name: str, train: Iterable[str], val: Iterable[str], row_group: int, **notes: Any) -> Source:
    """Writes the texts as shards and a manifest into the folder `target`, which appears complete or not at all."""
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
        except OSError:  # another process has written the same corpus in the meantime
            if not (target / "manifest.json").exists():
                raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return _open_built(target)


def _open_built(folder: Path) -> Source:
    """The corpus that `_build` wrote into `folder`."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    train, val = (tuple(sorted(folder.glob(f"{split}_*.parquet"))) for split in ("train", "val"))
    return Source(manifest["source"], train, val, manifest["hash"])


def _open_local() -> Source:
    """The corpus of installed documentation, built on the first call and kept: later installs do not change it."""
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
    """The corpus in a user's folder. Its last file is the validation set; if there is only one file, the validation set
    is the last 1% of its documents. Several parquet files are read in place; anything else is converted and shuffled
    once."""
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
    """Training and validation documents of files in any format. `counts` is updated by `text_files.documents`."""
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
    """SHA-256 (hex) of the files' names and sizes."""
    lines = [f"{p.name}:{p.stat().st_size}" for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
