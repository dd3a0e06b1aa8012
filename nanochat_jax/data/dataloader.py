"""Makes batches of inputs and targets for training and validation, from parquet files or from conversations.

The loaders are built on Grain, a data-loading library. The pipeline is: documents -> tokens -> packed rows -> batches.
A background thread prepares the next batches in advance. The same seed always gives the same batches. A saved state
restores the exact position in the data.

Each process packs the whole global batch and keeps its own contiguous rows. The rows of the global batch therefore do
not depend on the number of processes, and a run can resume with another number of processes.
"""

import math
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import grain
import numpy as np

from nanochat_jax.config import UserError
from nanochat_jax.data import hub, packing, parquet, token_cache
from nanochat_jax.tokenizer import NO_LIMIT, Tokenizer

if TYPE_CHECKING:
    import pyarrow.parquet as pq

# The maximum number of characters in one call to the tokenizer. The limit keeps the saved state small, because the
# state contains the documents that have been tokenized but not yet packed.
CHARS_AT_ONCE = 2_000_000
TOKENIZE_AT_ONCE = 128  # the maximum number of documents in one call to the tokenizer
RENDER_AT_ONCE = 16  # the maximum number of conversations in one call to `Conversations.read`
PREFETCH = 4  # the number of batches prepared in advance
Cursor = dict[str, Any]
Batch = dict[str, np.ndarray]


class ChatTask(Protocol):
    """A task, as a loader sees it: a sequence of conversations."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict: ...


class Loader:
    """An iterator over batches {inputs: int32[b, T], targets: int32[b, T]}. The b rows are this process's share of the
    global batch. The loss ignores targets of -1.

    After each batch, `info` holds the position in the data, the progress in epochs (such as 1.5), and the fraction of
    wasted tokens (see packing.py).
    """

    def __init__(self, batches: "Batches"):
        self.info: dict[str, Any] = {}
        # Grain reports errors if an iterator is still open when Python exits. The finalizer therefore closes the
        # iterator at exit, or when the loader is garbage-collected. In a closed loader, `_iterators` is empty.
        self._iterators = [iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=PREFETCH))]
        self._finalizer = weakref.finalize(self, _close, self._iterators, batches.stop)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self.info = batch.pop("info")
        return batch

    def state(self) -> dict[str, Any]:
        """Returns the position after the last batch that the loader returned, in JSON-serializable form.

        Batches that the thread has prepared in advance do not count.
        """
        return self._iterator.get_state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a position that `state()` returned.

        Raises UserError if the position was saved with another packing method or another row width.
        """
        self._iterator.set_state(state)

    def close(self) -> None:
        """Stops the thread. Does nothing if the loader is already closed."""
        self._finalizer()

    @property
    def _iterator(self) -> grain.DatasetIterator:
        if not self._iterators:
            raise ValueError("the loader is closed")
        return self._iterators[0]


def _close(iterators: list[grain.DatasetIterator], stop: threading.Event) -> None:
    stop.set()
    iterators.pop().close()


