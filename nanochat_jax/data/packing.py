"""Packs documents of any length into rows of a fixed width.

A document is an int32 array of token ids that begins with BOS. The model reads some tokens without learning to predict
them, such as a user's words or padding. These tokens are stored as ~id instead of id.

BestFit and Stream are packers. They turn documents into rows int32[T+1], and count discarded tokens and padding. The
state of a packer is small and JSON-serializable. A packer that is restored from a state makes exactly the rows that the
saved packer would have made next. `as_batch` turns rows into inputs and targets.
"""

import base64
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

# Packing method -> the number of documents that BestFit keeps in its buffer. A larger buffer contains better-fitting
# documents, but makes the saved state larger. The numbers for "crop" and "whole" are those of the original nanochat.
BUFFER_DOCUMENTS = {"split": 256, "crop": 1000, "whole": 100}


def document(ids: ArrayLike, mask: Sequence[int] | None = None) -> np.ndarray:
    """Returns the ids as int32[n], with ~id in place of id where `mask` is 0.

    >>> document([0, 7, 8], [0, 0, 1]).tolist()  # ~0 == -1, ~7 == -8
    [-1, -8, 8]
    """
    ids = np.asarray(ids, np.int32)
    return ids if mask is None else np.where(np.asarray(mask, bool), ids, ~ids)


