"""Decides what the engine runs next: which prompts are prefilled, which slots their samples get, and what is decoded.

- continuous batching: a sample takes a slot as soon as one is free, while the sequences in other slots go on decoding.
- batched prefill: short prompts of similar length that wait at the same time are prefilled together.
- chunked prefill: a long prompt is computed one chunk per step, and the running sequences decode in between.
- prefix caching: if it saves work, a prompt starts from a copy of a cache row with the prompt's first tokens.

All of this is host code on lists of token ids; nothing here touches a device.
"""

from collections import deque
from dataclasses import dataclass
from itertools import islice

from nanochat_jax.engine import cache as kv
from nanochat_jax.engine.request import Request
from nanochat_jax.engine.slots import Prompt, Sequence, Slots, common_prefix_length

PREFILL_ROWS = 4  # the number of prompts in a full batch
# A full batch has at most this many tokens, padding included. Prompts that are too long for a full batch are
# prefilled one by one, since each of them alone keeps the device busy.
PREFILL_TOKENS = 2048
PREFILL_CHUNK = 512  # tokens in a chunk; a prompt with more tokens is prefilled in several chunks
LAST_CHUNK = 64  # width of the last chunk if at most 64 tokens are left; a chat's next turn is often so short
SMALLEST_PROMPT = 32  # shorter prompts are padded to this many tokens


@dataclass(frozen=True)
class PrefillBatch:
    """Whole prompts to prefill together. Row i holds prompts[i], padded to `size` tokens; further rows are padding."""

    prompts: list[Prompt]
    rows: int
    size: int
    score: bool  # whether to return the log-probabilities of the prompts' tokens


@dataclass(frozen=True)
class NewRow:
    """A row of `size` positions, to be filled by a chunked prefill: a copy of a slot's cache row, or an empty row."""

    size: int
    copied_slot: int | None


@dataclass(frozen=True)
class PrefillChunk:
    """One chunk of a prompt's tokens, padded to `width` tokens. It fills the prompt's row from position `start` on."""

    ids: list[int]
    start: int
    width: int
    new_row: NewRow | None  # the row to create before a prompt's first chunk is computed; None for later chunks


@dataclass
class Prefill:
    """Prompts that are being prefilled, or that have been prefilled but still have samples waiting for slots.

    Row i holds prompts[i].
    """

    prompts: list[Prompt]
    size: int  # positions in each row
    computed: int  # tokens computed in each row, padding included

    @property
    def complete(self) -> bool:
        return self.computed >= len(self.prompts[0].request.ids)

    @property
    def left(self) -> int:
        """The number of samples that still wait for a slot."""
        return sum(prompt.left for prompt in self.prompts)


@dataclass(frozen=True)
class Schedule:
    """What one step runs, in this order: a prefill, then either the first tokens of samples or a chunk of decoding."""

    prefill: PrefillBatch | PrefillChunk | None
    sequences: dict[int, Sequence]  # slot -> sequence that gets tokens in this step
    first_tokens: dict[int, int]  # slot -> prefilled row for the slot's first token; empty if this step decodes a chunk
    scored: list[Prompt]  # prompts that asked only for scores, not for new tokens
    lengths: list[int]  # number of tokens in each slot's row; decoding must not overwrite the tokens of free slots
    cache_size: int  # positions in each row of the cache

    @property
    def decodes(self) -> bool:
        return bool(self.sequences) and not self.first_tokens


