"""Batches for training and validation: documents -> tokens -> packed rows -> batches, as Grain pipelines.

Everything is deterministic for a seed and has an exact state. The order of examples depends on the number of rows of
the global batch alone: each process packs the whole batch and keeps its own contiguous rows, so one state serves all
processes, and any number of them may go on from it. Reading, tokenizing and packing run ahead in a thread.
"""

import math
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import grain
import numpy as np

from nanochat_jax.config import UserError
from nanochat_jax.data import packing, parquet, token_cache

TOKENIZE_AT_ONCE = 128  # documents; the tokenizer spreads them over threads
CHARS_AT_ONCE = 2_000_000  # but not more than this: what waits to be packed is part of the state
RENDER_AT_ONCE = 16  # conversations
PREFETCH = 4  # batches
NO_LIMIT = 1 << 30  # tokens of a conversation that is not to be cut
Cursor = dict[str, Any]
Batch = dict[str, np.ndarray]


class Loader:
    """Iterator over batches dict(inputs int32[b, T], targets int32[b, T], -1 = not counted) of this process's rows.

    `info` tells of the last batch: epoch, progress (epochs done, as a fraction), waste, and where it was read.
    `state()` is JSON-able and belongs to the batch handed out last, whatever the thread has prepared since.
    """

    def __init__(self, batches: "Batches"):
        self.info: dict[str, Any] = {}
        # Closed and let go at exit, or when the loader is dropped: what Grain finds to close while the interpreter is
        # already being taken down, it complains about.
        self._held = [iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=PREFETCH))]
        self._finalizer = weakref.finalize(self, _close, self._held, batches.stop)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.info = batch.pop("info")
        return batch

    def state(self) -> dict[str, Any]:
        return self._batches.get_state()

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on after the batch that `state` belongs to. UserError if it is of other rows than these."""
        self._batches.set_state(state)

    def close(self) -> None:
        """Ends the thread; may be called twice."""
        self._finalizer()

    @property
    def _batches(self) -> grain.DatasetIterator:
        if not self._held:
            raise ValueError("the loader is closed")
        return self._held[0]


def _close(held: list[grain.DatasetIterator], stop: threading.Event) -> None:
    stop.set()
    held.pop().close()


def base_loader(
    files: Sequence[Path], tokenizer, rows: int, seq_len: int, *, packing: str = "split", seed: int = 0,
    epochs: int | None = None, cache_dir: Path | None = None, process_index: int = 0, process_count: int = 1,
) -> Loader:  # fmt: skip
    """Pretraining batches from parquet files: `rows` rows of the global batch, of which this process gets its share.
    Ends after `epochs` passes, the last batch filled up with rows without targets; None: never. Files that have a twin
    in the folder `twins` (see tokenized.py) are not tokenized again; the batches are the same."""
    documents = Documents(files, tokenizer, seed, epochs, cache_dir)
    return Loader(Batches(documents, packing, rows, seq_len, process_index, process_count))


def val_batches(
    files: Sequence[Path], tokenizer, rows: int, seq_len: int, num_tokens: int | None, *, packing: str = "split",
    cache_dir: Path | None = None, process_index: int = 0, process_count: int = 1,
) -> Loader:  # fmt: skip
    """The first `num_tokens` tokens (rounded down to rows; at least one; None: all) of the files, the same ones in the
    same rows whatever `rows` is. The last batch is filled up with rows without targets."""
    documents = Documents(files, tokenizer, None, 1, cache_dir)
    max_rows = None if num_tokens is None else max(1, num_tokens // seq_len)
    return Loader(Batches(documents, packing, rows, seq_len, process_index, process_count, max_rows))


def chat_loader(
    task, tokenizer, rows: int, seq_len: int, *, supervise: str = "all", epochs: int | None = None, seed: int = 0,
    max_rows: int | None = None, padding: int = 0, process_index: int = 0, process_count: int = 1,
) -> Loader:  # fmt: skip
    """Batches of conversations, shuffled anew each epoch. supervise="all" (midtraining): split packing, loss on every
    token. "mask" (finetuning): conversations whole, cut only if longer than a row, loss on the assistant's tokens; a
    conversation without any is skipped. `info` counts those `truncated` and `skipped`. `max_rows` ends it early.
    `padding` rows without targets follow the `rows` of every batch, for devices that those do not divide over."""
    assert supervise in ("all", "mask"), f"supervise {supervise!r}, expected all or mask"
    conversations = Conversations(task, tokenizer, seq_len + 1 if supervise == "mask" else None, seed, epochs)
    method = "whole" if supervise == "mask" else "split"
    return Loader(Batches(conversations, method, rows, seq_len, process_index, process_count, max_rows, padding))


def mean_tokens(task, tokenizer, sample: int = 500) -> float:
    """Mean length of a task's conversations in tokens, estimated from `sample` of them, evenly spaced."""
    if not len(task):
        raise UserError("the task has no conversations")
    indices = np.unique(np.linspace(0, len(task) - 1, min(sample, len(task))).astype(int))
    return float(np.mean([len(tokenizer.render_conversation(task[int(i)], max_tokens=NO_LIMIT)[0]) for i in indices]))