def as_batch(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Turns rows int32[b, T+1] into inputs and targets int32[b, T]. A target of -1 means that the model learns nothing
    at this position.

    >>> batch = as_batch(np.array([[0, 5, ~6, 7, ~0]]))  # 0 is BOS; ~6 is read but not predicted; ~0 is padding
    >>> batch["inputs"].tolist(), batch["targets"].tolist()
    ([[0, 5, 6, 7]], [[5, -1, 7, -1]])
    """
    ids = np.where(rows < 0, ~rows, rows)
    return {"inputs": ids[:, :-1], "targets": np.maximum(rows[:, 1:], -1)}


def empty_row(width: int, bos: int) -> np.ndarray:
    """Returns a row int32[width] of padding, which consists of BOS tokens that are not targets."""
    return np.full(width, ~bos, np.int32)


class BestFit:
    """Fills each row with the longest buffered documents that fit. Every row begins with BOS. If no document fits into
    the rest of a row, the method decides what happens:

    - "split": The longest document is split. Its remainder goes back into the buffer as a document with its own BOS, so
      nothing is lost. Every row begins with the longest document in the buffer, even if it must be split. Otherwise,
      documents longer than a row could pile up in the buffer.
    - "crop": The shortest document is truncated. Its remainder is discarded and counted as waste. In 2026, nanochat
      uses this method.
    - "whole": The rest of the row is padded. No document may be longer than a row.

    >>> packer = BestFit("split", width=6, bos=0)
    >>> for ids in ([0, 1, 2], [0, 3], [0, 4, 5, 6]):
    ...     packer.add(document(ids))
    >>> packer.row().tolist()  # the longest document, then the longest that fits into the two free positions
    [0, 4, 5, 6, 0, 3]
    >>> packer.row().tolist()  # the last document, then padding, which is ~0 == -1
    [0, 1, 2, -1, -1, -1]
    """

    def __init__(self, method: str, width: int, bos: int):
        assert method in BUFFER_DOCUMENTS, f"packing {method!r}, expected one of {', '.join(BUFFER_DOCUMENTS)}"
        self.method, self.width, self.bos = method, width, bos
        self._load([], 0, 0)

    def _load(self, documents: list[np.ndarray], emitted: int, wasted: int) -> None:
        self._order: list[tuple[int, int]] = []  # (length, serial number) of each document, in ascending order
        self._documents: dict[int, tuple[bool, np.ndarray]] = {}  # serial number -> (whether BOS must be added, ids)
        self._serial = 0
        self._buffered_tokens = 0
        self._emitted, self._wasted = emitted, wasted  # both count tokens
        for doc in documents:
            self.add(doc)

    def add(self, doc: np.ndarray) -> None:
        """Adds a document (int32[n], n >= 1) to the buffer."""
        assert self.method != "whole" or len(doc) <= self.width, f"{len(doc)} tokens do not fit in {self.width}"
        self._add(False, doc)

    def _add(self, needs_bos: bool, doc: np.ndarray) -> None:
        insort(self._order, (needs_bos + len(doc), self._serial))
        self._documents[self._serial] = needs_bos, doc
        self._serial += 1
        self._buffered_tokens += needs_bos + len(doc)

    def __len__(self) -> int:
        """The number of buffered documents, including the remainders of split documents."""
        return len(self._order)

    @property
    def needs_documents(self) -> bool:
        """Whether the buffer has room for more documents, which should be added before the next row is made.

        The buffer is full if it holds BUFFER_DOCUMENTS documents. With "split", it is also full if it holds enough
        tokens for 64 rows. The limit on tokens keeps the state small when documents are long.
        """
        enough = self.method == "split" and self._buffered_tokens >= 64 * self.width
        return len(self._order) < BUFFER_DOCUMENTS[self.method] and not enough

    @property
    def waste(self) -> float:
        """Padding and discarded tokens, as a fraction of all tokens so far."""
        return self._wasted / max(1, self._emitted)

    def row(self) -> np.ndarray:
        """Returns the next row, int32[width]. The row is padded only if the method is "whole" or too few documents are
        left."""
        row, filled = empty_row(self.width, self.bos), 0
        while filled < self.width and self._order:
            taken = self._take(self.width - filled, row_is_empty=not filled)
            if taken is None:
                break
            needs_bos, doc = taken
            if needs_bos:
                row[filled] = self.bos
                filled += 1
            room = self.width - filled
            row[filled : filled + len(doc)] = doc[:room]
            filled += min(room, len(doc))
            if len(doc) > room:
                self._return_or_discard(doc[room:])
        self._emitted += self.width
        self._wasted += self.width - filled
        return row

    def _take(self, room: int, row_is_empty: bool) -> tuple[bool, np.ndarray] | None:
        """Takes a document out of the buffer for a row that has `room` free positions. Among equally long documents,
        the oldest is taken. Returns None if the free positions must be padded."""
        num_fitting = bisect_right(self._order, (room, self._serial))
        if self.method == "split" and (row_is_empty or not num_fitting):
            index = -1
        elif num_fitting:
            index = num_fitting - 1
        elif self.method == "crop":
            index = 0
        else:
            return None
        oldest = bisect_left(self._order, (self._order[index][0], -1))
        length, serial = self._order.pop(oldest)
        self._buffered_tokens -= length
        return self._documents.pop(serial)

    def _return_or_discard(self, remainder: np.ndarray) -> None:
        if self.method == "split":
            self._add(True, remainder)  # `remainder` is a view, since copying it for every row would be slow
        else:
            self._wasted += len(remainder)
            self._emitted += len(remainder)

    def state(self) -> dict[str, Any]:
        """Returns everything that the next rows depend on, in JSON-serializable form."""
        buffered = [self._documents[serial] for serial in sorted(self._documents)]
        parts = []
        for needs_bos, doc in buffered:
            parts += [document([self.bos]), doc] if needs_bos else [doc]
        return {
            "lengths": ",".join(str(needs_bos + len(doc)) for needs_bos, doc in buffered),
            "tokens": _encode(parts),
            "emitted": self._emitted,
            "wasted": self._wasted,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restores a state that `state()` returned."""
        lengths = [int(n) for n in state["lengths"].split(",") if n]
        documents = np.split(_decode(state["tokens"]), np.cumsum(lengths)[:-1]) if lengths else []
        self._load(documents, state["emitted"], state["wasted"])


class Stream:
    """Joins documents end to end and cuts a row every T tokens (nanochat's method in 2025).

    No token is lost, but a row may begin in the middle of a document. The last target of a row is also the first input
    of the next row. The rows therefore do not depend on the batch size. In nanochat, they do.
    """

    def __init__(self, width: int, bos: int):
        self.width, self.bos = width, bos
        self.restore({"tokens": "", "emitted": 0, "wasted": 0})

    def add(self, doc: np.ndarray) -> None:
        """Appends a document (int32[n])."""
        self._parts.append(doc)
        self._buffered_tokens += len(doc)

    def __len__(self) -> int:
        """The number of buffered tokens that have not yet been targets."""
        return max(0, self._buffered_tokens - 1)

    @property
    def needs_documents(self) -> bool:
        """Whether the buffer holds too few tokens to fill the next row."""
        return self._buffered_tokens < self.width

    @property
    def waste(self) -> float:
        """Padding, as a fraction of all tokens so far."""
        return self._wasted / max(1, self._emitted)

    def row(self) -> np.ndarray:
        """Returns the next row, int32[width]. The row is padded only if too few tokens are left to fill it."""
        tokens = self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        row = empty_row(self.width, self.bos)
        filled = min(self.width, len(tokens))
        row[:filled] = tokens[:filled]
        self._parts = [tokens[self.width - 1 :]]
        self._buffered_tokens = len(self._parts[0])
        self._emitted += self.width
        self._wasted += self.width - filled
        return row

    def state(self) -> dict[str, Any]:
        """Returns everything that the next rows depend on, in JSON-serializable form."""
        return {"tokens": _encode(self._parts), "emitted": self._emitted, "wasted": self._wasted}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores a state that `state()` returned."""
        self._parts = [_decode(state["tokens"])]
        self._buffered_tokens = len(self._parts[0])
        self._emitted, self._wasted = state["emitted"], state["wasted"]


def _encode(arrays: list[np.ndarray]) -> str:
    """Returns the tokens of all arrays in base64. Saved states hold tokens instead of text, so that a resumed run need
    not tokenize the text again.

    >>> _encode([np.array([0, 258], np.int32)])
    'AAAAAAIBAAA='
    """
    tokens = np.concatenate([np.zeros(0, np.int32), *arrays])
    return base64.b64encode(tokens.astype("<i4").tobytes()).decode("ascii")


def _decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<i4").astype(np.int32)