class Scheduler:
    """Holds the slots and the queue of prompts, for a model with a context of `context` tokens.

    A step decodes at most `chunk` tokens for each slot. `stop_ids` are the stop tokens of every request whose own
    `stop_ids` is None.
    """

    def __init__(self, slots: int, context: int, chunk: int, stop_ids: tuple[int, ...]):
        self.context, self.chunk, self.stop_ids = context, chunk, stop_ids
        self.slots = Slots(slots)
        self.queue: deque[Prompt] = deque()
        self.prefill: Prefill | None = None
        self.cache_size = kv.bucket(0, context)  # positions in each row

    @property
    def waiting(self) -> int:
        """The number of samples that wait for a slot."""
        return sum(prompt.left for prompt in self.queue) + (self.prefill.left if self.prefill else 0)

    def add(self, id: int, request: Request) -> None:
        """Puts a request at the end of the queue."""
        self.queue.append(Prompt(id, request))

    def cancel(self, id: int, sample: int | None = None) -> None:
        """Drops a request and frees its slots. With `sample`, drops only that sample, which must have been started."""
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
        """Cleans up after a failed step: drops the prefill, and frees the slots that were to get their first token."""
        for slot in schedule.first_tokens:
            self.slots.discard(slot)
        self.prefill = None

    def schedule(self) -> Schedule:
        """Decides what the next step runs.

        Prompts that the step prefills leave the queue, and samples that it starts take slots. If a slot is free,
        waiting samples come first: running sequences decode only if no sample is ready to start.
        """
        free = self.slots.free()
        prefill = self._next_prefill(len(free)) if free and self.waiting else None
        if free and self.prefill and self.prefill.complete:
            return self._start_samples(free, self.prefill, prefill)
        running = self.slots.running()
        if running:
            self._fit_cache()
        return self._schedule(prefill, running)

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
        """Returns the next prefill, of at most `free` prompts.

        Returns None if samples of the previous prefill have yet to start.
        """
        if self.prefill:
            return None if self.prefill.complete else self._next_chunk(self.prefill)
        return self._start_chunked_prefill() or self._start_batched_prefill(free)

    def _start_chunked_prefill(self) -> PrefillChunk | None:
        """Returns the first chunk of the first prompt in the queue, or None if that prompt should be prefilled whole.

        If prefix caching saves work, the prompt's row starts as a copy of the cache row that has the longest prefix in
        common with the prompt. Otherwise, the row of a long prompt starts empty.
        """
        prompt = self.queue[0]
        ids, length = prompt.request.ids, self._bucket(prompt)
        if prompt.request.score:  # a score needs the logits after every token, so the prompt is prefilled whole
            return None
        # The prompt's last token is always computed, since the logits after it are needed.
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
        start = min(prefill.computed, prefill.size - width)  # the last chunk may overlap the chunk before it
        prefill.computed = start + width
        return PrefillChunk(list(ids[start : start + width]), start, width, new_row)

    def _start_batched_prefill(self, free: int) -> PrefillBatch:
        """Prefills the first prompt of the queue, in a batch with others of its length bucket if enough are waiting.

        A prompt that could start from a copy of the first prompt's cache row is left out, since it waits for that row.
        A batch has either one row or PREFILL_ROWS rows, since each number of rows is compiled for every length bucket.
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
        """Returns the number of tokens that a prompt is padded to."""
        return kv.bucket(len(prompt.request.ids), self.context, SMALLEST_PROMPT)

    def _drop_finished_prefill(self) -> None:
        """Ends the prefill once all samples of its prompts have been started."""
        if self.prefill and not self.prefill.left:
            self.prefill = None

    # -----------------------------------------------------------------------------
    # Slots and the cache

    def _start_samples(
        self, free: list[int], prefilled: Prefill, prefill: PrefillBatch | PrefillChunk | None
    ) -> Schedule:
        """Starts samples of the prefilled prompts, one in each free slot, until no such sample is left."""
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
        """Returns the sequence of a prompt's next sample, which has no new tokens yet."""
        request = prompt.request
        stop_ids = self.stop_ids if request.stop_ids is None else tuple(request.stop_ids)
        # The last token of an answer need not fit into the context, since nothing is computed from it.
        left = min(request.max_tokens, self.context - len(request.ids) + 1)
        prompt.started += 1
        return Sequence(prompt, prompt.started - 1, stop_ids, list(request.ids), left)

    def _fit_cache(self, at_least: int = 0) -> None:
        """Chooses the smallest cache size with room for all running sequences and the next chunk of each."""
        needed = [sequence.length + min(self.chunk, sequence.left) for sequence in self.slots.running().values()]
        self.cache_size = kv.bucket(max(at_least, *needed), self.context)
        self.slots.truncate(self.cache_size)


def prefix_caching_saves_work(shared: int, tokens: int, length: int) -> bool:
    """Returns whether a cached prefix of `shared` tokens saves work for a prompt of `tokens` tokens.

    `length` is the prompt's length with padding. Example: True if 1000 of 1010 tokens are cached, False if only 10 are.
    """

    def work(tokens: int) -> int:  # the number of tokens to compute, padding included
        whole, rest = divmod(tokens, PREFILL_CHUNK)
        return whole * PREFILL_CHUNK + (_chunk_width(rest) if rest else 0)

    # Any two chats share their first few tokens, but a prefix of less than half a prompt would gain little.
    return 2 * shared >= tokens and work(tokens - shared) < (length if length <= PREFILL_CHUNK else work(tokens))


def _chunk_width(tokens: int) -> int:
    """Returns the width of the next chunk if `tokens` tokens are left to compute: 700 -> 512, 64 -> 64."""
    return LAST_CHUNK if tokens <= LAST_CHUNK else PREFILL_CHUNK
