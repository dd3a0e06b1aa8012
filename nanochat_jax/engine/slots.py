"""What the host knows of the slots: which sample sits in each, and whose keys and values an empty one still holds."""

from collections import abc, deque
from dataclasses import dataclass, field

import jax

from nanochat_jax.engine import cache as kv
from nanochat_jax.engine.request import Request, Scores


@dataclass(eq=False)
class Prompt:
    """A request whose samples have not all been started."""

    id: int
    request: Request
    started: int = 0

    @property
    def left(self) -> int:
        return self.request.n - self.started


@dataclass
class Prefilled:
    """Prompts whose keys and values are computed: prompts[i] is row i. With `logits` None there is more to do: of the
    only prompt the first `done` tokens are, `reused` of them for another sample."""

    prefix: kv.KV
    logits: jax.Array | None  # [rows, v] after the last token of each
    size: int
    prompts: list[Prompt]
    scores: list[Scores | None]
    done: int = 0
    cached_tokens: int = 0

    @property
    def left(self) -> int:
        return sum(prompt.left for prompt in self.prompts)


@dataclass
class Sequence:
    """A sample in its slot: `ids` are prompt and answer so far. All but the last of them are in the cache."""

    id: int
    sample: int
    request: Request
    stop_ids: tuple[int, ...]
    ids: list[int]
    left: int
    expression: list[int] | None = None  # tokens since python_start; None outside of a block
    forced: deque[int] = field(default_factory=deque)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return len(self.ids) - 1


class Slots:
    """A fixed number of them, each with a row of the cache.

    What a sample leaves there stays until the next one takes the slot. A prompt that begins like it (the earlier turns
    of a chat), or like one under way (a system prompt), need not be computed from its beginning.
    """

    def __init__(self, count: int):
        self.rows: list[Sequence | None] = [None] * count
        self._kept: list[list[int]] = [[] for _ in range(count)]  # tokens in the cache rows of empty slots
        self._left_at = [0] * count  # when each was left, in departures
        self._departures = 0

    def empty(self) -> list[int]:
        """Slots without a sample, those first that have been so for longest."""
        return sorted((i for i, row in enumerate(self.rows) if row is None), key=self._left_at.__getitem__)

    def enter(self, slot: int, row: Sequence) -> None:
        self.rows[slot], self._kept[slot] = row, []

    def leave(self, slot: int) -> None:
        self._departures += 1
        self._left_at[slot] = self._departures
        self._kept[slot], self.rows[slot] = self.rows[slot].ids[:-1], None

    def forget(self) -> None:
        """Nothing that was left is worth anything any more."""
        self._kept = [[] for _ in self.rows]

    def cut(self, size: int) -> None:
        """The cache has `size` positions now. The last one is where decoding writes for an empty slot that is full."""
        self._kept = [kept if len(kept) < size else kept[: size - 1] for kept in self._kept]

    def length(self, slot: int) -> int:
        """Tokens in the cache row of `slot`."""
        row = self.rows[slot]
        return row.length if row else len(self._kept[slot])

    def longest(self, ids: abc.Sequence[int]) -> tuple[int, int]:
        """The slot whose cache row begins with the most tokens of `ids`, and how many these are."""
        known = (row.ids[:-1] if row else kept for row, kept in zip(self.rows, self._kept, strict=True))
        shared = [common_prefix_length(tokens, ids) for tokens in known]
        count = max(shared)
        return shared.index(count), count


def common_prefix_length(a: abc.Sequence[int], b: abc.Sequence[int]) -> int:
    """How many tokens a and b have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
