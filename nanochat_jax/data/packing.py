"""Rows of a fixed width from documents of any length, nothing lost silently.

A document is an int32 array of token ids that begins with BOS; a token that is read but not predicted (a user's words,
padding) is stored as its complement, ~id. BestFit and Stream take documents and give rows of T+1 tokens; `as_batch`
makes inputs and targets of them. Their state is small, JSON-able and exact.
"""

import base64
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from typing import Any

import numpy as np

# Documents that best fit chooses from. More make tighter rows, and a larger state. nanochat uses 1000 and 100.
CHOICE = {"split": 256, "crop": 1000, "whole": 100}


def document(ids: Sequence[int], mask: Sequence[int] | None = None) -> np.ndarray:
    """int32[n] of the ids; where `mask` is 0 the token is read but not predicted."""
    ids = np.asarray(ids, np.int32)
    return ids if mask is None else np.where(np.asarray(mask, bool), ids, ~ids)


def as_batch(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows int32[b, T+1] -> inputs and targets int32[b, T], targets -1 where a token is not to be predicted."""
    ids = np.where(rows < 0, ~rows, rows)
    return {"inputs": ids[:, :-1], "targets": np.maximum(rows[:, 1:], -1)}


def padding(width: int, bos: int) -> np.ndarray:
    """A row without a target."""
    return np.full(width, ~bos, np.int32)


class BestFit:
    """Fills each row with the largest waiting document that still fits; every row begins with BOS. When none fits:

    - "split": the longest is cut; what is left of it waits on, as a document with a BOS of its own. Nothing is lost.
      A document longer than a row is cut as soon as it is the longest, before it can pile up behind short ones.
    - "crop": the shortest is cut, and what is left of it is thrown away and counted (nanochat's way in 2026).
    - "whole": the rest of the row is padded. Documents must not be longer than a row.
    """

    def __init__(self, packing: str, width: int, bos: int):
        assert packing in CHOICE, f"packing {packing!r}, expected one of {', '.join(CHOICE)}"
        self.packing, self.width, self.bos = packing, width, bos
        self._load([], 0, 0)

    def _load(self, documents: list[np.ndarray], emitted: int, wasted: int):
        self._order = []  # sorted (length, serial number)
        self._documents = {}  # serial number -> (begins with a BOS that is not in the array, array)
        self._serial = 0
        self._waiting = 0  # tokens
        self._emitted, self._wasted = emitted, wasted
        for doc in documents:
            self.add(doc)

    def add(self, doc: np.ndarray) -> None:
        """Puts a document (int32[n], n >= 1) among those that wait."""
        assert self.packing != "whole" or len(doc) <= self.width, f"{len(doc)} tokens do not fit {self.width}"
        self._add(False, doc)

    def _add(self, bos: bool, doc: np.ndarray) -> None:
        insort(self._order, (bos + len(doc), self._serial))
        self._documents[self._serial] = bos, doc
        self._serial += 1
        self._waiting += bos + len(doc)

    def __len__(self) -> int:
        """Documents not wholly placed."""
        return len(self._order)

    @property
    def hungry(self) -> bool:
        """Whether there should be more documents to choose from before the next row is made. Splitting chooses well
        enough among a few rows' worth of tokens, which keeps its state small where documents are long."""
        enough = self.packing == "split" and self._waiting >= 64 * self.width
        return len(self._order) < CHOICE[self.packing] and not enough

    @property
    def waste(self) -> float:
        """Share of tokens thrown away, or of positions padded, so far."""
        return self._wasted / max(1, self._emitted)

    def row(self) -> np.ndarray:
        """The next row, int32[width]; padded only if "whole" or if too few documents wait to fill it."""
        row, filled = padding(self.width, self.bos), 0
        while filled < self.width and self._order:
            found = self._pop(self.width - filled, fresh=not filled)
            if found is None:
                break
            bos, doc = found
            if bos:
                row[filled] = self.bos
                filled += 1
            room = self.width - filled
            row[filled : filled + len(doc)] = doc[:room]
            filled += min(room, len(doc))
            if len(doc) > room:
                self._leave(doc[room:])
        self._emitted += self.width
        self._wasted += self.width - filled
        return row

    def _pop(self, room: int, fresh: bool) -> tuple[bool, np.ndarray] | None:
        """Takes out the document that goes next into `room` positions; the oldest among those of equal length."""
        fitting = bisect_right(self._order, (room, self._serial))
        if self.packing == "split" and (fresh or not fitting):
            choice = -1
        elif fitting:
            choice = fitting - 1
        elif self.packing == "crop":
            choice = 0
        else:
            return None
        oldest = bisect_left(self._order, (self._order[choice][0], -1))
        length, serial = self._order.pop(oldest)
        self._waiting -= length
        return self._documents.pop(serial)

    def _leave(self, rest: np.ndarray) -> None:
        if self.packing == "split":
            self._add(True, rest)  # a view: a long document would be copied anew for every row
        else:
            self._wasted += len(rest)
            self._emitted += len(rest)

    def state(self) -> dict[str, Any]:
        """Everything the next rows depend on, JSON-able."""
        waiting = [self._documents[serial] for serial in sorted(self._documents)]
        parts = []
        for bos, doc in waiting:
            parts += [document([self.bos]), doc] if bos else [doc]
        return {
            "lengths": ",".join(str(bos + len(doc)) for bos, doc in waiting),
            "tokens": _encode(parts),
            "emitted": self._emitted,
            "wasted": self._wasted,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a `state()`."""
        lengths = [int(n) for n in state["lengths"].split(",") if n]
        documents = np.split(_decode(state["tokens"]), np.cumsum(lengths)[:-1]) if lengths else []
        self._load(documents, state["emitted"], state["wasted"])


class Stream:
    """Documents end to end, cut every T tokens (nanochat's way in 2025): nothing is lost, but rows begin anywhere.
    Unlike there, the last target of a row is also the first input of the next, so rows do not depend on the batch."""

    def __init__(self, width: int, bos: int):
        self.width, self.bos = width, bos
        self.restore({"tokens": "", "emitted": 0, "wasted": 0})

    def add(self, doc: np.ndarray) -> None:
        """Appends a document."""
        self._parts.append(doc)
        self._waiting += len(doc)

    def __len__(self) -> int:
        """Tokens not yet a target."""
        return max(0, self._waiting - 1)

    @property
    def hungry(self) -> bool:
        return self._waiting < self.width

    @property
    def waste(self) -> float:
        """Share of positions padded so far."""
        return self._wasted / max(1, self._emitted)

    def row(self) -> np.ndarray:
        """The next row, int32[width]; padded only if too few tokens wait to fill it."""
        tokens = self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        row = padding(self.width, self.bos)
        filled = min(self.width, len(tokens))
        row[:filled] = tokens[:filled]
        self._parts = [tokens[self.width - 1 :]]
        self._waiting = len(self._parts[0])
        self._emitted += self.width
        self._wasted += self.width - filled
        return row

    def state(self) -> dict[str, Any]:
        """Everything the next rows depend on, JSON-able."""
        return {"tokens": _encode(self._parts), "emitted": self._emitted, "wasted": self._wasted}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a `state()`."""
        self._parts = [_decode(state["tokens"])]
        self._waiting = len(self._parts[0])
        self._emitted, self._wasted = state["emitted"], state["wasted"]


def _encode(arrays: list[np.ndarray]) -> str:
    """Tokens as text; kept in the state itself, so that resuming neither rereads nor tokenizes anything."""
    tokens = np.concatenate([np.zeros(0, np.int32), *arrays])
    return base64.b64encode(tokens.astype("<i4").tobytes()).decode("ascii")


def _decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<i4").astype(np.int32)
