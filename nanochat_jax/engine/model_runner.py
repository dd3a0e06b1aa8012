"""The model runner holds the weights and the cache on the device, and runs the steps that the scheduler plans.

It converts a Schedule to padded numpy arrays and passes them to the compiled functions of programs.py. Then it copies
the new tokens back to the host.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from nanochat_jax.config import GPTConfig
from nanochat_jax.engine import cache as kv
from nanochat_jax.engine import programs, sampler
from nanochat_jax.engine.programs import DecodeInputs, Fixed, PromptScores, Tokens
from nanochat_jax.engine.request import MAX_STOP_IDS, TOP_LOGPROBS
from nanochat_jax.engine.scheduler import PrefillBatch, PrefillChunk, Schedule
from nanochat_jax.engine.slots import Sequence
from nanochat_jax.model import gpt
from nanochat_jax.parallel import sharding


class Output(NamedTuple):
    """The results of one step. Results that the schedule did not ask for are None."""

    tokens: Tokens | None
    scores: PromptScores | None


class ModelRunner:
    """Runs the schedules of an engine with `slots` slots."""

    def __init__(
        self,
        params: gpt.Params,
        model_cfg: GPTConfig,
        slots: int,
        chunk: int,
        dtype: DTypeLike,
        python_end: int,
        cache_size: int,
    ):
        mesh = sharding.mesh_of(params)
        if mesh is not None and (mesh.size == 1 or slots % sharding.replicas(mesh)):
            mesh = None
        self.slots, self.chunk, self.fixed = slots, chunk, Fixed(model_cfg, dtype, python_end, mesh)
        self._prefix: kv.KV = {}  # the cache rows of the current prefill; {} if there is no prefill
        self._logits: jax.Array | None = None  # [p,v] next-token logits of the prompts in the current prefill
        self.set_params(params)
        where = sharding.batch_sharding(mesh) or self.params["wte"].sharding
        self.cache = kv.allocate(model_cfg, slots, cache_size, dtype, where)

    def set_params(self, params: gpt.Params) -> None:
        """Replaces the weights with `params`. If these lie on a mesh, every device of the mesh gets all weights."""
        params = gpt.cast(params, self.fixed.dtype)
        if mesh := sharding.mesh_of(params):  # training may have sharded the weights, so gather them
            params = jax.device_put(params, sharding.replicated(mesh))
        self.params = programs.lay_out(params)

    def run(self, schedule: Schedule) -> Output:
        """Runs one step, and waits for its results."""
        tokens = scores = None
        if isinstance(schedule.prefill, PrefillBatch):
            scores = self._prefill_batch(schedule.prefill)
        elif schedule.prefill:
            self._prefill_chunk(schedule.prefill)
        if schedule.sequences:
            if kv.size_of(self.cache) != schedule.cache_size:
                self.cache = kv.resize(self.cache, schedule.cache_size)
            tokens = self._first_tokens(schedule) if schedule.first_tokens else self._decode(schedule)
        return Output(tokens, scores)

    def drop_prefill(self) -> None:
        """Frees the memory of the last prefill."""
        self._prefix, self._logits = {}, None

    def close(self) -> None:
        """Frees the memory that the runner holds on the device. The runner cannot be used afterwards."""
        self.drop_prefill()
        self.cache, self.params = {}, {}

    def _prefill_batch(self, batch: PrefillBatch) -> PromptScores | None:
        model_cfg, dtype, *_ = self.fixed
        ids = np.zeros((batch.rows, batch.size), np.int32)
        lengths = np.ones(batch.rows, np.int32)
        for i, prompt in enumerate(batch.prompts):
            lengths[i] = len(prompt.request.ids)
            ids[i, : lengths[i]] = prompt.request.ids
        top = min(TOP_LOGPROBS, model_cfg.vocab_size) if batch.score else None
        self._prefix, self._logits, scores = programs.prefill(
            self.params, ids, lengths, model_cfg=model_cfg, dtype=dtype, top=top
        )
        return jax.device_get(scores)

    def _prefill_chunk(self, chunk: PrefillChunk) -> None:
        model_cfg, dtype, _, mesh = self.fixed
        if row := chunk.new_row:
            if row.copied_slot is None:
                self._prefix = kv.allocate(model_cfg, 1, row.size, dtype, self.params["wte"].sharding)
            else:
                self._prefix = kv.copy_row(self.cache, np.int32(row.copied_slot), size=row.size, mesh=mesh)
        ids = np.zeros((1, chunk.width), np.int32)
        ids[0, : len(chunk.ids)] = chunk.ids
        length, start = np.array([len(chunk.ids)], np.int32), np.array([chunk.start], np.int32)
        self._prefix, self._logits = programs.prefill_chunk(
            self.params, ids, length, self._prefix, start, model_cfg=model_cfg, dtype=dtype
        )

    def _first_tokens(self, schedule: Schedule) -> Tokens:
        """For each new sample, copies its prompt's prefilled row into its slot, and draws its first token."""
        started = schedule.first_tokens
        pad = [0] * (self.slots - len(started))
        source, target = (np.array([*column, *pad], np.int32) for column in (started.values(), started))
        self.cache = kv.insert_rows(self.cache, self._prefix, source, target, np.int32(len(started)))
        sequences = [schedule.sequences.get(slot) for slot in range(self.slots)]
        rows = np.array([started.get(slot, 0) for slot in range(self.slots)], np.int32)
        position = np.array([sequence.length + 1 if sequence else 0 for sequence in sequences], np.int32)
        settings, plan, top = self._sampling(sequences)
        out = programs.first_tokens(self._logits, rows, settings, position, plan=plan, top=top, mesh=self.fixed.mesh)
        ids, logprobs, *named = (x[:, None] for x in jax.device_get(out))
        return Tokens(ids, logprobs, np.ones(self.slots, np.int32), *named)

    def _decode(self, schedule: Schedule) -> Tokens:
        sequences = [schedule.sequences.get(slot) for slot in range(self.slots)]
        settings, plan, top = self._sampling(sequences)
        inputs = self._decode_inputs(sequences, schedule.lengths)
        self.cache, out = programs.decode(
            self.params, self.cache, inputs, settings, fixed=self.fixed, plan=plan, top=top
        )
        return Tokens(*jax.device_get(out))

    def _sampling(self, sequences: list[Sequence | None]) -> tuple[sampler.Settings, sampler.Plan, int]:
        """Returns all slots' sampling settings, the sampler's plan, and how many of the most likely tokens to report.

        Free slots get greedy settings, because greedy sampling adds no operations to the plan.
        """
        requests = [sequence.request if sequence else None for sequence in sequences]
        vocab_size = self.fixed.model_cfg.vocab_size
        settings = sampler.Settings(
            seed=np.array([r.seed % 2**32 if r else 0 for r in requests], np.uint32),
            sample=np.array([sequence.sample if sequence else 0 for sequence in sequences], np.int32),
            temperature=np.array([r.temperature if r else 0 for r in requests], np.float32),
            top_k=np.array([min(r.top_k, vocab_size) if r else 0 for r in requests], np.int32),
            top_p=np.array([r.top_p if r else 1 for r in requests], np.float32),
        )
        asked = any(r.top_logprobs for r in requests if r)
        return settings, sampler.plan(settings, vocab_size), min(TOP_LOGPROBS, vocab_size) if asked else 0

    def _decode_inputs(self, sequences: list[Sequence | None], lengths: list[int]) -> DecodeInputs:
        b = self.slots
        zeros = functools.partial(np.zeros, dtype=np.int32)
        # Decoding writes to position `length` of every row, even in free slots. So `length` must be set for free slots
        # too, or their cached tokens would be overwritten.
        inputs = DecodeInputs(
            token=zeros(b),
            length=np.array(lengths, np.int32),
            left=zeros(b),
            active=np.zeros(b, bool),
            tools=np.zeros(b, bool),
            stop=np.full((b, MAX_STOP_IDS), -1, np.int32),
            forced=zeros((b, self.chunk)),
            forced_count=zeros(b),
        )
        for slot, sequence in enumerate(sequences):
            if sequence is None:
                continue
            inputs.token[slot], inputs.left[slot] = sequence.ids[-1], sequence.left
            inputs.active[slot], inputs.tools[slot] = True, sequence.request.tools
            inputs.stop[slot, : len(sequence.stop_ids)] = sequence.stop_ids
            forced = list(sequence.forced)[: self.chunk]
            inputs.forced[slot, : len(forced)] = forced
            inputs.forced_count[slot] = len(forced)
        return inputs
