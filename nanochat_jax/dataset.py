"""Where pretraining text comes from, always as parquet files with one string column `text`.

`open()` gives a Source: the training files in order, and the validation files, which are never trained on. Named
sources are downloaded from the Hugging Face hub by `python -m nanochat_jax.dataset -n 240`; "local" is a small corpus
made of the documentation installed with Python; any other folder of parquet, jsonl or txt files works too.
"""

import contextlib
import gzip
import hashlib
import json
import os
import random
import shutil
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax import commandline, config
from nanochat_jax.config import UserError
from nanochat_jax.data import hub, local_corpus
from nanochat_jax.data.hub import first_line
from nanochat_jax.files import sha256

# What the local corpus is made of besides the standard library: the core dependencies and what they depend on.
PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy", "scipy", "ml_dtypes", "tensorstore", "tiktoken",
    "pyarrow", "huggingface_hub", "safetensors", "rich", "pygments", "regex", "requests", "urllib3",
    "fsspec", "tqdm", "absl", "etils", "opt_einsum", "treescope", "humanize", "yaml", "msgpack", "filelock",
)  # fmt: skip
ROW_GROUP = 1024  # documents; the unit that is read and tokenized at once
SHARD_CHARS = 250_000_000  # about 100 MB of zstd
SHUFFLE_CHARS = 1_000_000_000  # converted text is shuffled in windows of this size, which bounds the memory
MAX_CHARS = 1_000_000  # of a document; longer ones are cut, since one is tokenized and packed as a whole
MEND = "a downloaded file is fetched again by python -m nanochat_jax.dataset --verify"
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".txt")


@dataclass(frozen=True)
class Source:
    """A corpus on disk. `hash` changes with its contents (hub shards, too big to read twice: names and sizes)."""

    name: str
    train_files: tuple[Path, ...]
    val_files: tuple[Path, ...]
    hash: str

    def texts(self, split: str) -> Iterator[str]:
        """Documents of "train" or "val" in file order, without end markers. Waits for shards still on their way."""
        for path in {"train": self.train_files, "val": self.val_files}[split]:
            wait_for(path)
            yield from filter(None, texts_of(path))

    def val_hash(self) -> str:
        """SHA-256 of the validation files: scores of runs are comparable where it is the same."""
        digest = hashlib.sha256()
        for path in self.val_files:
            digest.update(bytes.fromhex(sha256(path)))
        return digest.hexdigest()


def open(source: str | None = None, data_dir: str | Path | None = None, num_files: int = -1) -> Source:
    """The corpus called `source`, or the one in the folder `data_dir`. With neither, the one the tokenizer was trained
    on, so that all stages read the same text; before there is a tokenizer, "local". Of a source on the hub the first
    `num_files` training shards (-1: all that were asked for), which may still be on their way."""
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
    return Source(source, tuple(train), (val,), _fingerprint([val]))  # the same however many shards of it are here


# -----------------------------------------------------------------------------
# Parquet