def epoch_tokens(files: Sequence[Path], tokenizer, cache_dir: Path | None = None, sample: int = 256) -> float:
    """About how many tokens the files hold: as many a file as in those of the first eight that have a twin, else as the
    tokens a byte of the first documents times the bytes of eight files that are here. NaN while none is here."""
    counts = []
    for path in files[:8]:
        if cached := token_cache.find(path, cache_dir):
            counts.append(len(cached.tokens) + len(cached.chars))  # with a BOS a document
            cached.close()
    if counts:
        return float(np.mean(counts)) * len(files)
    sizes = {path: parquet.text_bytes(path) for path in [path for path in files if path.exists()][:8]}
    first = next((path for path, groups in sizes.items() if groups), None)
    if first is None:
        return math.nan
    with parquet.open(first) as file:
        texts = parquet.read_row_group(file, first, 0)
    tokens, _ = tokenizer.encode_batch(texts[:sample], prepend=tokenizer.bos)
    share = sum(map(len, texts[:sample])) / max(1, sum(map(len, texts)))
    ratio = len(tokens) / max(1.0, share * sizes[first][0])
    return ratio * sum(map(sum, sizes.values())) / len(sizes) * len(files)


# -----------------------------------------------------------------------------
# Where documents come from. A cursor says what to read next; `read` gives the documents there and the next cursor.


