"""Text generation for everybody: terminal, server, evaluation and reinforcement learning are four callers of it.

The engine has a fixed number of slots, each holding one sample that is being generated. A step either starts waiting
requests in the free slots (prefill, first token) or decodes a chunk: a fixed number of tokens for all slots, in one
compiled program with sampling, stopping and forced tokens on the device. The host looks once a chunk: it hands out
tokens, frees the slots of finished samples, and runs the calculator. A row that has closed a python block pauses on the
device for the rest of its chunk, so nothing is sampled before the calculator's answer is forced into the text.

The host owns the schedule (who sits where, how far, what is forced next) and sends it with every chunk; the device
keeps only the weights and the cache. One thread may use an engine.

Weights that lie on a mesh of several devices spread the slots over its data axis, where their number divides: each
device keeps the cache of its own slots and decodes them.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.engine import cache as kv
from nanochat_jax.engine import programs, sampler
from nanochat_jax.engine.calculator import use_calculator
from nanochat_jax.engine.programs import MAX_STOP_IDS, Schedule
from nanochat_jax.engine.request import TOP_LOGPROBS, Event, Request, Sample, Scores, TopLogprobs
from nanochat_jax.engine.slots import Prefilled, Prompt, Sequence, Slots, common_prefix_length
from nanochat_jax.model import gpt
from nanochat_jax.parallel import sharding

PREFILL_ROWS = 4  # prompts that are prefilled together, where as many of similar length wait
PREFILL_TOKENS = 2048  # and only up to this many tokens: longer prompts fill the device by themselves
PREFILL_CHUNK = 512  # tokens of a longer prompt at a time; samples under way get their chunk in between
LAST_PIECE = 64  # and at its end, if no more are left: of a chat's next turn little is new
SMALLEST_PROMPT = 32  # length bucket


class Engine:
    """`params` of shape `model_cfg` behind `slots` samples at a time, decoded `chunk` tokens at a time in `dtype`.

    The tokenizer is used for the ids of special tokens and for the calculator's text. Dtype and slots are fixed, so
    that what a request gets never follows the load, up to rounding: what the cache holds of a prompt's beginning may
    have been computed in other pieces.
    """

    def __init__(
        self, params: gpt.Params, model_cfg: GPTConfig, tokenizer, slots: int = 8, dtype=jnp.float32, chunk: int = 16
    ):
        if slots < 1:
            raise UserError(f"slots is {slots}: must be at least 1")
        self.model_cfg, self.tokenizer, self.slots, self.dtype, self.chunk = model_cfg, tokenizer, slots, dtype, chunk
        self._special = {
            name: tokenizer.special(f"<|{name}|>")
            for name in ("python_start", "python_end", "output_start", "output_end", "assistant_end", "bos")
        }
        mesh = sharding.mesh_of(params)
        self._mesh = mesh if mesh is not None and mesh.size > 1 and slots % sharding.replicas(mesh) == 0 else None
        self._slots = Slots(slots)
        self._queue: deque[Prompt] = deque()
        self._prefilled: Prefilled | None = None
        self._next_id = 0
        self.set_params(params)
        where = sharding.batch_sharding(self._mesh) or self._params["wte"].sharding
        self._cache = kv.make(model_cfg, slots, kv.bucket(0, model_cfg.sequence_len), dtype, where)

    def set_params(self, params: gpt.Params) -> None:
        """Generates with these weights from now on. The engine must be idle, and float32 arrays may be shared with it:
        donating them elsewhere ends their use here too."""
        assert not self.busy, "set_params with samples under way"
        params = gpt.cast(params, self.dtype)
        if mesh := sharding.mesh_of(params):  # whole on every device, once, wherever training keeps them
            params = jax.device_put(params, sharding.replicated(mesh))
        self._params = programs.lay_out(params)
        self._slots.forget()  # keys and values of other weights

    @property
    def running(self) -> int:
        """Samples in slots."""
        return sum(row is not None for row in self._slots.rows)

    @property
    def waiting(self) -> int:
        """Samples that wait for a slot."""
        return sum(prompt.left for prompt in self._queue) + (self._prefilled.left if self._prefilled else 0)

    @property
    def cached(self) -> int:
        """Tokens of all samples in the cache, which has room for slots * sequence_len."""
        return sum(row.length for row in self._slots.rows if row)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    # -----------------------------------------------------------------------------
    # For callers that have the engine for themselves

    def run(self, requests: Iterable[Request], progress: Callable[[int, int], object] | None = None):
        """Generates for all requests and returns list[list[Sample]], in their order, each with its n samples.

        `progress(samples finished, samples wanted)` is called as samples finish. The engine must be idle.
        """
        assert not self.busy, "run with other samples under way"
        requests = list(requests)
        for request in requests:
            self.check(request)
        ids = [self.add(request) for request in requests]
        parts = {(i, s): [] for i, request in zip(ids, requests, strict=True) for s in range(request.n)}
        done = 0
        try:
            while self.busy:
                before = done
                for event in self.step():
                    parts[event.request, event.sample].append(event)
                    done += event.finish_reason is not None
                if progress and done > before:
                    progress(done, len(parts))
        finally:
            for i in ids:  # after an error or Ctrl-C; otherwise there is nothing left
                self.cancel(i)
        return [[_join(parts[i, s]) for s in range(r.n)] for i, r in zip(ids, requests, strict=True)]

    def stream(self, request: Request) -> Iterator[Event]:
        """Events of one request as they come. The engine must be idle; closing the iterator cancels the request."""
        assert not self.busy, "stream with other samples under way"
        i = self.add(request)
        try:
            while self.busy:
                yield from self.step()
        finally:
            self.cancel(i)

    # -----------------------------------------------------------------------------
    # For servers, which have many requests under way

    def add(self, request: Request) -> int:
        """Queues a request and returns its id. UserError for a request that cannot be served."""
        self.check(request)
        self._next_id += 1
        self._queue.append(Prompt(self._next_id, request))
        return self._next_id

    def cancel(self, id: int, sample: int | None = None) -> None:
        """Forgets a request; its slots are free at once. Unknown and finished ids are ignored.

        With `sample`, only that sample ends, which must have begun.
        """
        for slot, row in enumerate(self._slots.rows):
            if row and row.id == id and sample in (None, row.sample):
                self._slots.leave(slot)
        if sample is not None:
            return
        self._queue = deque(prompt for prompt in self._queue if prompt.id != id)
        if self._prefilled:
            for prompt in self._prefilled.prompts:
                if prompt.id == id:
                    prompt.started = prompt.request.n
            self._drop_prefilled()

    def step(self) -> list[Event]:
        """Starts waiting samples if a slot is free, else decodes a chunk; does both while a long prompt is prefilled.
        Returns what there is to tell."""
        free = self._slots.empty()
        if free and self.waiting and self._prefill(len(free)):
            return self._admit(free)
        return self._advance() if self.running else []

    def warmup(self, temperature: float, top_k: int) -> Iterator[int]:
        """Compiles what requests with these settings need, for prompts of one bucket after the other. The engine must
        be idle whenever it is asked to go on; yields the bucket's size after every few programs."""
        context, size = self.model_cfg.sequence_len, 0
        while size < context:
            size = kv.bucket(size + 1, context, SMALLEST_PROMPT)
            prompt = [size % self.model_cfg.vocab_size] * max(1, size - 4)  # new, and so computed whole
            settings = functools.partial(Request, max_tokens=2, temperature=temperature, top_k=top_k, stop_ids=())
            self.run([settings(prompt)])
            yield size
            self.run([settings([*prompt, 1])])  # goes on from the one before, where that spares work
            yield size
            if self.slots >= PREFILL_ROWS - 1:
                self.run([settings([i, *prompt]) for i in range(min(self.slots, PREFILL_ROWS))])  # prefilled together
                yield size

    def close(self) -> None:
        """Gives the device's memory back. The engine cannot be used afterwards."""
        self._slots, self._queue, self._prefilled = Slots(self.slots), deque(), None
        self._cache = self._params = None

    # -----------------------------------------------------------------------------
    # Starting samples

    def check(self, request: Request) -> None:
        """UserError for what cannot be generated. Any thread may ask."""
        context, vocab = self.model_cfg.sequence_len, self.model_cfg.vocab_size
        if len(request.ids) == 0:
            raise UserError("the prompt is empty: it needs at least one token, such as <|bos|>")
        if len(request.ids) > context:
            raise UserError(f"the prompt has {len(request.ids)} tokens: the model's context holds {context}")
        if not all(0 <= i < vocab for i in request.ids):
            raise UserError(f"the prompt holds a token id outside the vocabulary (0 to {vocab - 1})")
        for name, least in (("max_tokens", 0 if request.score else 1), ("n", 1)):
            if getattr(request, name) < least:
                raise UserError(f"{name} is {getattr(request, name)}: must be at least {least}")
        if not 0 <= request.top_logprobs <= TOP_LOGPROBS:
            raise UserError(f"top_logprobs is {request.top_logprobs}: must be from 0 to {TOP_LOGPROBS}")
        if not (math.isfinite(request.temperature) and request.temperature >= 0):
            raise UserError(f"temperature is {request.temperature}: must be 0 (greedy) or a positive number")
        if request.top_k < 0:
            raise UserError(f"top_k is {request.top_k}: must be 0 (off) or positive")
        if not 0 < request.top_p <= 1:
            raise UserError(f"top_p is {request.top_p}: must be above 0 and at most 1 (off)")
        if request.stop_ids is not None and len(request.stop_ids) > MAX_STOP_IDS:
            raise UserError(f"{len(request.stop_ids)} stop tokens: at most {MAX_STOP_IDS} are supported")

    def _admit(self, free: list[int]) -> list[Event]:
        """Starts as many samples of the prefilled prompts as there are free slots; returns their first tokens."""
        done, batch = [], self._prefilled
        for prompt, scores in zip(batch.prompts, batch.scores, strict=True):
            if prompt.request.max_tokens == 0:  # with its scores everything is said
                done += [Event(prompt.id, i, [], [], [], "length", None, scores) for i in range(prompt.left)]
                prompt.started = prompt.request.n
        pairs = [(i, prompt) for i, prompt in enumerate(batch.prompts) for _ in range(prompt.left)]
        started = {}  # slot -> row of the prefill
        for slot, (i, prompt) in zip(free, pairs, strict=False):
            self._slots.enter(slot, self._row(prompt))
            prompt.started += 1
            started[slot] = i
        self._drop_prefilled()
        if not started:
            return done

        self._fit(batch.size)
        pad = [0] * (self.slots - len(started))
        source, target = (np.array([*column, *pad], np.int32) for column in (started.values(), started))
        self._cache = kv.insert(self._cache, batch.prefix, source, target, np.int32(len(started)))

        rows = [row if slot in started else None for slot, row in enumerate(self._slots.rows)]
        settings = self._settings(rows)
        position = np.array([row.length + 1 if row else 0 for row in rows], np.int32)
        prefilled = np.array([started.get(slot, 0) for slot in range(self.slots)], np.int32)
        plan = sampler.plan(settings, self.model_cfg.vocab_size)
        out = programs.first(
            batch.logits, prefilled, settings, position, plan=plan, top=self._top(rows), mesh=self._mesh
        )
        tokens, logprobs, *top = (x[:, None] for x in jax.device_get(out))
        for slot, i in started.items():
            new = tokens[slot].tolist(), logprobs[slot].tolist(), [1], [x[slot] for x in top]
            done.append(self._record(slot, *new, batch.scores[i], batch.cached_tokens))
            batch.cached_tokens = 0  # the other samples' prompt is the same one
        return done

    def _prefill(self, free: int) -> bool:
        """Does a piece of the next prompts' prefill, and says whether that was all of it."""
        if self._prefilled is None:
            self._prefilled = self._prefill_next(free)
        batch = self._prefilled
        if batch.logits is None:
            ids = batch.prompts[0].request.ids
            width = min(batch.size, _piece(len(ids) - batch.done))
            start = min(batch.done, batch.size - width)  # the last piece may begin within the one before it
            piece = ids[start : start + width]
            padded = np.zeros((1, width), np.int32)
            padded[0, : len(piece)] = piece
            batch.prefix, logits = programs.extend(
                self._params, padded, np.array([len(piece)], np.int32), batch.prefix, np.array([start], np.int32),
                model_cfg=self.model_cfg, dtype=self.dtype,
            )  # fmt: skip
            batch.done = start + width
            if batch.done >= len(ids):
                batch.logits = logits
        return batch.logits is not None

    def _prefill_next(self, free: int) -> Prefilled:
        """Runs the first prompt of the queue, or makes the row that its pieces go to. In one go it runs together with
        others of its bucket, if nearly a full batch of them waits, but for those that can go on from what it leaves.

        Two batch sizes only, since each is compiled for every length bucket.
        """
        prompt = self._queue[0]
        length, score = self._bucket(prompt), prompt.request.score
        if not score and (begun := self._in_pieces(prompt, length)):
            self._queue.popleft()
            return begun

        def alike(other: Prompt) -> bool:
            if self._bucket(other) != length or other.request.score != score:
                return False
            shared = 0 if score or other is prompt else common_prefix_length(other.request.ids[:-1], prompt.request.ids)
            return not _spares(shared, len(other.request.ids), length)

        prompts = list(islice(filter(alike, self._queue), min(free, PREFILL_ROWS)))
        together = len(prompts) >= PREFILL_ROWS - 1 and length * PREFILL_ROWS <= PREFILL_TOKENS
        prompts = prompts if together else [prompt]
        for prompt in prompts:
            self._queue.remove(prompt)
        ids = np.zeros((PREFILL_ROWS if together else 1, length), np.int32)
        lengths = np.ones(len(ids), np.int32)
        for i, prompt in enumerate(prompts):
            lengths[i] = len(prompt.request.ids)
            ids[i, : lengths[i]] = prompt.request.ids
        top = min(TOP_LOGPROBS, self.model_cfg.vocab_size) if score else None
        prefix, logits, scored = programs.prefill(
            self._params, ids, lengths, model_cfg=self.model_cfg, dtype=self.dtype, top=top
        )
        scores = [None] * len(prompts)
        if score:
            scored = jax.device_get(scored)
            scores = [_scores(prompt.request, *(x[i] for x in scored)) for i, prompt in enumerate(prompts)]
        return Prefilled(prefix, logits, length, prompts, scores)

    def _bucket(self, prompt: Prompt) -> int:
        return kv.bucket(len(prompt.request.ids), self.model_cfg.sequence_len, SMALLEST_PROMPT)

    def _in_pieces(self, prompt: Prompt, length: int) -> Prefilled | None:
        """The row that the pieces of a prompt go to: a copy of one that begins like it, where that spares work, or an
        empty one for a long prompt. None: it is better run in one go."""
        ids = prompt.request.ids
        slot, shared = self._slots.longest(ids[:-1])  # what follows the last token is yet to be computed
        if _spares(shared, len(ids), length):
            size = kv.bucket(length, self.model_cfg.sequence_len)
            row = kv.row(self._cache, np.int32(slot), size=size, mesh=self._mesh)
        elif length > PREFILL_CHUNK:
            size, shared = length, 0
            row = kv.make(self.model_cfg, 1, size, self.dtype, self._params["wte"].sharding)
        else:
            return None
        return Prefilled(row, None, size, [prompt], [None], shared, shared)

    def _drop_prefilled(self) -> None:
        """Frees the memory of the prefilled prompts once all their samples are started."""
        if self._prefilled and not self._prefilled.left:
            self._prefilled = None

    def _row(self, prompt: Prompt) -> Sequence:
        """The next sample of `prompt`, as it is before its first token."""
        request = prompt.request
        default = (self._special["assistant_end"], self._special["bos"])
        stop_ids = default if request.stop_ids is None else tuple(request.stop_ids)
        # The last token need not fit into the context, since nothing is computed from it.
        left = min(request.max_tokens, self.model_cfg.sequence_len - len(request.ids) + 1)
        return Sequence(prompt.id, prompt.started, request, stop_ids, list(request.ids), left)

    # -----------------------------------------------------------------------------
    # Decoding

    def _advance(self) -> list[Event]:
        """Decodes one chunk and returns each row's new tokens."""
        self._fit()
        settings = self._settings(self._slots.rows)
        schedule = self._schedule()
        self._cache, out = programs.decode(
            self._params, self._cache, schedule, settings,
            model_cfg=self.model_cfg, dtype=self.dtype, python_end=self._special["python_end"],
            plan=sampler.plan(settings, self.model_cfg.vocab_size), top=self._top(self._slots.rows), mesh=self._mesh,
        )  # fmt: skip
        tokens, logprobs, counts, *top = jax.device_get(out)
        events = []
        for slot, row in enumerate(self._slots.rows):
            if row is None:
                continue
            count = int(counts[slot])
            forced = min(int(schedule.forced_count[slot]), count)
            for _ in range(forced):
                row.forced.popleft()
            mask = [0] * forced + [1] * (count - forced)
            new = tokens[slot, :count].tolist(), logprobs[slot, :count].tolist(), mask, [x[slot, :count] for x in top]
            events.append(self._record(slot, *new))
        self._slots.cut(self._size)  # one that has ended at the last position had that written over since
        return events

    @property
    def _size(self) -> int:
        """Positions of the cache."""
        return self._cache["k"][0].shape[2]

    def _fit(self, at_least: int = 0) -> None:
        """Gives the cache the smallest size that holds all rows to the end of the next chunk."""
        needed = [row.length + min(self.chunk, row.left) for row in self._slots.rows if row]
        size = kv.bucket(max(at_least, *needed), self.model_cfg.sequence_len)
        if size != self._size:
            self._cache = kv.resize(self._cache, size)
        self._slots.cut(size)

    def _settings(self, rows: list[Sequence | None]) -> sampler.Settings:
        """How to sample for each slot; empty ones are greedy, which costs nothing."""
        requests = [row.request if row else None for row in rows]
        return sampler.Settings(
            seed=np.array([r.seed % 2**32 if r else 0 for r in requests], np.uint32),
            sample=np.array([row.sample if row else 0 for row in rows], np.int32),
            temperature=np.array([r.temperature if r else 0 for r in requests], np.float32),
            top_k=np.array([min(r.top_k, self.model_cfg.vocab_size) if r else 0 for r in requests], np.int32),
            top_p=np.array([r.top_p if r else 1 for r in requests], np.float32),
        )

    def _top(self, rows: list[Sequence | None]) -> int:
        """How many of the likeliest tokens the device must name."""
        asked = any(row.request.top_logprobs for row in rows if row)
        return min(TOP_LOGPROBS, self.model_cfg.vocab_size) if asked else 0

    def _schedule(self) -> Schedule:
        b = self.slots
        zeros = functools.partial(np.zeros, dtype=np.int32)
        schedule = Schedule(
            zeros(b), zeros(b), zeros(b), np.zeros(b, bool), np.zeros(b, bool),
            np.full((b, MAX_STOP_IDS), -1, np.int32), zeros((b, self.chunk)), zeros(b),
        )  # fmt: skip
        for slot, row in enumerate(self._slots.rows):
            schedule.length[slot] = self._slots.length(slot)  # of an empty slot too: what it holds is not written over
            if row is None:
                continue
            schedule.token[slot], schedule.left[slot] = row.ids[-1], row.left
            schedule.active[slot], schedule.tools[slot] = True, row.request.tools
            schedule.stop[slot, : len(row.stop_ids)] = row.stop_ids
            forced = list(row.forced)[: self.chunk]
            schedule.forced[slot, : len(forced)] = forced
            schedule.forced_count[slot] = len(forced)
        return schedule

    def _record(
        self, slot: int, ids: list[int], logprobs: list[float], mask: list[int], top: list[np.ndarray],
        scores: Scores | None = None, cached_tokens: int = 0,
    ) -> Event:  # fmt: skip
        """Takes note of a row's new tokens: frees its slot if it is complete, else runs the tool it called."""
        row = self._slots.rows[slot]
        row.ids += ids
        row.left -= len(ids)
        reason = "stop" if ids[-1] in row.stop_ids else None if row.left else "length"
        if reason:
            self._slots.leave(slot)
        elif row.request.tools:
            for token in ids:
                self._follow(row, token)
        asked = row.request.top_logprobs
        named = _top_logprobs(*top, asked) if asked else None
        return Event(row.id, row.sample, ids, mask, logprobs, reason, named, scores, cached_tokens)

    def _follow(self, row: Sequence, token: int) -> None:
        """The tool state machine: python_start, an expression, python_end -> the result is forced, if there is one."""
        if token == self._special["python_start"]:
            row.expression = []
        elif token == self._special["python_end"] and row.expression is not None:
            result = use_calculator(self.tokenizer.decode(row.expression)) if row.expression else None
            row.expression = None
            if result is not None:
                answer = self.tokenizer.encode(result)
                row.forced.extend([self._special["output_start"], *answer, self._special["output_end"]])
        elif row.expression is not None:
            row.expression.append(token)


