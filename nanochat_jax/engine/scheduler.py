"""Decides what the engine runs next: which prompts are prefilled, which slots their samples get, and what is decoded.

- Continuous batching: a sample takes a slot as soon as one is free. The other slots keep decoding.
- Batched prefill: if several short prompts of similar length are waiting, they are prefilled together.
- Chunked prefill: a long prompt is computed one chunk per step, and the running sequences decode in between.
- Prefix caching: a prompt may start from a copy of a cache row that already holds the prompt's first tokens.
- Asynchronous scheduling: on a GPU, the next chunk starts before the host has read the last one. It waits for the host
  if a sample waits for a slot, or if a running sample has called the calculator.

This module runs on the host, and works only with lists of token ids.
"""

import dataclasses
from collections import deque
from dataclasses import dataclass
from itertools import islice

from nanochat_jax.engine import cache as kv
from nanochat_jax.engine.request import Request
from nanochat_jax.engine.slots import Prompt, Sequence, Slots, common_prefix_length

# A full batch has PREFILL_ROWS prompts, and at most PREFILL_TOKENS tokens, padding included. Prompts that are too long
# for a full batch are prefilled one at a time, because a single long prompt keeps the device busy.
PREFILL_ROWS = 4
PREFILL_TOKENS = 2048
PREFILL_CHUNK = 512  # tokens in a chunk; a prompt with more tokens is prefilled in several chunks
LAST_CHUNK = 64  # width of the last chunk if at most 64 tokens are left, as is often true for the next turn of a chat
SMALLEST_PROMPT = 32  # shorter prompts are padded to this many tokens


@dataclass(frozen=True)
class PrefillBatch:
    """Whole prompts to prefill together. Row i holds prompts[i], padded to `size` tokens. Other rows are padding."""

    prompts: list[Prompt]
    rows: int
    size: int
    score: bool  # whether to return the log-probabilities of the prompts' tokens


@dataclass(frozen=True)
class NewRow:
    """A new row of `size` positions for a chunked prefill."""

    size: int
    copied_slot: int | None  # the slot whose cache row is copied to the new row; None if the new row starts empty


@dataclass(frozen=True)
class PrefillChunk:
    """One chunk of a prompt's tokens, padded to `width` tokens. The chunk begins at position `start` of the prompt."""

    ids: list[int]
    start: int
    width: int
    new_row: NewRow | None  # the row to create before the first chunk; None for later chunks


@dataclass
class Prefill:
    """The current prefill. It is kept until all samples of its prompts have been started.

    Row i holds prompts[i].
    """

    prompts: list[Prompt]
    size: int  # positions in each row
    computed: int  # tokens computed or copied so far in each row, padding included

    @property
    def complete(self) -> bool:
        return self.computed >= len(self.prompts[0].request.ids)

    @property
    def left(self) -> int:
        """The number of samples that still wait for a slot."""
        return sum(prompt.left for prompt in self.prompts)


@dataclass(frozen=True)
class Schedule:
    """The work of one step. A prefill, if any, runs first. Then the step either starts samples or decodes a chunk."""

    prefill: PrefillBatch | PrefillChunk | None
    sequences: dict[int, Sequence]  # slot -> sequence that gets tokens in this step
    first_tokens: dict[int, int]  # slot in which a sample starts -> the sample's prefilled row; empty if none starts
    scored: list[Prompt]  # prompts that asked only for scores, not for new tokens
    lengths: list[int]  # number of cached tokens in each slot, including free slots
    cache_size: int  # positions in each row of the cache
    in_flight: bool = False  # whether the device was already told to decode this chunk
    next_in_flight: bool = False  # whether the device should start the next chunk before the host reads this one

    @property
    def decodes(self) -> bool:
        return bool(self.sequences) and not self.first_tokens