class Documents:
    """Tokenized documents of parquet files. In the first epoch the files come in their order, since the later ones may
    still be on their way, in later epochs shuffled; the row groups of a file are shuffled always. seed None: never."""

    start: ClassVar[Cursor] = {"epoch": 0, "file": 0, "row_group": 0, "document": 0, "skipped": 0}

    def __init__(
        self, files: Sequence[Path], tokenizer, seed: int | None, epochs: int | None, cache_dir: Path | None = None
    ):  # fmt: skip
        assert len(files), "no files to read"
        self.files, self.tokenizer, self.seed, self.epochs = list(files), tokenizer, seed, epochs
        self.cache_dir = cache_dir
        self.bos = tokenizer.bos
        self.stop = threading.Event()
        self._path, self._file = None, None
        self._group, self._docs, self._chars = None, [], []

    def read(self, cursor: Cursor) -> tuple[list[np.ndarray], Cursor] | None:
        """None at the end. Reads one row group at a time and tokenizes it in pieces."""
        epoch, file, row_group, first = (cursor[k] for k in ("epoch", "file", "row_group", "document"))
        if epoch == self.epochs:
            return None
        num_groups = self._open(self._nth_file(epoch, file))
        if num_groups:
            self._read(int(self._shuffled(num_groups, epoch, 1 + file)[row_group]))
        chars = np.cumsum(self._chars[first : first + TOKENIZE_AT_ONCE]) if num_groups else []
        last = first + max(1, int(np.searchsorted(chars, CHARS_AT_ONCE, side="right")))
        docs = self._tokens(self._docs[first:last]) if num_groups else []
        usable = [ids for ids in docs if len(ids) > 1]
        skipped = cursor.get("skipped", 0) + len(docs) - len(usable)

        if not num_groups or last >= len(self._docs):
            row_group, last = row_group + 1, 0
        if row_group >= num_groups:
            file, row_group = file + 1, 0
        if file == len(self.files):
            epoch, file = epoch + 1, 0
        following = {"epoch": epoch, "file": file, "row_group": row_group, "document": last}
        return usable, following | {"skipped": skipped}

    def info(self, cursor: Cursor, waiting: int) -> dict[str, Any]:
        """Where a cursor stands."""
        epoch, file = cursor["epoch"], cursor["file"]
        done = epoch == self.epochs
        num_groups = 1 if done else self._open(self._nth_file(epoch, file)) if cursor["row_group"] else 1
        progress = epoch + (file + cursor["row_group"] / max(1, num_groups)) / len(self.files)
        shard = len(self.files) if done else self._nth(epoch, file)
        place = {"epoch": epoch, "shard": shard, "row_group": cursor["row_group"], "progress": progress}
        return place | {"skipped": cursor.get("skipped", 0)}

    def _nth(self, epoch: int, i: int) -> int:
        return int(self._shuffled(len(self.files), epoch, 0)[i]) if epoch else i

    def _nth_file(self, epoch: int, i: int) -> Path:
        return self.files[self._nth(epoch, i)]

    def _shuffled(self, n: int, epoch: int, what: int) -> np.ndarray:
        return np.arange(n) if self.seed is None else np.random.default_rng([self.seed, epoch, what]).permutation(n)

    def _open(self, path: Path) -> int:
        """Opens a file, waiting for it if it is still on its way; the number of its row groups."""
        if path != self._path:
            file = token_cache.find(path, self.cache_dir)
            if file is None:
                parquet.wait_for(path, self.stop)
                file = parquet.open(path)
            if self._file is not None:
                self._file.close()
            self._path, self._file, self._group = path, file, None
        return self._file.num_row_groups

    def _read(self, index: int) -> None:
        """Makes a row group of the open file the one that documents are taken from."""
        if index == self._group:
            return
        if isinstance(self._file, token_cache.TokenCache):
            self._docs, self._chars = self._file.read(index)
        else:
            self._docs = parquet.read_row_group(self._file, self._path, index)
            self._chars = [len(text) for text in self._docs]
        self._group = index

    def _tokens(self, docs: list[str] | list[np.ndarray]) -> list[np.ndarray]:
        """Texts, or tokens without BOS, as documents."""
        if isinstance(self._file, token_cache.TokenCache):
            return [packing.document(np.concatenate([[self.bos], ids])) for ids in docs]
        tokens, offsets = self.tokenizer.encode_batch(docs, prepend=self.bos)
        return [packing.document(ids) for ids in np.split(tokens, offsets[1:-1])]


class Conversations:
    """Rendered conversations of a task, shuffled in every epoch. With `max_tokens` they are cut there and carry their
    mask; without, they are whole and every token is a target."""

    start: ClassVar[Cursor] = {"epoch": 0, "position": 0, "truncated": 0, "skipped": 0}

    def __init__(self, task, tokenizer, max_tokens: int | None, seed: int, epochs: int | None):
        if not len(task):
            raise UserError("the task has no conversations")
        self.task, self.tokenizer, self.max_tokens, self.seed, self.epochs = task, tokenizer, max_tokens, seed, epochs
        self.bos = tokenizer.bos
        self.stop = threading.Event()
        self._epoch, self._order = -1, None

    def read(self, cursor: Cursor) -> tuple[list[np.ndarray], Cursor] | None:
        """None at the end."""
        epoch, first = cursor["epoch"], cursor["position"]
        if epoch == self.epochs:
            return None
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.task))
        docs, truncated, skipped = [], cursor["truncated"], cursor["skipped"]
        for i in self._order[first : first + RENDER_AT_ONCE]:
            # One token more than fits is asked for, which tells a conversation that was cut from one that just fits.
            limit = NO_LIMIT if self.max_tokens is None else self.max_tokens + 1
            ids, mask = self.tokenizer.render_conversation(self.task[int(i)], max_tokens=limit)
            if self.max_tokens is None:
                docs.append(packing.document(ids))
                continue
            truncated += len(ids) > self.max_tokens
            ids, mask = ids[: self.max_tokens], mask[: self.max_tokens]
            if any(mask):
                docs.append(packing.document(ids, mask))
            else:
                skipped += 1
        position = first + RENDER_AT_ONCE
        epoch, position = (epoch + 1, 0) if position >= len(self.task) else (epoch, position)
        return docs, {"epoch": epoch, "position": position, "truncated": truncated, "skipped": skipped}

    def info(self, cursor: Cursor, waiting: int) -> dict[str, Any]:
        """Where a cursor stands. Conversations that wait to be placed are not progress, or the learning rate of a small
        task would end before its training does."""
        consumed = cursor["epoch"] * len(self.task) + cursor["position"] - waiting
        counts = {k: cursor[k] for k in ("epoch", "truncated", "skipped")}
        return {**counts, "shard": None, "row_group": None, "progress": max(0, consumed) / len(self.task)}


