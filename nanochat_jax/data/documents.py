"""Reads the documents of parquet files, or a task's conversations, as tokens. Also estimates how many tokens there are.

`Documents` and `Conversations` are sources of documents. A cursor is a position in a source. `read` takes a cursor, and
returns some documents and the cursor of the next documents. dataloader.py packs the documents into rows.
"""

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

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
Cursor = dict[str, Any]


class ChatTask(Protocol):
    """A task, as a loader sees it: a sequence of conversations."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict: ...


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