class Scheduler:
    """Holds the slots and the queue of prompts.

    The model's context is `context` tokens long. A step decodes at most `chunk` tokens for each slot. `stop_ids` are
    the default stop tokens, for requests whose own `stop_ids` is None.

    If `asynchronous` is set, the device may start the next chunk before the host has read the last one.
    """

    def __init__(self, slots: int, context: int, chunk: int, stop_ids: tuple[int, ...], asynchronous: bool):
        self.context, self.chunk, self.stop_ids, self.asynchronous = context, chunk, stop_ids, asynchronous
        self.in_flight = False  # whether the device was told to decode the chunk after the last one scheduled
        self.slots = Slots(slots)
        self.queue: deque[Prompt] = deque()
        self.prefill: Prefill | None = None
        self.cache_size = kv.bucket(0, context)  # positions in each row

    @property
    def waiting(self) -> int:
        """The number of samples that wait for a slot."""
        return sum(prompt.left for prompt in self.queue) + (self.prefill.left if self.prefill else 0)

    @property
    def requests(self) -> list[Request]:
        """The requests with samples that run or wait."""
        prompts = [*self.queue, *(self.prefill.prompts if self.prefill else [])]
        prompts += [sequence.prompt for sequence in self.slots.running().values()]
        return [prompt.request for prompt in prompts]

    def add(self, id: int, request: Request) -> None:
        """Puts a request at the end of the queue."""
        self.queue.append(Prompt(id, request))

    def cancel(self, id: int, sample: int | None = None) -> None:
        """Drops a request and frees its slots.

        If `sample` is given, drops only the sample with this index. This sample must have been started.
        """
        for slot, sequence in self.slots.running().items():
            if sequence.prompt.id == id and sample in (None, sequence.sample):
                self.slots.release(slot)
        if sample is not None:
            return
        self.queue = deque(prompt for prompt in self.queue if prompt.id != id)
        if self.prefill:
            for prompt in self.prefill.prompts:
                if prompt.id == id:
                    prompt.started = prompt.request.n
            self._drop_finished_prefill()

    def abandon(self, schedule: Schedule) -> None:
        """Cleans up after a failed step: drops the prefill, and frees the slots of samples that were about to start."""
        for slot in schedule.first_tokens:
            self.slots.discard(slot)
        self.prefill, self.in_flight = None, False

    def schedule(self) -> Schedule:
        """Decides what the next step runs.

        Prompts leave the queue when their prefill starts, and samples take slots when they start. Waiting samples come
        first: running sequences decode only if no waiting sample can start. But a chunk that is in flight comes before
        everything else.
        """
        running, free = self.slots.running(), self.slots.free()
        if self.in_flight:
            return self._schedule_decoding(running, None)
        prefill = self._next_prefill(len(free)) if free and self.waiting else None
        if free and self.prefill and self.prefill.complete:
            return self._start_samples(free, self.prefill, prefill)
        if running:
            self._fit_cache()
        return self._schedule_decoding(running, prefill)

    def _schedule_decoding(self, running: dict[int, Sequence], prefill: PrefillBatch | PrefillChunk | None) -> Schedule:
        """Schedules a chunk for the running sequences, and the next chunk too if nothing must happen in between."""
        # A row pauses at the end of a tool call, until the host sends its state again. In a chunk that is in flight by
        # then, it gets no tokens. A sample that has called the calculator is likely to call it again, so the next chunk
        # waits for the host while such a sample runs: losing a whole chunk takes longer than the host does.
        in_flight = self.in_flight
        self.in_flight = (
            self.asynchronous
            and not self.waiting
            and any(sequence.left > self.chunk for sequence in running.values())
            and not any(sequence.called for sequence in running.values())
            and all(s.length + min(2 * self.chunk, s.left) <= self.cache_size for s in running.values())
        )
        schedule = self._schedule(prefill, running)
        return dataclasses.replace(schedule, in_flight=in_flight, next_in_flight=self.in_flight)

    def _schedule(
        self,
        prefill: PrefillBatch | PrefillChunk | None,
        sequences: dict[int, Sequence],
        first_tokens: dict[int, int] | None = None,
        scored: list[Prompt] | None = None,
    ) -> Schedule:
        lengths = [self.slots.cached_length(slot) for slot in range(len(self.slots.sequences))]
        return Schedule(prefill, sequences, first_tokens or {}, scored or [], lengths, self.cache_size)

    # -----------------------------------------------------------------------------
    # Prefill

    def _next_prefill(self, free: int) -> PrefillBatch | PrefillChunk | None:
        """Returns the next prefill, with at most `free` prompts.

        Returns None while samples of the previous prefill still wait for slots.
        """
        if self.prefill:
            return None if self.prefill.complete else self._next_chunk(self.prefill)
        return self._start_chunked_prefill() or self._start_batched_prefill(free)

    def _start_chunked_prefill(self) -> PrefillChunk | None:
        """Returns the first chunk of the queue's first prompt, or None if the prompt should be prefilled as a whole.

        If prefix caching saves work, the prompt's row starts as a copy of the cache row that shares the longest prefix
        with the prompt. Otherwise, only a long prompt is prefilled in chunks, and its row starts empty.
        """
        prompt = self.queue[0]
        ids, length = prompt.request.ids, self._bucket(prompt)
        if prompt.request.score:  # scores need the logits after every token, so the prompt is prefilled as a whole
            return None
        # The last token is always computed, because sampling needs the logits after it.
        slot, shared = self.slots.longest_prefix(ids[:-1])
        if prefix_caching_saves_work(shared, len(ids), length):
            row = NewRow(kv.bucket(length, self.context), slot)
        elif length > PREFILL_CHUNK:
            row, shared = NewRow(length, None), 0
        else:
            return None
        self.queue.popleft()
        prompt.cached_tokens = shared
        self.prefill = Prefill([prompt], row.size, computed=shared)
        return self._next_chunk(self.prefill, row)

    def _next_chunk(self, prefill: Prefill, new_row: NewRow | None = None) -> PrefillChunk:
        """Returns the next chunk of `prefill`, which has a single prompt."""
        ids = prefill.prompts[0].request.ids
        width = min(prefill.size, _chunk_width(len(ids) - prefill.computed))
        # The last chunk must end within the row. It may therefore overlap the chunk before it.
        start = min(prefill.computed, prefill.size - width)
        prefill.computed = start + width
        return PrefillChunk(list(ids[start : start + width]), start, width, new_row)

    def _start_batched_prefill(self, free: int) -> PrefillBatch:
        """Returns a batch of the first prompt in the queue, alone or with other prompts of the same length bucket.

        The batch leaves out prompts that share a long prefix with the first prompt. These prompts wait until they can
        copy the first prompt's cache row. A batch has either one row or PREFILL_ROWS rows, because every other number
        of rows would need more compiled programs.
        """
        first = self.queue[0]
        length, score = self._bucket(first), first.request.score

        def fits(other: Prompt) -> bool:
            if self._bucket(other) != length or other.request.score != score:
                return False
            shared = 0 if score or other is first else common_prefix_length(other.request.ids[:-1], first.request.ids)
            return not prefix_caching_saves_work(shared, len(other.request.ids), length)

        prompts = list(islice(filter(fits, self.queue), min(free, PREFILL_ROWS)))
        together = len(prompts) >= PREFILL_ROWS - 1 and length * PREFILL_ROWS <= PREFILL_TOKENS
        if not together:
            prompts = [first]
        for prompt in prompts:
            self.queue.remove(prompt)
        self.prefill = Prefill(prompts, length, computed=length)
        return PrefillBatch(prompts, PREFILL_ROWS if together else 1, length, score)

    def _bucket(self, prompt: Prompt) -> int:
        """Returns the length of a prompt after padding, in tokens."""
        return kv.bucket(len(prompt.request.ids), self.context, SMALLEST_PROMPT)

    def _drop_finished_prefill(self) -> None:
        """Ends the prefill if all samples of its prompts have been started."""
        if self.prefill and not self.prefill.left:
            self.prefill = None

    # -----------------------------------------------------------------------------
    # Slots and the cache

    def _start_samples(
        self, free: list[int], prefilled: Prefill, prefill: PrefillBatch | PrefillChunk | None
    ) -> Schedule:
        """Fills the free slots with samples of the prefilled prompts."""
        scored = [prompt for prompt in prefilled.prompts if prompt.left and prompt.request.max_tokens == 0]
        for prompt in scored:
            prompt.started = prompt.request.n
        ready = [(row, prompt) for row, prompt in enumerate(prefilled.prompts) for _ in range(prompt.left)]
        sequences, first_tokens = {}, {}
        for slot, (row, prompt) in zip(free, ready, strict=False):
            sequences[slot], first_tokens[slot] = self._start_sample(prompt), row
            self.slots.assign(slot, sequences[slot])
        self._drop_finished_prefill()
        if sequences:
            self._fit_cache(prefilled.size)
        return self._schedule(prefill, sequences, first_tokens, scored)

    def _start_sample(self, prompt: Prompt) -> Sequence:
        request = prompt.request
        stop_ids = self.stop_ids if request.stop_ids is None else tuple(request.stop_ids)
        # The last token of an answer need not fit into the context, because the model never reads it.
        left = min(request.max_tokens, self.context - len(request.ids) + 1)
        prompt.started += 1
        return Sequence(prompt, prompt.started - 1, stop_ids, list(request.ids), left)

    def _fit_cache(self, at_least: int = 0) -> None:
        """Chooses the smallest cache size that holds each running sequence and its next chunk."""
        needed = [sequence.length + min(self.chunk, sequence.left) for sequence in self.slots.running().values()]
        self.cache_size = kv.bucket(max(at_least, *needed), self.context)
        self.slots.truncate(self.cache_size)


def prefix_caching_saves_work(shared: int, tokens: int, length: int) -> bool:
    """Returns whether a cached prefix of `shared` tokens saves work for a prompt of `tokens` tokens.

    `length` is the prompt's length after padding. For example, in a prompt of 1010 tokens, 1000 cached tokens save
    work, but 10 do not.
    """

    def work(tokens: int) -> int:  # the number of tokens to compute, padding included
        whole, rest = divmod(tokens, PREFILL_CHUNK)
        return whole * PREFILL_CHUNK + (_chunk_width(rest) if rest else 0)

    # All chats begin with the same few tokens. A prefix is reused only if it covers at least half of the prompt,
    # because a shorter prefix would save little.
    return 2 * shared >= tokens and work(tokens - shared) < (length if length <= PREFILL_CHUNK else work(tokens))


def _chunk_width(tokens: int) -> int:
    """Returns the width of the next chunk if `tokens` tokens are left to compute: 700 -> 512, 64 -> 64."""
    return LAST_CHUNK if tokens <= LAST_CHUNK else PREFILL_CHUNK
