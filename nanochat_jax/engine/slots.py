"""Keeps track of all slots: the sequence in each used slot, and the cached tokens of each free slot.

The keys and values of a finished sequence stay in its cache row until another sequence takes the slot. Prefix caching
reuses cache rows: if a prompt begins with the same tokens as a row, the engine does not compute these tokens again. The
row may belong to a finished sequence, such as the earlier turns of a chat. It may also belong to a running sequence,
such as a chat with the same system prompt.
"""

from collections import abc, deque
from dataclasses import dataclass, field

from nanochat_jax.engine.request import Request, Scores


@dataclass(eq=False)
class Prompt:
    """A request in the engine."""

    id: int
    request: Request
    started: int = 0  # the number of samples that have been started
    scores: Scores | None = None  # set after prefill if the request asked for scores
    cached_tokens: int = 0  # the number of the prompt's tokens that came from the cache

    @property
    def left(self) -> int:
        """The number of samples that still wait for a slot."""
        return self.request.n - self.started


@dataclass(eq=False)
class Sequence:
    """A sample in a slot."""

    prompt: Prompt
    sample: int
    stop_ids: tuple[int, ...]
    ids: list[int]  # the prompt and the answer so far; the last id is not in the cache yet
    left: int  # how many more tokens may be added
    expression: list[int] | None = None  # tokens since python_start; None outside a tool call
    forced: deque[int] = field(default_factory=deque)  # tokens to insert before sampling continues
    called: bool = False  # whether the answer has a tool call, at whose end the device waits for the host

    @property
    def request(self) -> Request:
        return self.prompt.request

    @property
    def length(self) -> int:
        """The number of tokens of this sequence in the cache."""
        return len(self.ids) - 1

    @property
    def generated(self) -> int:
        """The length of the answer so far, in tokens."""
        return len(self.ids) - len(self.request.ids)


class Slots:
    """A fixed number of slots, each with one row of the cache."""

    def __init__(self, count: int):
        self.sequences: list[Sequence | None] = [None] * count
        self._leftover: list[list[int]] = [[] for _ in range(count)]  # for each free slot, its cached tokens
        self._released_at = [0] * count  # for each slot, the value of _releases when the slot was last freed
        self._releases = 0

    def running(self) -> dict[int, Sequence]:
        """Returns {slot: sequence} for all slots in use."""
        return {slot: sequence for slot, sequence in enumerate(self.sequences) if sequence}

    def free(self) -> list[int]:
        """Returns the free slots, in the order in which they were freed.

        The scheduler fills the slots in this order, because the oldest cache rows are the least likely to be reused.
        """
        empty = (slot for slot, sequence in enumerate(self.sequences) if sequence is None)
        return sorted(empty, key=self._released_at.__getitem__)

    def assign(self, slot: int, sequence: Sequence) -> None:
        """Gives a free slot to a sequence. The sequence's keys and values will overwrite the slot's cache row."""
        self.sequences[slot], self._leftover[slot] = sequence, []

    def release(self, slot: int) -> None:
        """Frees a slot, but keeps the sequence's keys and values in the cache row."""
        sequence = self.sequences[slot]
        assert sequence is not None, f"slot {slot} is free already"
        self._releases += 1
        self._released_at[slot] = self._releases
        self._leftover[slot], self.sequences[slot] = sequence.ids[:-1], None

    def discard(self, slot: int) -> None:
        """Frees a slot after a failed step. The slot's cache row counts as empty, because it may be incomplete."""
        self.sequences[slot] = None

    def clear_cache(self) -> None:
        """Marks the cache rows of all free slots as empty. Call this after the weights have changed."""
        self._leftover = [[] for _ in self.sequences]

    def truncate(self, size: int) -> None:
        """Shortens the token lists of all free slots to fit a cache of `size` positions.

        A row that would be full keeps only size - 1 tokens, because decoding overwrites its last position.
        """
        self._leftover = [ids if len(ids) < size else ids[: size - 1] for ids in self._leftover]

    def cached_length(self, slot: int) -> int:
        """The number of tokens in the cache row of `slot`."""
        sequence = self.sequences[slot]
        return sequence.length if sequence else len(self._leftover[slot])

    def longest_prefix(self, ids: abc.Sequence[int]) -> tuple[int, int]:
        """Finds the cache row that shares the longest prefix with `ids`. Returns (slot, length of the prefix)."""
        rows = zip(self.sequences, self._leftover, strict=True)
        cached = [sequence.ids[:-1] if sequence else leftover for sequence, leftover in rows]
        shared = [common_prefix_length(row, ids) for row in cached]
        count = max(shared)
        return shared.index(count), count


def common_prefix_length(a: abc.Sequence[int], b: abc.Sequence[int]) -> int:
    """Returns the number of tokens in the common prefix of a and b: [1, 2, 3], [1, 2, 4] -> 2."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
