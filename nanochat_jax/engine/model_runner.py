"""The model runner holds the weights and the cache on the device, and runs the steps that the scheduler plans.

It converts a Schedule to padded numpy arrays and passes them to the compiled functions of programs.py. Then it copies
the new tokens back to the host.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nanochat_jax.config import GPTConfig
from nanochat_jax.engine import cache as kv
from nanochat_jax.engine import programs, sampler
from nanochat_jax.engine.ahead import Program, Shapes
from nanochat_jax.engine.programs import DecodeInputs, Fixed, PromptScores, Tokens
from nanochat_jax.engine.request import MAX_STOP_IDS
from nanochat_jax.engine.scheduler import PrefillBatch, PrefillChunk, Schedule
from nanochat_jax.engine.slots import Sequence
from nanochat_jax.model import gpt
from nanochat_jax.model.precision import accum_dtype
from nanochat_jax.parallel import sharding


class Output(NamedTuple):
    """The results of one step. Results that the schedule did not ask for are None."""

    tokens: Tokens | None
    scores: PromptScores | None


class Decoding(NamedTuple):
    """A chunk that was dispatched to the device. Its arrays may not be computed yet."""

    program: Program
    following: DecodeInputs  # the inputs of the chunk after this one, if it starts before the host has read this one
    settings: sampler.Settings
    tokens: tuple[jax.Array, ...]  # the fields of Tokens


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
        self.shapes = Shapes(model_cfg.sequence_len, slots, model_cfg.vocab_size)
        self.replaced: set[Program] = set()  # programs that were not compiled when needed; others ran in their place
        self._compiled: dict[Program, Any] = {}  # the programs that `compile` has compiled
        self._prefix: kv.KV = {}  # the cache rows of the current prefill; {} if there is no prefill
        self._logits: jax.Array | None = None  # [p,v] next-token logits of the prompts in the current prefill
        self._in_flight: Decoding | None = None  # the chunk that the device decodes while the host reads the last one
        self.set_params(params)
        self._where = self.params["wte"].sharding  # on every device
        self._no_forced = jax.device_put((np.zeros((slots, chunk), np.int32), np.zeros(slots, np.int32)), self._where)
        self._cache_where = sharding.batch_sharding(mesh) or self._where
        self.cache = kv.allocate(model_cfg, slots, cache_size, dtype, self._cache_where)

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

    def drop_chunk(self) -> None:
        """Forgets the chunk in flight, whose tokens nobody will read."""
        self._in_flight = None

    def close(self) -> None:
        """Frees the memory that the runner holds on the device. The runner cannot be used afterwards."""
        self.drop_prefill()
        self.drop_chunk()
        self.cache, self.params = {}, {}

    def _prefill_batch(self, batch: PrefillBatch) -> PromptScores | None:
        ids = np.zeros((batch.rows, batch.size), np.int32)
        lengths = np.ones(batch.rows, np.int32)
        for i, prompt in enumerate(batch.prompts):
            lengths[i] = len(prompt.request.ids)
            ids[i, : lengths[i]] = prompt.request.ids
        program = Program("prefill", rows=batch.rows, size=batch.size, score=batch.score)
        self._prefix, self._logits, scores = self._run(program, self.params, ids, lengths)
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
        program = Program("prefill_chunk", width=chunk.width, size=kv.size_of(self._prefix))
        self._prefix, self._logits = self._run(program, self.params, ids, length, self._prefix, start)

    def _first_tokens(self, schedule: Schedule) -> Tokens:
        """For each new sample, copies the prefilled row of its prompt into its slot, and draws its first token."""
        assert self._logits is not None, "first tokens without a prefill"
        started, prefilled = schedule.first_tokens, len(self._logits)
        pad = [0] * (self.slots - len(started))
        source, target = (np.array([*column, *pad], np.int32) for column in (started.values(), started))
        program = Program("insert_rows", prefilled, size=kv.size_of(self._prefix), cache=kv.size_of(self.cache))
        self.cache = self._run(program, self.cache, self._prefix, source, target, np.int32(len(started)))
        sequences = [schedule.sequences.get(slot) for slot in range(self.slots)]
        rows = np.array([started.get(slot, 0) for slot in range(self.slots)], np.int32)
        position = np.array([sequence.length + 1 if sequence else 0 for sequence in sequences], np.int32)
        settings, plan, top = self._sampling(sequences)
        program = Program("first_tokens", prefilled, plan=plan, top=top)
        ids, logprobs, *named = (
            x[:, None] for x in jax.device_get(self._run(program, self._logits, rows, settings, position))
        )
        return Tokens(ids, logprobs, np.ones(self.slots, np.int32), *named)

    def _decode(self, schedule: Schedule) -> Tokens:
        current = self._in_flight if schedule.in_flight else self._dispatch(*self._chunk(schedule))
        assert current is not None, "no chunk is in flight"
        self._in_flight = (
            self._dispatch(current.program, current.following, current.settings) if schedule.next_in_flight else None
        )
        return Tokens(*jax.device_get(current.tokens))

    def _chunk(self, schedule: Schedule) -> tuple[Program, DecodeInputs, sampler.Settings]:
        """Returns the program that decodes a chunk, and its inputs."""
        sequences = [schedule.sequences.get(slot) for slot in range(self.slots)]
        settings, plan, top = self._sampling(sequences)
        program = Program("decode", cache=kv.size_of(self.cache), plan=plan, top=top)
        # The inputs of a chunk in flight are on the device. So all inputs are put there, because jit would compile
        # another program for arrays of the host.
        inputs = jax.device_put((self._decode_inputs(sequences, schedule.lengths), settings), self._where)
        return program, *inputs

    def _dispatch(self, program: Program, inputs: DecodeInputs, settings: sampler.Settings) -> Decoding:
        """Tells the device to decode a chunk, and does not wait for it."""
        self.cache, state, tokens = self._run(program, self.params, self.cache, inputs, settings)
        following = inputs._replace(**state._asdict(), forced=self._no_forced[0], forced_count=self._no_forced[1])
        return Decoding(program, following, settings, tokens)

    def _sampling(self, sequences: list[Sequence | None]) -> tuple[sampler.Settings, sampler.Plan, int]:
        """Returns all slots' sampling settings, the sampler's plan, and how many of the likeliest tokens to report."""
        settings = sampler.settings([(s.request, s.sample) if s else None for s in sequences], self.shapes.vocab_size)
        return settings, *self.shapes.plan(settings, (s.request for s in sequences if s))

    # -----------------------------------------------------------------------------
    # Programs that are compiled ahead of time

    def _run(self, program: Program, *args: Any) -> Any:
        """Runs a program, or a compiled program that can replace it. If neither is compiled, compiles `program` now."""
        best = self.compiled_for(program)
        if best is None:
            function, static = self._function(program)
            return function(*args, **static)
        if best != program:
            self.replaced.add(program)
        return self._compiled[best](*args)

    def compiled_for(self, program: Program) -> Program | None:
        """Returns `program` if it was compiled ahead of time. Otherwise, returns the cheapest compiled program that can
        replace it, or None."""
        if program in self._compiled:
            return program
        found = [other for other in list(self._compiled) if other.replaces(program)]
        return min(found, key=lambda other: (other.plan, other.top), default=None)

    def compile(self, program: Program) -> None:
        """Compiles a program without running it. Any thread may call this."""
        if program not in self._compiled:
            function, static = self._function(program)
            self._compiled[program] = function.lower(*self._example(program), **static).compile()
        self.replaced.discard(program)

    def _function(self, program: Program) -> tuple[Any, dict[str, Any]]:
        """Returns the jitted function of a program, and its static arguments."""
        model_cfg, dtype, _, mesh = self.fixed
        if program.name == "prefill":
            top = self.shapes.most_top if program.score else None
            return programs.prefill, {"model_cfg": model_cfg, "dtype": dtype, "top": top}
        if program.name == "prefill_chunk":
            return programs.prefill_chunk, {"model_cfg": model_cfg, "dtype": dtype}
        if program.name == "insert_rows":
            return kv.insert_rows, {"mesh": mesh}
        if program.name == "first_tokens":
            return programs.first_tokens, {"plan": program.plan, "top": program.top, "mesh": mesh}
        assert program.name == "decode", program
        return programs.decode, {"fixed": self.fixed, "plan": program.plan, "top": program.top}

    def _example(self, program: Program) -> tuple:
        """Returns example arguments of the program's shapes. The cache and the logits are not allocated."""
        model_cfg, dtype = self.fixed.model_cfg, self.fixed.dtype

        def on_device(
            shape: tuple[int, ...], dtype: DTypeLike, where: jax.sharding.Sharding = self._where
        ) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

        def cache(rows: int, size: int, where: jax.sharding.Sharding = self._where) -> dict:
            row = on_device((rows, model_cfg.n_kv_head, size, model_cfg.head_dim), kv.dtype_for(dtype), where)
            return {name: [row] * model_cfg.n_layer for name in ("k", "v")}

        def ints(*shape: int) -> np.ndarray:
            return np.zeros(shape, np.int32)

        rows, b = program.rows, self.slots
        if program.name == "prefill":
            return self.params, ints(rows, program.size), ints(rows)
        if program.name == "prefill_chunk":
            return self.params, ints(1, program.width), ints(1), cache(1, program.size), ints(1)
        if program.name == "insert_rows":
            return cache(b, program.cache, self._cache_where), cache(rows, program.size), ints(b), ints(b), np.int32(0)
        settings = sampler.settings([None] * b, self.shapes.vocab_size)
        if program.name == "first_tokens":
            logits = on_device((rows, model_cfg.vocab_size), accum_dtype(jnp.dtype(dtype)))
            return logits, ints(b), settings, ints(b)
        inputs = jax.tree.map(
            lambda x: on_device(x.shape, x.dtype), (self._decode_inputs([None] * b, [0] * b), settings)
        )
        return self.params, cache(b, program.cache, self._cache_where), *inputs

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
        used = {slot: sequence for slot, sequence in enumerate(sequences) if sequence}
        slots = list(used)
        inputs.token[slots] = [sequence.ids[-1] for sequence in used.values()]
        inputs.left[slots] = [sequence.left for sequence in used.values()]
        inputs.tools[slots] = [sequence.request.tools for sequence in used.values()]
        inputs.active[slots] = True
        for slot, sequence in used.items():
            if sequence.stop_ids:
                inputs.stop[slot, : len(sequence.stop_ids)] = sequence.stop_ids
            if sequence.forced:
                forced = list(sequence.forced)[: self.chunk]
                inputs.forced[slot, : len(forced)] = forced
                inputs.forced_count[slot] = len(forced)
        return inputs
