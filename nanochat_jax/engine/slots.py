"""Tracks, on the host, which sequence each slot holds and which tokens the cache row of a free slot still holds.

The keys and values of a finished sequence stay in its cache row until another sequence takes the slot. Prefix caching
reuses them: if a prompt begins with the same tokens as a cache row, these tokens are not computed again. The row may
belong to a finished sequence (the earlier turns of a chat) or to a running one (a shared system prompt).
"""

from collections import abc, deque
from dataclasses import dataclass, field

from nanochat_jax.engine.request import Request, Scores


@dataclass(eq=False)
class Prompt:
    """A request in the engine. `started` is the number of its samples that have been started."""

    id: int
    request: Request
    started: int = 0
    scores: Scores | None = None  # set after prefill if the request asked for scores
    cached_tokens: int = 0  # the number of the prompt's tokens that came from the cache

    @property
    def left(self) -> int:
        """The number of samples that still wait for a slot."""
        return self.request.n - self.started


@dataclass(eq=False)
class Sequence:
    """A sample in a slot. `ids` holds the prompt and the answer so far; all ids but the last are in the cache."""

    prompt: Prompt
    sample: int
    stop_ids: tuple[int, ...]
    ids: list[int]
    left: int  # the maximum number of tokens still to be added
    expression: list[int] | None = None  # tokens since python_start; None outside a python block
    forced: deque[int] = field(default_factory=deque)  # tokens to insert instead of sampling

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
        self._leftover: list[list[int]] = [[] for _ in range(count)]  # per free slot, the tokens in its row
        self._released_at = [0] * count  # for each slot, the value of _releases when the slot was last released
        self._releases = 0

    def running(self) -> dict[int, Sequence]:
        """Returns {slot: the sequence in it} for all slots in use."""
        return {slot: sequence for slot, sequence in enumerate(self.sequences) if sequence}

    def free(self) -> list[int]:
        """Returns the free slots, in the order in which they were freed.

        The caller takes the first ones, because the oldest cache rows are the least likely to be reused.
        """
        empty = (slot for slot, sequence in enumerate(self.sequences) if sequence is None)
        return sorted(empty, key=self._released_at.__getitem__)

    def assign(self, slot: int, sequence: Sequence) -> None:
        """Gives a free slot to a sequence. The sequence's keys and values will overwrite the slot's cache row."""
        self.sequences[slot], self._leftover[slot] = sequence, []

    def release(self, slot: int) -> None:
        """Frees a slot. The slot's cache row keeps the keys and values of the sequence."""
        sequence = self.sequences[slot]
        assert sequence is not None, f"slot {slot} is free already"
        self._releases += 1
        self._released_at[slot] = self._releases
        self._leftover[slot], self.sequences[slot] = sequence.ids[:-1], None

    def discard(self, slot: int) -> None:
        """Frees a slot whose cache row may lack the prompt."""
        self.sequences[slot] = None

    def clear_cache(self) -> None:
        """Forgets the tokens of free slots. Call this when the cached keys and values are no longer valid."""
        self._leftover = [[] for _ in self.sequences]

    def truncate(self, size: int) -> None:
        """Shortens the recorded tokens of every free slot to fit a cache of `size` positions.

        At most `size` - 1 tokens are kept, because decoding overwrites the last position of a full row.
        """
        self._leftover = [ids if len(ids) < size else ids[: size - 1] for ids in self._leftover]

    def cached_length(self, slot: int) -> int:
        """The number of tokens in the cache row of `slot`."""
        sequence = self.sequences[slot]
        return sequence.length if sequence else len(self._leftover[slot])

    def longest_prefix(self, ids: abc.Sequence[int]) -> tuple[int, int]:
        """Returns the slot whose cache row shares the longest prefix with `ids`, and that prefix's length in tokens."""
        rows = zip(self.sequences, self._leftover, strict=True)
        cached = [sequence.ids[:-1] if sequence else leftover for sequence, leftover in rows]
        shared = [common_prefix_length(row, ids) for row in cached]
        count = max(shared)
        return shared.index(count), count


def common_prefix_length(a: abc.Sequence[int], b: abc.Sequence[int]) -> int:
    """Returns the length of the common prefix of a and b, in tokens: [1, 2, 3], [1, 2, 4] -> 2."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