def base_loader(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    rows: int,
    seq_len: int,
    *,
    packing: str = "split",
    seed: int = 0,
    epochs: int | None = None,
    cache_dir: Path | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Returns a loader of pretraining batches, made from parquet files. A global batch has `rows` rows, which are
    divided equally among the processes.

    The loader stops after `epochs` passes over the files (None: never). The last batch is padded with empty rows, which
    have no targets. Cached tokens in `cache_dir` (see token_cache.py) save time but do not change the batches.
    """
    documents = Documents(files, tokenizer, seed, epochs, cache_dir)
    return Loader(Batches(documents, packing, rows, seq_len, process_index, process_count))


def val_batches(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    rows: int,
    seq_len: int,
    num_tokens: int | None,
    *,
    packing: str = "split",
    cache_dir: Path | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Returns a loader of validation batches, made from one pass over the files. If `num_tokens` is given, the loader
    stops after max(1, num_tokens // seq_len) rows.

    The text does not depend on the batch size `rows`. The last batch is padded with empty rows.
    """
    documents = Documents(files, tokenizer, None, 1, cache_dir)
    max_rows = None if num_tokens is None else max(1, num_tokens // seq_len)
    return Loader(Batches(documents, packing, rows, seq_len, process_index, process_count, max_rows))


def chat_loader(
    task: ChatTask,
    tokenizer: Tokenizer,
    rows: int,
    seq_len: int,
    *,
    supervise: str = "all",
    epochs: int | None = None,
    seed: int | None = 0,
    max_rows: int | None = None,
    padding: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Returns a loader of batches made from a task's conversations. The conversations are reshuffled in each epoch. If
    `seed` is None, they stay in order, except that packing moves some of them a little. Raises UserError if the task
    has no conversations.

    With supervise="all" (midtraining), every token is a target, and packing may split conversations. Nothing is lost.

    With supervise="mask" (finetuning), only the assistant's tokens are targets, and conversations are not split. A
    conversation that is longer than a row is truncated after the last answer that fits, because half an answer teaches
    the model to stop too early. If no answer fits, the conversation is skipped. `info` counts the truncated and the
    skipped conversations.

    The loader stops after `epochs` epochs or after `max_rows` rows (None: no limit). Each batch of `rows` rows gets
    `padding` additional empty rows, so that it divides evenly among the devices.
    """
    assert supervise in ("all", "mask"), f"supervise {supervise!r}, expected all or mask"
    conversations = Conversations(task, tokenizer, seq_len + 1 if supervise == "mask" else None, seed, epochs)
    method = "whole" if supervise == "mask" else "split"
    return Loader(Batches(conversations, method, rows, seq_len, process_index, process_count, max_rows, padding))


# -----------------------------------------------------------------------------
# Estimates of the number of tokens


def token_counts(task: ChatTask, tokenizer: Tokenizer, sample: int = 500) -> np.ndarray:
    """Returns the number of tokens in each of at most `sample` evenly spaced conversations of a task."""
    if not len(task):
        raise UserError("the task has no conversations")
    indices = np.unique(np.linspace(0, len(task) - 1, min(sample, len(task))).astype(int))
    return np.array([len(tokenizer.render_conversation(task[int(i)], max_tokens=NO_LIMIT)[0]) for i in indices])


def epoch_tokens(
    files: Sequence[Path], tokenizer: Tokenizer, cache_dir: Path | None = None, sample: int = 256
) -> float:
    """Estimates the total number of tokens in the files, including one BOS per document. Returns NaN if no file has
    been downloaded.

    The estimate is the number of files times the mean number of tokens per file. If any of the first eight files have
    cached tokens, the mean is taken over these files. Otherwise, the mean is the bytes per file times the tokens per
    byte. The bytes per file are measured in the first eight downloaded files. The tokens per byte are measured in the
    first `sample` documents.
    """
    counts = []
    for path in files[:8]:
        if cached := token_cache.find(path, cache_dir):
            counts.append(len(cached.tokens) + len(cached.chars))  # tokens, plus one BOS per document
            cached.close()
    if counts:
        return float(np.mean(counts)) * len(files)
    sizes = {path: parquet.text_bytes(path) for path in [path for path in files if path.exists()][:8]}
    path = next((path for path, groups in sizes.items() if groups), None)
    if path is None:
        return math.nan
    with parquet.open(path) as file:
        texts = parquet.read_row_group(file, path, 0)
    tokens, _ = tokenizer.encode_batch(texts[:sample], prepend=tokenizer.bos)
    share = sum(map(len, texts[:sample])) / max(1, sum(map(len, texts)))
    tokens_per_byte = len(tokens) / max(1.0, share * sizes[path][0])
    return tokens_per_byte * sum(map(sum, sizes.values())) / len(sizes) * len(files)


# -----------------------------------------------------------------------------
# Sources of documents. A cursor is a position in a source. `read` takes a cursor, and returns some documents and the
# cursor of the next documents.


class Documents:
    """The documents of parquet files, as tokens.

    The first epoch reads the files in order, because the last files may still be downloading. Later epochs read the
    files in a random order. In every epoch, the row groups within a file are read in a random order. With seed=None,
    nothing is shuffled.
    """

    start: ClassVar[Cursor] = {"epoch": 0, "file": 0, "row_group": 0, "document": 0, "skipped": 0}

    def __init__(
        self,
        files: Sequence[Path],
        tokenizer: Tokenizer,
        seed: int | None,
        epochs: int | None,
        cache_dir: Path | None = None,
    ):
        assert len(files), "no files to read"
        self.files, self.tokenizer, self.seed, self.epochs = list(files), tokenizer, seed, epochs
        self.cache_dir = cache_dir
        self.bos = tokenizer.bos
        self.stop = threading.Event()
        # The path of the open file, the file itself, and the index of the loaded row group.
        self._path: Path | None = None
        self._file: pq.ParquetFile | token_cache.TokenCache | None = None
        self._group: int | None = None
        self._docs: list = []  # each is a str or, from a token cache, an array int[n] of token ids without BOS
        self._chars: Sequence[int] | np.ndarray = []  # the number of characters in each document

    def read(self, cursor: Cursor) -> tuple[list[np.ndarray], Cursor] | None:
        """Returns (the documents at a cursor, the next cursor), or None at the end of the data.

        A call returns at most TOKENIZE_AT_ONCE documents, so reading a row group may take several calls.
        """
        epoch, file, row_group, begin = (cursor[k] for k in ("epoch", "file", "row_group", "document"))
        if epoch == self.epochs:
            return None
        num_groups = self._open(self._nth_file(epoch, file))
        if num_groups:
            self._read_row_group(int(self._shuffled(num_groups, epoch, 1 + file)[row_group]))
        chars = np.cumsum(self._chars[begin : begin + TOKENIZE_AT_ONCE]) if num_groups else []
        end = begin + max(1, int(np.searchsorted(chars, CHARS_AT_ONCE, side="right")))
        docs = self._tokenize(self._docs[begin:end]) if num_groups else []
        usable = [ids for ids in docs if len(ids) > 1]
        skipped = cursor.get("skipped", 0) + len(docs) - len(usable)

        if not num_groups or end >= len(self._docs):
            row_group, end = row_group + 1, 0
        if row_group >= num_groups:
            file, row_group = file + 1, 0
        if file == len(self.files):
            epoch, file = epoch + 1, 0
        following = {"epoch": epoch, "file": file, "row_group": row_group, "document": end}
        return usable, following | {"skipped": skipped}

    def info(self, cursor: Cursor, waiting: int) -> dict[str, Any]:
        """Returns what `Loader.info` reports about a cursor.

        Example: {"epoch": 0, "shard": 1, "row_group": 3, "progress": 0.58, "skipped": 0}.
        """
        epoch, file = cursor["epoch"], cursor["file"]
        done = epoch == self.epochs
        num_groups = 1 if done else self._open(self._nth_file(epoch, file)) if cursor["row_group"] else 1
        progress = epoch + (file + cursor["row_group"] / max(1, num_groups)) / len(self.files)
        shard = len(self.files) if done else self._nth(epoch, file)
        place = {"epoch": epoch, "shard": shard, "row_group": cursor["row_group"], "progress": progress}
        return place | {"skipped": cursor.get("skipped", 0)}

    def _nth(self, epoch: int, i: int) -> int:
        """Returns the index in `files` of the i-th file that an epoch reads."""
        return int(self._shuffled(len(self.files), epoch, 0)[i]) if epoch else i

    def _nth_file(self, epoch: int, i: int) -> Path:
        return self.files[self._nth(epoch, i)]

    def _shuffled(self, n: int, epoch: int, stream: int) -> np.ndarray:
        """Returns the numbers 0 to n - 1 in random order, or in ascending order if there is no seed.

        Each epoch and each `stream` has its own order. Stream 0 orders the files, and stream 1 + i orders the row
        groups of the i-th file.
        """
        return np.arange(n) if self.seed is None else np.random.default_rng([self.seed, epoch, stream]).permutation(n)

    def _open(self, path: Path) -> int:
        """Opens a file and returns its number of row groups. Waits if the file is still being downloaded."""
        if self._file is None or path != self._path:
            file = token_cache.find(path, self.cache_dir)
            if file is None:
                hub.wait_for_shard(path, self.stop)
                file = parquet.open(path)
            if self._file is not None:
                self._file.close()
            self._path, self._file, self._group = path, file, None
        return self._file.num_row_groups

    def _read_row_group(self, index: int) -> None:
        """Loads row group `index` of the open file, unless it is already loaded."""
        assert self._file is not None and self._path is not None, "no file is open"
        if index == self._group:
            return
        if isinstance(self._file, token_cache.TokenCache):
            self._docs, self._chars = self._file.read(index)
        else:
            self._docs = parquet.read_row_group(self._file, self._path, index)
            self._chars = [len(text) for text in self._docs]
        self._group = index

    def _tokenize(self, docs: list) -> list[np.ndarray]:
        """Returns the token ids of each document, with BOS in front: ["Hi"] -> [int32[bos, 72, 105]].

        Documents from a token cache are already token ids, but without BOS.
        """
        if isinstance(self._file, token_cache.TokenCache):
            return [packing.document(np.concatenate([[self.bos], ids])) for ids in docs]
        tokens, offsets = self.tokenizer.encode_batch(docs, prepend=self.bos)
        return [packing.document(ids) for ids in np.split(tokens, offsets[1:-1])]


class Conversations:
    """The conversations of a task, as tokens. They are reshuffled in every epoch, or stay in order if `seed` is None.

    If `max_tokens` is given, a conversation with more tokens is truncated after the last answer that fits, and only the
    assistant's tokens are targets. If `max_tokens` is None, conversations are not truncated, and every token is a
    target.
    """

    start: ClassVar[Cursor] = {"epoch": 0, "position": 0, "truncated": 0, "skipped": 0}

    def __init__(
        self, task: ChatTask, tokenizer: Tokenizer, max_tokens: int | None, seed: int | None, epochs: int | None
    ):
        if not len(task):
            raise UserError("the task has no conversations")
        self.task, self.tokenizer, self.max_tokens, self.seed, self.epochs = task, tokenizer, max_tokens, seed, epochs
        self.bos, self.end = tokenizer.bos, tokenizer.special("<|assistant_end|>")
        self.stop = threading.Event()
        self._epoch, self._order = -1, np.arange(0)

    def read(self, cursor: Cursor) -> tuple[list[np.ndarray], Cursor] | None:
        """Returns (the conversations at a cursor, the next cursor), or None at the end of the data."""
        epoch, begin = cursor["epoch"], cursor["position"]
        if epoch == self.epochs:
            return None
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.arange(len(self.task))
            if self.seed is not None:
                self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.task))
        docs, truncated, skipped = [], cursor["truncated"], cursor["skipped"]
        for i in self._order[begin : begin + RENDER_AT_ONCE]:
            # Ask for one token more than `max_tokens`. If the extra token is returned, the conversation is too long.
            limit = NO_LIMIT if self.max_tokens is None else self.max_tokens + 1
            ids, mask = self.tokenizer.render_conversation(self.task[int(i)], max_tokens=limit)
            if self.max_tokens is None:
                docs.append(packing.document(ids))
                continue
            if len(ids) > self.max_tokens:
                truncated += 1
                whole = self._whole_answers(ids[: self.max_tokens])
                ids, mask = ids[:whole], mask[:whole]
            if any(mask):
                docs.append(packing.document(ids, mask))
            else:
                skipped += 1
        end = begin + RENDER_AT_ONCE
        epoch, position = (epoch + 1, 0) if end >= len(self.task) else (epoch, end)
        return docs, {"epoch": epoch, "position": position, "truncated": truncated, "skipped": skipped}

    def _whole_answers(self, ids: list[int]) -> int:
        """Returns the number of tokens up to the end of the last complete answer, or 0 if there is none."""
        return len(ids) - ids[::-1].index(self.end) if self.end in ids else 0

    def info(self, cursor: Cursor, waiting: int) -> dict[str, Any]:
        """Returns what `Loader.info` reports about a cursor.

        `waiting` is the number of conversations that have been read but not yet packed. These conversations do not
        count as progress. Otherwise, the learning rate schedule of a small task would end before training does.
        """
        consumed = cursor["epoch"] * len(self.task) + cursor["position"] - waiting
        counts = {k: cursor[k] for k in ("epoch", "truncated", "skipped")}
        return {**counts, "shard": None, "row_group": None, "progress": max(0, consumed) / len(self.task)}


# -----------------------------------------------------------------------------
# Batches of packed rows


class Batches(grain.IterDataset):
    """Batches of packed documents. Loader describes the contents of a batch."""

    def __init__(
        self,
        documents: Documents | Conversations,
        method: str,
        rows: int,
        seq_len: int,
        process_index: int = 0,
        process_count: int = 1,
        max_rows: int | None = None,
        padding: int = 0,
    ):
        super().__init__()
        assert method in ("stream", *packing.BUFFER_DOCUMENTS), f"packing {method!r}"
        padded = rows + padding
        if rows < 1 or padded % process_count:
            raise UserError(
                f"a batch of {padded} rows cannot be shared by {process_count} processes: "
                f"use a multiple of {process_count}"
            )
        share = padded // process_count
        self.own_rows = slice(process_index * share, (process_index + 1) * share)
        self.documents, self.method, self.rows, self.max_rows = documents, method, rows, max_rows
        self.padded_rows = padded
        self.width = seq_len + 1
        self.stop = documents.stop

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)


class BatchIterator(grain.DatasetIterator):
    """One pass over Batches. Like every Grain iterator, it is not thread-safe."""

    def __init__(self, batches: Batches):
        super().__init__()
        self._batches = batches
        self._documents = batches.documents
        bos = batches.documents.bos
        stream = batches.method == "stream"
        self._packer = (
            packing.Stream(batches.width, bos) if stream else packing.BestFit(batches.method, batches.width, bos)
        )
        self._cursor = dict(batches.documents.start)
        self._rows = 0  # the number of rows packed so far, including the rows of other processes

    def __next__(self) -> dict[str, Any]:
        rows = []
        while len(rows) < self._batches.rows and (row := self._row()) is not None:
            rows.append(row)
        if not rows:
            raise StopIteration
        empty = packing.empty_row(self._batches.width, self._documents.bos)
        rows += [empty] * (self._batches.padded_rows - len(rows))
        info = self._documents.info(self._cursor, len(self._packer))
        own_rows = np.stack(rows[self._batches.own_rows])
        return packing.as_batch(own_rows) | {"info": info | {"waste": self._packer.waste}}

    def _row(self) -> np.ndarray | None:
        """Returns the next packed row, or None after the last row."""
        if self._rows == self._batches.max_rows:
            return None
        epoch = self._cursor["epoch"]
        while self._packer.needs_documents:
            if (result := self._documents.read(self._cursor)) is None:
                break
            documents, self._cursor = result
            for document in documents:
                self._packer.add(document)
            if not len(self._packer) and self._cursor["epoch"] > epoch + 1:
                break  # a whole epoch had no usable document, so other epochs will have none either
        if not len(self._packer):
            if not self._rows:
                raise UserError(
                    "nothing to train on: every document is empty, or has no token to learn from, or no answer in it "
                    f"ends within the {self._batches.width - 1} tokens of a row"
                )
            return None
        self._rows += 1
        return self._packer.row()

    def get_state(self) -> dict[str, Any]:
        kind = {"packing": self._batches.method, "width": self._batches.width}
        return {**kind, "rows": self._rows, "cursor": dict(self._cursor), "packer": self._packer.state()}

    def set_state(self, state: dict[str, Any]) -> None:
        for key, current in (("packing", self._batches.method), ("width", self._batches.width)):
            if (saved := state.get(key)) != current:
                raise UserError(f"the saved data position has {key} {saved}, this run {current}: keep {key} {saved}")
        self._cursor, self._rows = dict(state["cursor"]), state["rows"]
        self._packer.restore(state["packer"])