def parquet(path: Path):
    """A pyarrow ParquetFile with a column `text` of strings. UserError names the file that is broken or has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file ({first_line(error)}); {MEND}") from error
    if "text" not in file.schema_arrow.names:
        raise UserError(f"{path}: no column 'text', it has {', '.join(file.schema_arrow.names) or 'none'}")
    kind = file.schema_arrow.field("text").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(kind) not in TEXT_TYPES:
        raise UserError(f"{path}: the column 'text' holds {kind}, expected string")
    return file


def read_row_group(file, path: Path, index: int) -> list[str]:
    """The documents of one row group of an open parquet file, those that are too long cut into several. "" stands for
    each one that cannot be used: it is empty, or not UTF-8, which is said on stderr. UserError if nothing can be read.
    """
    import pyarrow as pa

    try:
        column = file.read_row_group(index, columns=["text"]).column("text")
        try:
            texts = column.cast(pa.string()).to_pylist()
        except (UnicodeDecodeError, pa.ArrowInvalid):
            texts = [_decoded(data) for data in column.cast(pa.binary()).to_pylist()]
            bad = sum(text is None for text in texts) - column.null_count
            print(f"{path}: row group {index}: {bad} of {len(texts)} documents are not UTF-8, skipped", file=sys.stderr)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: row group {index} cannot be read ({first_line(error)}); {MEND}") from error
    return [piece for text in texts for piece in _pieces(text or "")]


def text_bytes(path: Path) -> list[int]:
    """Bytes of the row groups of a parquet file, uncompressed and with what parquet adds, from its metadata."""
    with parquet(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        columns = [[group.column(i) for i in range(group.num_columns)] for group in groups]
        return [sum(c.total_uncompressed_size for c in of if c.path_in_schema == "text") for of in columns]


def texts_of(path: Path) -> Iterator[str]:
    """All documents of a parquet file, "" for those that cannot be used."""
    with parquet(path) as file:
        for i in range(file.num_row_groups):
            yield from read_row_group(file, path, i)


def _decoded(data: bytes | None) -> str | None:
    try:
        return data and data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _pieces(text: str) -> list[str]:
    """The text in pieces of at most MAX_CHARS, cut after a line or a word where there is one. Nothing is left out."""
    pieces, start = [], 0
    while len(text) - start > MAX_CHARS:
        middle, end = start + MAX_CHARS // 2, start + MAX_CHARS
        cut = text.rfind("\n", middle, end) + 1 or text.rfind(" ", middle, end) + 1 or end
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def wait_for(path: Path, stop: threading.Event | None = None, patience: float = 120.0) -> None:
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


def _write_shards(folder: Path, stem: str, texts: Iterable[str], digest, row_group: int = ROW_GROUP) -> int:
    """Writes <stem>_00000.parquet, ... and feeds `digest` with what they hold. Returns the number of documents."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("text", pa.string())])
    writer, batch, shard, chars, total = None, [], 0, 0, 0

    def flush():
        nonlocal writer, batch, shard
        if writer is None:
            writer = pq.ParquetWriter(
                folder / f"{stem}_{shard:05d}.parquet", schema, compression="zstd", compression_level=3,
                use_dictionary=False, write_statistics=False,
            )  # fmt: skip
            shard += 1
        writer.write_table(pa.table({"text": batch}, schema=schema), row_group_size=row_group)
        batch = []

    try:
        for text in texts:
            data = text.encode("utf-8")
            digest.update(len(data).to_bytes(8, "little") + data)
            batch.append(text)
            chars += len(text)
            total += 1
            if len(batch) == row_group:
                flush()
                if chars >= SHARD_CHARS:
                    writer.close()
                    writer, chars = None, 0
        if batch:
            flush()
    finally:
        if writer is not None:
            writer.close()
    return total


# -----------------------------------------------------------------------------
# Corpora that are made here: the local one, and folders in other formats


def _build(target: Path, name: str, train: Iterable[str], val: Iterable[str], row_group: int, **notes) -> Source:
    """Makes the folder `target` of shards and a manifest, whole or not at all."""
    tmp = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        digest = hashlib.sha256()
        counts = {"val": _write_shards(tmp, "val", val, digest, row_group)}
        counts["train"] = _write_shards(tmp, "train", train, digest, row_group)
        for split, count in counts.items():
            if not count:
                raise UserError(f"{name}: no documents to use for {split}; give more text")
        manifest = {"source": name, "hash": digest.hexdigest(), "documents": counts, **notes}
        (tmp / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        try:
            tmp.rename(target)
        except OSError:  # another process was faster; what it made is the same
            if not (target / "manifest.json").exists():
                raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return _open_built(target)


def _open_built(folder: Path) -> Source:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    train, val = (tuple(sorted(folder.glob(f"{split}_*.parquet"))) for split in ("train", "val"))
    return Source(manifest["source"], train, val, manifest["hash"])


def _open_local() -> Source:
    """The corpus of installed documentation, built at the first call and kept: later installs do not change it."""
    folder = config.base_dir() / "data" / "local"
    if (folder / "manifest.json").exists():
        return _open_built(folder)
    print("building the local corpus from installed documentation (once, under a minute)", flush=True)
    train, val, versions = local_corpus.corpus(PACKAGES)
    source = _build(folder, "local", train, val, row_group=256, versions=versions)
    chars = sum(map(len, train)) / 1e6
    print(f"local corpus: {chars:.1f}M characters in {len(train):,} documents, {folder}", flush=True)
    return source


def _open_folder(folder: Path) -> Source:
    """A folder of the user's. Its last file is the validation set, or the last 1% of the documents of a single file.
    Several parquet files are read where they are; anything else is converted and shuffled once."""
    if not folder.is_dir():
        wrong = "a file: name the folder it is in" if folder.exists() else "no such folder"
        raise UserError(f"--data_dir={folder}: {wrong}")
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name.endswith(SUFFIXES) and p.name[0] != ".")
    if not files:
        raise UserError(f"--data_dir={folder}: no files ending in {', '.join(SUFFIXES)}")
    if len(files) > 1 and all(p.suffix == ".parquet" for p in files):
        for path in files:
            with parquet(path) as file:
                if not file.metadata.num_rows:
                    raise UserError(f"{path}: no documents")
        return Source(folder.name, tuple(files[:-1]), tuple(files[-1:]), _fingerprint(files))
    stamps = [f"{p}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files]
    key = hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:8]
    target = config.base_dir() / "data" / f"{folder.name}-{key}"
    if (target / "manifest.json").exists():
        return _open_built(target)
    print(f"converting {len(files)} files of {folder} to parquet (once)", flush=True)
    counts = Counter()
    train, val = _split_files(files, counts)
    notes = {"files": [p.name for p in files], "met": counts}
    source = _build(target, folder.name, _shuffled(train), val, ROW_GROUP, **notes)
    said = ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items()))
    print(f"{folder.name}: {said}; {target}", flush=True)
    return source


