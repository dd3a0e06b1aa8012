"""Lists the programs that requests need, so that the programs can be compiled before the engine runs them.

A program is compiled for certain shapes and for a certain sampling plan (see `sampler.Plan`). Compiling takes seconds,
or minutes for a large model. If the engine compiled a program in the middle of a step, all running answers would stand
still. A server therefore compiles programs in another thread (see `Engine.compile`), and adds a request to the engine
only when no program that it needs is missing (see `Engine.missing`).

A program with a larger sampling plan gives the same tokens, only more slowly. So a missing program can be replaced with
a compiled program whose plan includes the plan of the missing one.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from nanochat_jax.engine import cache as kv
from nanochat_jax.engine import sampler
from nanochat_jax.engine.request import TOP_LOGPROBS, Request
from nanochat_jax.engine.scheduler import (
    LAST_CHUNK,
    PREFILL_CHUNK,
    PREFILL_ROWS,
    PREFILL_TOKENS,
    SMALLEST_PROMPT,
)


class Program(NamedTuple):
    """A function of programs.py or cache.py, and what it is compiled for. Fields that do not apply are left out."""

    name: str  # "prefill", "prefill_chunk", "insert_rows", "first_tokens" or "decode"
    rows: int = 0  # the number of prefilled rows
    width: int = 0  # the number of tokens that `prefill_chunk` appends
    size: int = 0  # positions in each prefilled row
    cache: int = 0  # positions in each row of the engine's cache
    plan: sampler.Plan = sampler.Plan(0, False)
    top: int = 0  # how many of the most likely tokens to report at each position
    score: bool = False  # whether `prefill` scores the prompt

    def replaces(self, other: "Program") -> bool:
        """Whether this program computes everything that `other` computes."""
        mine, its = self.plan, other.plan
        larger = mine.width >= its.width and mine.noise >= its.noise and self.top >= other.top
        return larger and self._replace(plan=its, top=other.top) == other


class Shapes(NamedTuple):
    """The numbers that determine the shapes of an engine's programs."""

    context: int
    slots: int
    vocab_size: int

    @property
    def prompt_sizes(self) -> list[int]:
        """The lengths to which prompts are padded."""
        return _buckets(self.context, SMALLEST_PROMPT)

    @property
    def cache_sizes(self) -> list[int]:
        return _buckets(self.context, kv.SMALLEST)

    @property
    def batches(self) -> list[int]:
        """The possible numbers of rows in a batched prefill."""
        return [1, PREFILL_ROWS] if self.slots >= PREFILL_ROWS - 1 else [1]

    def of(self, requests: Sequence[Request], others: Sequence[Request]) -> Iterator[Program]:
        """Yields the programs that `requests` need while `others` are also in the engine."""
        both = [*requests, *others]
        plan, top = self.sampling(both)
        for request in requests:
            yield from self.prefill(kv.bucket(len(request.ids), self.context, SMALLEST_PROMPT), request.score)
        if any(request.max_tokens for request in requests):
            least = min(len(request.ids) for request in both)
            most = max(min(self.context, len(request.ids) + request.max_tokens) for request in both)
            yield from self.sample(plan, top, kv.bucket(least, self.context), kv.bucket(most, self.context))

    def sampling(self, requests: Iterable[Request]) -> tuple[sampler.Plan, int]:
        """Returns the sampling plan and the number of top log-probabilities for a step that decodes all `requests`."""
        requests = list(requests)
        settings = sampler.settings([(request, 0) for request in requests], self.vocab_size)
        return self.plan(settings, requests)

    def plan(self, settings: sampler.Settings, requests: Iterable[Request]) -> tuple[sampler.Plan, int]:
        """Like `sampling`, for requests whose sampling settings are known."""
        asked = any(request.top_logprobs for request in requests)
        return sampler.plan(settings, self.vocab_size), self.most_top if asked else 0

    @property
    def most_top(self) -> int:
        return min(TOP_LOGPROBS, self.vocab_size)

    def for_any_settings(self, program: Program) -> Program:
        """Returns the program that replaces `program` and all programs that differ from it only in the sampling."""
        if program.name not in ("first_tokens", "decode"):
            return program
        return program._replace(plan=sampler.Plan(self.vocab_size, True), top=self.most_top)

    def prefill(self, size: int, score: bool = False) -> Iterator[Program]:
        """Yields the programs with which `Scheduler` may prefill a prompt of `size` tokens, padding included."""
        if size <= PREFILL_CHUNK or score:
            for rows in self.batches:
                if rows == 1 or rows * size <= PREFILL_TOKENS:
                    yield Program("prefill", rows=rows, size=size, score=score)
                    yield from self._insert(rows, size)
        if not score:
            row = kv.bucket(size, self.context)
            widths = [LAST_CHUNK, PREFILL_CHUNK] if size > PREFILL_CHUNK else [LAST_CHUNK]
            widths = [min(width, row) for width in widths if width < size]  # short prompts are not split
            for width in widths:
                yield Program("prefill_chunk", width=width, size=row)
            if widths:
                yield from self._insert(1, row)

    def _insert(self, rows: int, size: int) -> Iterator[Program]:
        for cache in self.cache_sizes:
            if cache >= size:
                yield Program("insert_rows", rows=rows, size=size, cache=cache)

    def sample(self, plan: sampler.Plan, top: int, least: int, most: int) -> Iterator[Program]:
        """Yields the programs that sample and decode while each cache row has `least` to `most` positions."""
        for rows in self.batches:
            yield Program("first_tokens", rows=rows, plan=plan, top=top)
        for cache in self.cache_sizes:
            if least <= cache <= most:
                yield Program("decode", cache=cache, plan=plan, top=top)


def _buckets(context: int, smallest: int) -> list[int]:
    sizes = [kv.bucket(0, context, smallest)]
    while sizes[-1] < context:
        sizes.append(kv.bucket(sizes[-1] + 1, context, smallest))
    return sizes