def _piece(tokens: int) -> int:
    """How many tokens of a prompt are computed next, padding included, where so many are left."""
    return LAST_PIECE if tokens <= LAST_PIECE else PREFILL_CHUNK


def _spares(shared: int, tokens: int, length: int) -> bool:
    """Whether a prompt of so many tokens, in the bucket `length`, is less work if the first `shared` are there."""

    def work(tokens: int) -> int:  # in pieces, padding included
        whole, rest = divmod(tokens, PREFILL_CHUNK)
        return whole * PREFILL_CHUNK + (_piece(rest) if rest else 0)

    # Of half a prompt or less, as every chat has with every other, little would be gained.
    return 2 * shared >= tokens and work(tokens - shared) < (length if length <= PREFILL_CHUNK else work(tokens))


def _top_logprobs(ids: np.ndarray, logprobs: np.ndarray, count: int) -> list[TopLogprobs]:
    """Rows of tokens and log-probabilities, each [t,top], as lists of pairs."""
    pairs = zip(ids[:, :count].tolist(), logprobs[:, :count].tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in pairs]


def _scores(request: Request, logprobs: np.ndarray, ids: np.ndarray, top: np.ndarray) -> Scores:
    """Scores of a prompt from what the device says after each of its tokens, the padding behind them included."""
    known = len(request.ids) - 1
    named = _top_logprobs(ids[:known], top[:known], request.top_logprobs)
    return Scores([None, *logprobs[:known].tolist()], [None, *named])


def _join(events: list[Event]) -> Sample:
    ids, mask, logprobs = (
        [x for event in events for x in getattr(event, name)] for name in ("ids", "mask", "logprobs")
    )
    return Sample(ids, mask, logprobs, events[-1].finish_reason)