def _split_files(files: list[Path], counts: Counter) -> tuple[Iterator[str], Iterator[str]]:
    """Training and validation documents of files in any format; `counts` says what was met."""
    lengths = {}
    for path in files:
        lengths[path] = sum(1 for _ in documents(path, counts))
        if not lengths[path]:
            raise UserError(f"{path}: no documents")
    if len(files) > 1:
        return (text for path in files[:-1] for text in documents(path)), documents(files[-1])
    [(path, length)] = lengths.items()
    if length < 2:
        raise UserError(f"{path}: one document cannot be both training and validation set; add another file")
    first_val = length - max(1, length // 100)
    train = (text for i, text in enumerate(documents(path)) if i < first_val)
    return train, (text for i, text in enumerate(documents(path)) if i >= first_val)


def documents(path: Path, counts: Counter | None = None) -> Iterator[str]:
    """Non-empty documents of one file, long ones in pieces. UserError names the file and line that cannot be read;
    `counts` is told of all others."""
    counts = Counter() if counts is None else counts
    for text in texts_of(path) if path.suffix == ".parquet" else _lines_of(path):
        counts["documents"] += 1
        if not text.strip():
            counts["empty, skipped"] += 1
            continue
        if not text.isascii() and (clean := text.encode("utf-8", "ignore").decode("utf-8")) != text:
            counts["with lone surrogates, which are left out"] += 1
            text = clean
        if len(text) > MAX_CHARS:
            counts[f"longer than {MAX_CHARS:,} characters, cut"] += 1
        yield from _pieces(text)


def _lines_of(path: Path) -> Iterator[str]:
    """Documents of a file that is not parquet."""
    try:
        if path.suffix == ".txt":
            yield from _paragraphs(path.read_text(encoding="utf-8"))
            return
        opener = gzip.open if path.suffix == ".gz" else Path.open
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}, line {number}"
                try:
                    line = line.decode("utf-8").lstrip("\ufeff")
                except UnicodeDecodeError as error:
                    raise UserError(f"{where}: not UTF-8 ({error})") from error
                if line.strip():
                    yield _json_text(line, where)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error


def _json_text(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where}: expected {{"text": "..."}}, got {line.strip()[:60]}')
    return text


def _paragraphs(text: str, size: int = 8000) -> Iterator[str]:
    """Cuts a plain text between paragraphs into documents of about `size` characters: a whole book in one document
    would leave nothing to shuffle."""
    block, length = [], 0
    for paragraph in text.split("\n\n"):
        block.append(paragraph)
        length += len(paragraph) + 2
        if length >= size:
            yield "\n\n".join(block)
            block, length = [], 0
    if "".join(block).strip():
        yield "\n\n".join(block)


def _shuffled(texts: Iterable[str], seed: int = 42) -> Iterator[str]:
    """Training reads shards in order, so documents are mixed here, as the authors of the hub's shards did."""
    rng, window, chars = random.Random(seed), [], 0
    for text in texts:
        window.append(text)
        chars += len(text)
        if chars >= SHUFFLE_CHARS:
            rng.shuffle(window)
            yield from window
            window, chars = [], 0
    rng.shuffle(window)
    yield from window


def _fingerprint(files: list[Path]) -> str:
    lines = [f"{p.name}:{p.stat().st_size}" for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def main(cfg: config.Dataset) -> None:
    """Downloads, builds or converts, so that training finds the text ready."""
    if not cfg.data_dir and cfg.data != "local":
        hub.download(cfg.data, cfg.num_files, cfg.num_workers, cfg.verify)
    source = open(cfg.data, cfg.data_dir or None)
    train, val = len(source.train_files), len(source.val_files)
    print(f"{source.name}: {train} training and {val} validation files in {source.val_files[0].parent}")
    if cfg.tokenize:
        from nanochat_jax.data import token_cache
        from nanochat_jax.tokenizer import Tokenizer

        token_cache.build(source, Tokenizer.load(config.base_dir() / "tokenizer"))


if __name__ == "__main__":
    commandline.run(main, config.Dataset)
