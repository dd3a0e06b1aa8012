"""The engine generates all text: for the terminal, the server, evaluation and reinforcement learning.

`add` puts a request into the scheduler's queue. When a slot is free, a step prefills the request's prompt. If much of
the prompt is already cached, only the rest is computed. One step may prefill several prompts, and a long prompt is
prefilled in parts over several steps. Then each of the request's n samples takes a slot. The prompt's keys and values
are copied into the slot's cache row, and the sample's first token is drawn.

After that, each step decodes a chunk: a fixed number of tokens for every slot. One compiled program decodes the whole
chunk on the device. After each chunk, the host adds the new tokens to their sequences, runs the calculator, and frees
the slots of finished samples. The keys and values of a finished sample stay in its slot's row, as a cache for later
prompts that begin with the same tokens.

The model calls the calculator by writing an expression between the tokens python_start and python_end. At python_end,
the sample pauses for the rest of the chunk. The tokens of the calculator's result are then forced: the next chunk
begins with them, and sampling continues after them.

`Engine.step` has three parts. First, the scheduler decides what to run (scheduler.py). Then the model runner runs it on
the device (model_runner.py). Last, the engine adds the new tokens to their sequences.

The host sends the state of all slots to the device with every chunk. Between chunks, the device keeps only the weights
and the cache. Only one thread may use an engine.

Asynchronous scheduling is an exception: on a GPU, if no sample waits for a slot or has called the calculator, the next
chunk starts from the state on the device, while the host still processes the tokens of the last chunk. This gives the
same tokens, but a request that arrives in the meantime must wait for the chunk to end.

The weights may lie on a mesh of several devices. Each replica then decodes an equal share of the slots, and keeps only
the cache rows of its share. If the number of slots is not a multiple of the number of replicas, every device decodes
all slots.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.engine import cache as kv
from nanochat_jax.engine.ahead import Program
from nanochat_jax.engine.calculator import use_calculator
from nanochat_jax.engine.model_runner import ModelRunner, Output
from nanochat_jax.engine.programs import Tokens, min_slots
from nanochat_jax.engine.request import MAX_STOP_IDS, TOP_LOGPROBS, Event, Request, Sample, Scores, TopLogprobs
from nanochat_jax.engine.scheduler import PrefillBatch, Schedule, Scheduler
from nanochat_jax.engine.slots import Sequence
from nanochat_jax.model import gpt
from nanochat_jax.tokenizer import Tokenizer


class Engine:
    """Generates up to `slots` samples at a time. In each step, a sample gets up to `chunk` tokens.

    The tokenizer provides the ids of special tokens, decodes the expressions for the calculator, and encodes the
    calculator's results. The model computes in `dtype`. The dtype and the number of slots are fixed, so the result of a
    request does not depend on other requests. Only rounding errors may differ, because a cached prefix may have been
    computed in chunks of another size.

    If `asynchronous` is set, the next chunk may start before the host has read the last one. By default, it is set only
    on GPUs, because on a CPU, both would share the cores.
    """

    def __init__(
        self,
        params: gpt.Params,
        model_cfg: GPTConfig,
        tokenizer: Tokenizer,
        slots: int = 8,
        dtype: DTypeLike = jnp.float32,
        chunk: int = 16,
        asynchronous: bool | None = None,
    ):
        if slots < 1:
            raise UserError(f"slots is {slots}: must be at least 1")
        slots = max(slots, min_slots())
        self.model_cfg, self.tokenizer, self.slots, self.dtype, self.chunk = model_cfg, tokenizer, slots, dtype, chunk
        self._special = {
            name: tokenizer.special(f"<|{name}|>")
            for name in ("python_start", "python_end", "output_start", "output_end", "assistant_end", "bos")
        }
        self._asynchronous = jax.default_backend() == "gpu" if asynchronous is None else asynchronous
        self._next_id = 0
        self._reset_scheduler()
        self._runner = ModelRunner(
            params, model_cfg, slots, chunk, dtype, self._special["python_end"], self._scheduler.cache_size
        )

    def _reset_scheduler(self) -> None:
        stop_ids = (self._special["assistant_end"], self._special["bos"])
        self._scheduler = Scheduler(self.slots, self.model_cfg.sequence_len, self.chunk, stop_ids, self._asynchronous)

    def set_params(self, params: gpt.Params) -> None:
        """Replaces the weights. The engine must be idle.

        A float32 engine may use the caller's arrays without copying them. If the caller donates one of these arrays to
        a compiled function, it must set new weights before the engine runs again.
        """
        assert not self.busy, "set_params with samples under way"
        self._runner.set_params(params)
        self._scheduler.slots.clear_cache()  # the cached keys and values were computed with the old weights

    @property
    def running(self) -> int:
        """The number of samples that occupy a slot."""
        return len(self._scheduler.slots.running())

    @property
    def waiting(self) -> int:
        """The number of samples that wait for a slot."""
        return self._scheduler.waiting

    @property
    def cached(self) -> int:
        """The number of cached tokens of all running samples, at most slots * sequence_len."""
        return sum(sequence.length for sequence in self._scheduler.slots.running().values())

    @property
    def busy(self) -> bool:
        """Whether any sample is running or waiting."""
        return bool(self.running or self.waiting)

    # -----------------------------------------------------------------------------
    # For callers that do not share the engine

    def run(
        self, requests: Iterable[Request], progress: Callable[[int, int], object] | None = None
    ) -> list[list[Sample]]:
        """Generates all samples of all requests. Returns n samples per request, in the order of the requests.

        Calls `progress(finished, total)` whenever samples finish; both numbers count samples. The engine must be idle.
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
            for i in ids:  # after an error or Ctrl-C, some requests are unfinished
                self.cancel(i)
        return [[_join(parts[i, s]) for s in range(r.n)] for i, r in zip(ids, requests, strict=True)]

    def stream(self, request: Request) -> Generator[Event, None, None]:
        """Runs one request and yields its events. The engine must be idle. Closing the iterator cancels the request."""
        assert not self.busy, "stream with other samples under way"
        i = self.add(request)
        try:
            while self.busy:
                yield from self.step()
        finally:
            self.cancel(i)

    # -----------------------------------------------------------------------------
    # For servers, which handle many requests at once

    def add(self, request: Request) -> int:
        """Queues a request and returns its id. Raises UserError if the request cannot be served."""
        self.check(request)
        self._next_id += 1
        self._scheduler.add(self._next_id, request)
        return self._next_id

    def cancel(self, id: int, sample: int | None = None) -> None:
        """Ends a request and frees its slots at once. Does nothing if the request is unknown or finished.

        If `sample` is given, ends only the sample with this index. This sample must have been started.
        """
        self._scheduler.cancel(id, sample)
        self._free_unused()

    def step(self) -> list[Event]:
        """Runs one step, and returns the new tokens as events.

        If samples are waiting and a slot is free, the step starts samples. Otherwise, it decodes a chunk. While a long
        prompt is being prefilled, each step does two things: it prefills one part of the prompt, and it decodes a
        chunk.
        """
        schedule = self._scheduler.schedule()
        try:
            return self._postprocess(schedule, self._runner.run(schedule))
        except BaseException:
            self._scheduler.abandon(schedule)
            self._runner.drop_prefill()
            self._runner.drop_chunk()
            raise

    def missing(self, requests: list[Request]) -> list[Program]:
        """Returns the programs that must be compiled before `requests` can run without delaying other samples.

        Programs that sample are returned with a plan for all settings, so that the next request with unusual settings
        need not wait too.
        """
        shapes, compiled_for = self._runner.shapes, self._runner.compiled_for
        needed = shapes.of(requests, self._scheduler.requests)
        missing = [program for program in needed if compiled_for(program) is None]
        return list(dict.fromkeys(shapes.for_any_settings(program) for program in missing))

    def compile(self, program: Program) -> None:
        """Compiles a program. Any thread may call this, also while another one runs steps."""
        self._runner.compile(program)

    @property
    def replaced(self) -> list[Program]:
        """Programs that would have been faster than the ones that were run in their place. See ahead.py."""
        return list(self._runner.replaced)

    def warmup(self, temperature: float, top_k: int) -> Iterator[int]:
        """Compiles programs, one bucket of prompt lengths after the other. Any thread may advance the iterator.

        First come the programs for requests with these settings. After each bucket, yields its size in tokens. Then
        come programs that can serve requests with any settings; for each, yields the context.
        """
        shapes, smallest = self._runner.shapes, 0
        plan, top = shapes.sampling([Request([0], temperature=temperature, top_k=top_k)])
        for size in shapes.prompt_sizes:
            cache = kv.bucket(size, shapes.context)
            for program in (*shapes.prefill(size), *shapes.sample(plan, top, smallest, cache)):
                self.compile(program)
            smallest = cache + 1
            yield size
        for program in shapes.sample(plan, top, 0, shapes.context):
            self.compile(shapes.for_any_settings(program))
            yield shapes.context

    def close(self) -> None:
        """Frees the engine's memory on the device. The engine cannot be used afterwards."""
        self._reset_scheduler()
        self._runner.close()

    def check(self, request: Request) -> None:
        """Raises UserError if a request cannot be served. Any thread may call this method."""
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

    # -----------------------------------------------------------------------------
    # The last part of a step: new tokens become events

    def _postprocess(self, schedule: Schedule, output: Output) -> list[Event]:
        """Adds the new tokens to their sequences, and returns them as events."""
        if output.scores and isinstance(schedule.prefill, PrefillBatch):
            # The prefill may have more rows than prompts. The last rows are then padding.
            for prompt, *scores in zip(schedule.prefill.prompts, *output.scores, strict=False):
                prompt.scores = _scores(prompt.request, *scores)
        events = [
            Event(prompt.id, sample, [], [], [], "length", None, prompt.scores)
            for prompt in schedule.scored
            for sample in range(prompt.request.n)
        ]
        if output.tokens:
            # All rows are converted at once, because numpy takes long for every single row.
            ids, logprobs, counts = (x.tolist() for x in output.tokens[:3])
            for slot, sequence in schedule.sequences.items():
                # A row that paused in the last chunk gets no tokens from the chunk that was already in flight.
                if count := counts[slot]:
                    new = ids[slot][:count], logprobs[slot][:count]
                    events.append(self._extend(slot, sequence, *new, output.tokens))
        if schedule.decodes:  # decoding overwrites the last position of a full row, even in a free slot
            self._scheduler.slots.truncate(schedule.cache_size)
        self._free_unused()
        return events

    def _extend(self, slot: int, sequence: Sequence, ids: list[int], logprobs: list[float], tokens: Tokens) -> Event:
        """Appends the new tokens `ids` to the sequence in `slot`, and returns them as an event.

        If the sequence is now complete, frees the slot. Otherwise, looks for tool calls in the new tokens. `tokens`
        holds the new tokens of all slots.
        """
        prompt, request, count = sequence.prompt, sequence.request, len(ids)
        forced = min(len(sequence.forced), count)
        for _ in range(forced):
            sequence.forced.popleft()
        is_first = sequence.generated == 0
        sequence.ids += ids
        sequence.left -= count
        reason = "stop" if ids[-1] in sequence.stop_ids else None if sequence.left else "length"
        if reason:
            self._scheduler.slots.release(slot)
        elif request.tools:
            if self._special["python_start"] in ids or self._special["python_end"] in ids:
                sequence.called = True
            if sequence.called:
                for token in ids:
                    self._follow_tool_call(sequence, token)
        top = None
        if request.top_logprobs:
            top = _top_logprobs(tokens.top_ids[slot, :count], tokens.top_logprobs[slot, :count], request.top_logprobs)
        return Event(
            prompt.id,
            sequence.sample,
            ids,
            [0] * forced + [1] * (count - forced),
            logprobs,
            reason,
            top,
            scores=prompt.scores if is_first else None,
            cached_tokens=prompt.cached_tokens if is_first and sequence.sample == 0 else 0,
        )

    def _follow_tool_call(self, sequence: Sequence, token: int) -> None:
        """Processes a new token, which may begin, continue or end a tool call.

        A tool call consists of python_start, an expression and python_end. At python_end, the calculator evaluates the
        expression. Its result, if any, is queued as forced tokens.
        """
        if token == self._special["python_start"]:
            sequence.expression = []
        elif token == self._special["python_end"] and sequence.expression is not None:
            result = use_calculator(self.tokenizer.decode(sequence.expression)) if sequence.expression else None
            sequence.expression = None
            if result is not None:
                answer = self.tokenizer.encode(result)
                sequence.forced.extend([self._special["output_start"], *answer, self._special["output_end"]])
        elif sequence.expression is not None:
            sequence.expression.append(token)

    def _free_unused(self) -> None:
        """Frees the memory of prefilled prompts once all their samples have been started, and of a chunk in flight once
        all its sequences have ended."""
        if self._scheduler.prefill is None:
            self._runner.drop_prefill()
        if not self.running:
            self._scheduler.in_flight = False
            self._runner.drop_chunk()


def _top_logprobs(ids: np.ndarray, logprobs: np.ndarray, count: int) -> list[TopLogprobs]:
    """Converts two arrays [t,top] to t lists. Each list has `count` pairs (token id, log-probability)."""
    pairs = zip(ids[:, :count].tolist(), logprobs[:, :count].tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in pairs]


def _scores(request: Request, logprobs: np.ndarray, top_ids: np.ndarray, top_logprobs: np.ndarray) -> Scores:
    """Converts a prompt's row of PromptScores to Scores, and leaves out the entries for padding."""
    known = len(request.ids) - 1
    named = _top_logprobs(top_ids[:known], top_logprobs[:known], request.top_logprobs)
    return Scores([None, *logprobs[:known].tolist()], [None, *named])


def _join(events: list[Event]) -> Sample:
    """Joins all events of a finished sample into a Sample."""
    ids, mask, logprobs = (
        [x for event in events for x in getattr(event, name)] for name in ("ids", "mask", "logprobs")
    )
    reason = events[-1].finish_reason
    assert reason is not None, "the sample is not finished"
    return Sample(ids, mask, logprobs, reason)