# -----------------------------------------------------------------------------
# Batches of packed rows


class Batches(grain.IterDataset):
    """Documents packed into batches; see Loader for what they are."""

    def __init__(
        self, documents: Documents | Conversations, method: str, rows: int, seq_len: int, process_index: int = 0,
        process_count: int = 1, max_rows: int | None = None, padding: int = 0,
    ):  # fmt: skip
        super().__init__()
        assert method in ("stream", *packing.CHOICE), f"packing {method!r}"
        padded = rows + padding
        if rows < 1 or padded % process_count:
            raise UserError(f"a batch of {padded} rows cannot be shared by {process_count} processes: use a multiple")
        share = padded // process_count
        self.mine = slice(process_index * share, (process_index + 1) * share)
        self.documents, self.method, self.rows, self.max_rows = documents, method, rows, max_rows
        self.padded = padded
        self.width = seq_len + 1
        self.stop = documents.stop

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)


class BatchIterator(grain.DatasetIterator):
    """One pass over Batches; not thread-safe, as Grain's iterators are."""

    def __init__(self, batches: Batches):
        super().__init__()
        self._of = batches
        bos = batches.documents.bos
        stream = batches.method == "stream"
        self._packer = (
            packing.Stream(batches.width, bos) if stream else packing.BestFit(batches.method, batches.width, bos)
        )
        self._cursor = dict(batches.documents.start)
        self._rows = 0  # handed out so far

    def __next__(self) -> dict[str, Any]:
        rows = []
        while len(rows) < self._of.rows and (row := self._row()) is not None:
            rows.append(row)
        if not rows:
            raise StopIteration
        empty = packing.padding(self._of.width, self._of.documents.bos)
        rows += [empty] * (self._of.padded - len(rows))
        info = self._of.documents.info(self._cursor, len(self._packer))
        return packing.as_batch(np.stack(rows[self._of.mine])) | {"info": info | {"waste": self._packer.waste}}

    def _row(self) -> np.ndarray | None:
        if self._rows == self._of.max_rows:
            return None
        start = self._cursor["epoch"]
        while self._packer.hungry:
            if (found := self._of.documents.read(self._cursor)) is None:
                break
            documents, self._cursor = found
            for document in documents:
                self._packer.add(document)
            if not len(self._packer) and self._cursor["epoch"] > start + 1:
                break  # or an endless loader of nothing would search forever
        if not len(self._packer):
            if not self._rows:
                raise UserError("nothing to train on: every document is empty, or has no token to learn from")
            return None
        self._rows += 1
        return self._packer.row()

    def get_state(self) -> dict[str, Any]:
        kind = {"packing": self._of.method, "width": self._of.width}
        return {**kind, "rows": self._rows, "cursor": dict(self._cursor), "packer": self._packer.state()}

    def set_state(self, state: dict[str, Any]) -> None:
        for key, here in (("packing", self._of.method), ("width", self._of.width)):
            if state.get(key) != here:
                raise UserError(f"the saved data position has {key} {state.get(key)}, this run {here}: keep the first")
        self._cursor, self._rows = dict(state["cursor"]), state["rows"]
        self._packer.restore(state["packer"])
