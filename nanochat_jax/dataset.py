"""Where pretraining text comes from, always as parquet files with one string column `text`.

`open()` gives a Source: the training files in order, and the validation files, which are never trained on. Named
sources are downloaded from the Hugging Face hub by `python -m nanochat_jax.dataset -n 240`; "local" is a small corpus
made of the documentation installed with Python; any other folder of parquet, jsonl or txt files works too.
"""

import gzip
import hashlib
import json
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax import commandline, config, docstrings
from nanochat_jax.config import UserError
from nanochat_jax.files import write_text
from nanochat_jax.progress import Progress

# name: (hub repository, number of its last shard). That last shard is the validation set, whatever else is on disk.
HUB = {
    "fineweb-edu": ("karpathy/fineweb-edu-100b-shuffle", 1822),
    "climbmix": ("karpathy/climbmix-400b-shuffle", 6542),
}
# What the local corpus is made of besides the standard library: the core dependencies and what they depend on.
PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy", "scipy", "ml_dtypes", "tensorstore", "tiktoken",
    "pyarrow", "huggingface_hub", "safetensors", "rich", "pygments", "tyro", "regex", "requests", "urllib3", "httpx",
    "fsspec", "tqdm", "absl", "etils", "opt_einsum", "treescope", "humanize", "yaml", "msgpack", "filelock",
)  # fmt: skip
ROW_GROUP = 1024  # documents; the unit that is read and tokenized at once
SHARD_CHARS = 250_000_000  # about 100 MB of zstd
SHUFFLE_CHARS = 1_000_000_000  # converted text is shuffled in windows of this size, which bounds the memory
ATTEMPTS = 4
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
            with parquet(path) as file:
                for i in range(file.num_row_groups):
                    yield from read_row_group(file, path, i)


def open(source: str | None = None, data_dir: str | Path | None = None) -> Source:
    """The corpus called `source`, or the one in the folder `data_dir`. With neither, the one the tokenizer was trained
    on, so that all stages read the same text; before there is a tokenizer, "local"."""
    recorded = config.base_dir() / "tokenizer" / "source.json"
    if not source and not data_dir and recorded.exists():
        record = json.loads(recorded.read_text(encoding="utf-8"))
        source, data_dir = record.get("source"), record.get("data_dir")
    if data_dir:
        return _open_folder(Path(data_dir).expanduser().resolve())
    source = source or "local"
    if source == "local":
        return _open_local()
    if source not in HUB:
        raise UserError(f"--data={source}: unknown source, expected {', '.join(HUB)} or local (or give --data_dir)")
    return _open_hub(source)


# -----------------------------------------------------------------------------
# Parquet


def parquet(path: Path):
    """An open pyarrow ParquetFile with a column `text`. UserError names the file that is broken or has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file ({_first_line(error)})") from error
    if "text" not in file.schema_arrow.names:
        raise UserError(f"{path}: no column 'text', it has {', '.join(file.schema_arrow.names) or 'none'}")
    return file


def read_row_group(file, path: Path, index: int) -> list[str]:
    """The non-empty documents of one row group of an open parquet file."""
    import pyarrow as pa

    try:
        column = file.read_row_group(index, columns=["text"]).column("text").cast(pa.string())
        return [text for text in column.to_pylist() if text]
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"{path}: row group {index} cannot be read ({_first_line(error)})") from error


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
    times = [0.0]
    for path in folder.rglob("*"):
        try:
            times.append(path.stat().st_mtime)
        except FileNotFoundError:  # a temporary file that was renamed meanwhile
            continue
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
    train, val, versions = docstrings.corpus(PACKAGES)
    source = _build(folder, "local", train, val, row_group=256, versions=versions)
    chars = sum(map(len, train)) / 1e6
    print(f"local corpus: {chars:.1f}M characters in {len(train):,} documents, {folder}", flush=True)
    return source


def _open_folder(folder: Path) -> Source:
    """A folder of the user's. Its last file is the validation set, or the last 1% of the documents of a single file.
    Several parquet files are read where they are; anything else is converted and shuffled once."""
    if not folder.is_dir():
        raise UserError(f"--data_dir={folder}: no such folder")
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
    train, val = _split_files(files)
    return _build(target, folder.name, _shuffled(train), val, ROW_GROUP, files=[p.name for p in files])


def _split_files(files: list[Path]) -> tuple[Iterator[str], Iterator[str]]:
    """Training and validation documents of files in any format."""
    counts = {path: sum(1 for _ in documents(path)) for path in files}
    for path, count in counts.items():
        if not count:
            raise UserError(f"{path}: no documents")
    if len(files) > 1:
        return (text for path in files[:-1] for text in documents(path)), documents(files[-1])
    [(path, count)] = counts.items()
    if count < 2:
        raise UserError(f"{path}: one document cannot be both training and validation set; add another file")
    first_val = count - max(1, count // 100)
    train = (text for i, text in enumerate(documents(path)) if i < first_val)
    return train, (text for i, text in enumerate(documents(path)) if i >= first_val)


def documents(path: Path) -> Iterator[str]:
    """Non-empty documents of one file. UserError names the file and line that cannot be read."""
    if path.suffix == ".parquet":
        with parquet(path) as file:
            for i in range(file.num_row_groups):
                yield from read_row_group(file, path, i)
        return
    try:
        if path.suffix == ".txt":
            yield from _paragraphs(path.read_text(encoding="utf-8"))
            return
        opener = gzip.open if path.suffix == ".gz" else Path.open
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    text = _json_text(line, f"{path}, line {number}")
                    if text:
                        yield text
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)})") from error


def _json_text(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
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


# -----------------------------------------------------------------------------
# The hub


def _open_hub(source: str) -> Source:
    """What `download` was asked for, arrived or not, so that the order never depends on what has arrived."""
    folder = config.base_dir() / "data" / source
    command = f"python -m nanochat_jax.dataset --data {source} -n 8"
    val = folder / _shard(HUB[source][1])
    if not val.exists():
        raise UserError(f"{source}: no validation shard {val}; run {command}")
    manifest = folder / "manifest.json"
    if manifest.exists():
        count = json.loads(manifest.read_text(encoding="utf-8"))["shards"]
        train = tuple(folder / _shard(i) for i in range(count))
    else:
        train = tuple(p for p in sorted(folder.glob("shard_*.parquet")) if p != val)
    if not train:
        raise UserError(f"{source}: no training shards in {folder}; run {command}")
    return Source(source, train, (val,), _fingerprint([val]))  # the same source however many shards of it are here


def download(source: str, num_files: int = -1, workers: int = 4) -> None:
    """Fetches the validation shard and the first `num_files` training shards (-1: all) into the data folder; what is
    there already is kept, what was interrupted goes on. UserError if any shard failed. Mirrors, tokens and offline
    mode are huggingface_hub's: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE."""
    if source not in HUB:
        raise UserError(f"--data={source}: unknown source, expected {' or '.join(HUB)}")
    last = HUB[source][1]
    if num_files > last or num_files == 0 or num_files < -1 or workers < 1:
        raise UserError(f"-n {num_files} -w {workers}: expected 1 to {last} shards (-1: all) and at least one worker")
    count = last if num_files == -1 else num_files
    folder = config.base_dir() / "data" / source
    folder.mkdir(parents=True, exist_ok=True)

    # The validation shard comes first and alone: it is needed whatever happens, and where the hub cannot be reached
    # this says so after one round of retries instead of one for every shard.
    if failure := _fetch(source, last, folder):
        raise UserError(f"{HUB[source][0]}: {failure}")
    _record_shards(folder / "manifest.json", source, count)
    missing = [i for i in range(count) if not (folder / _shard(i)).exists()]
    failures = _fetch_all(source, missing, folder, workers)
    if failures:
        left = sum(not (folder / _shard(i)).exists() for i in range(count))
        raise UserError(f"{left} of {count} shards missing, the first because {failures[0]}; run it again to resume")
    print(f"{source}: {count} training shards and the validation shard in {folder}")


