"""Makes batches of inputs and targets for training and validation, from parquet files or from conversations.

The loaders are built on Grain, a data-loading library. The pipeline is: documents -> tokens -> packed rows -> batches.
A background thread prepares the next batches in advance. The same seed always gives the same batches. A saved state
restores the exact position in the data.

Each process packs the whole global batch and keeps its own contiguous rows. The rows of the global batch therefore do
not depend on the number of processes, and a run can resume with another number of processes.
"""

import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from nanochat_jax.config import UserError
from nanochat_jax.data import packing
from nanochat_jax.data.documents import ChatTask, Conversations, Documents
from nanochat_jax.tokenizer import Tokenizer

PREFETCH = 4  # the number of batches prepared in advance
Batch = dict[str, np.ndarray]


class Loader:
    """An iterator over batches {inputs: int32[b, T], targets: int32[b, T]}. The b rows are this process's share of the
    global batch. The loss ignores targets of -1.

    After each batch, `info` holds the position in the data, the progress in epochs after this batch and before it (such
    as 1.5 and 1.4), and the fraction of wasted tokens (see packing.py).
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
        self._progress = 0.0  # in epochs

    def __next__(self) -> dict[str, Any]:
        rows = []
        while len(rows) < self._batches.rows and (row := self._row()) is not None:
            rows.append(row)
        if not rows:
            raise StopIteration
        empty = packing.empty_row(self._batches.width, self._documents.bos)
        rows += [empty] * (self._batches.padded_rows - len(rows))
        info = self._documents.info(self._cursor, len(self._packer))
        info |= {"progress_before": self._progress, "waste": self._packer.waste}
        self._progress = info["progress"]
        own_rows = np.stack(rows[self._batches.own_rows])
        return packing.as_batch(own_rows) | {"info": info}

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
        self._progress = self._documents.info(self._cursor, len(self._packer))["progress"]