def _fetch_all(source: str, shards: list[int], folder: Path, workers: int) -> list[str]:
    """Downloads in parallel. Returns what went wrong."""
    failures, fetched = [], 0
    pool = ThreadPoolExecutor(workers)
    try:
        with Progress(f"{source}, shards", len(shards)) as progress:
            futures = {pool.submit(_fetch, source, i, folder): i for i in shards}
            for done, future in enumerate(as_completed(futures), 1):
                if failure := future.result():
                    failures.append(failure)
                    if len(failures) >= 2 * workers:  # it is not about single shards: leave the rest for the next run
                        pool.shutdown(wait=False, cancel_futures=True)
                        break
                else:
                    fetched += (folder / _shard(futures[future])).stat().st_size
                progress.reach(done, f"{fetched / 1e6 / progress.seconds:.1f} MB/s")
        pool.shutdown()
    except KeyboardInterrupt:
        # Threads inside a transfer cannot be told to stop; partial files are resumed next time, so leave at once.
        print("stopped; run it again to resume", file=sys.stderr, flush=True)
        os._exit(130)
    return failures


def _fetch(source: str, index: int, folder: Path) -> str:
    """Downloads one shard if it is not there. Returns "" or, in one line, why it failed."""
    from huggingface_hub import errors, hf_hub_download
    from huggingface_hub.utils import disable_progress_bars, logging

    if (folder / _shard(index)).exists():
        return ""
    disable_progress_bars()  # ours counts shards
    logging.set_verbosity_error()
    for attempt in range(ATTEMPTS):
        try:
            hf_hub_download(HUB[source][0], _shard(index), repo_type="dataset", local_dir=folder)
            return ""
        except Exception as error:  # its own, httpx's, OSError: each ends as a line and an exit code
            reason = f"{_shard(index)}: {_first_line(error)}"
            # A hub that cannot be reached has been retried inside for 23 s by now (LocalEntryNotFoundError, which is an
            # EntryNotFoundError too); a file that does not exist, or offline mode, will not change.
            final = errors.EntryNotFoundError, errors.RepositoryNotFoundError, errors.OfflineModeIsEnabled
            if isinstance(error, final):
                return reason
        if attempt + 1 < ATTEMPTS:
            time.sleep(2**attempt)
    return reason


def _record_shards(manifest: Path, source: str, count: int) -> None:
    """Remembers how many shards were asked for; a smaller later request takes nothing away."""
    if manifest.exists():
        count = max(count, json.loads(manifest.read_text(encoding="utf-8"))["shards"])
    write_text(manifest, json.dumps({"source": source, "repo": HUB[source][0], "shards": count}) + "\n")


def _shard(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def _fingerprint(files: list[Path], names: Iterable[str] = ()) -> str:
    lines = [f"{p.name}:{p.stat().st_size}" for p in files] + list(names)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main(cfg: config.Dataset) -> None:
    """Downloads, builds or converts, so that training finds the text ready."""
    if cfg.data_dir or cfg.data == "local":
        source = open(cfg.data, cfg.data_dir or None)
        print(f"{source.name}: {len(source.train_files)} training and {len(source.val_files)} validation files")
        return
    download(cfg.data, cfg.num_files, cfg.num_workers)


if __name__ == "__main__":
    commandline.run(main, config.Dataset)
