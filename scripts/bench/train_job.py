"""Runs one measurement of our training step for `python -m scripts.bench train`.

The benchmark pipes this file into its own Python. The only argument is the job as JSON. The last line of output is one
line of JSON. The clock of the first step starts before JAX is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

START = time.perf_counter()  # the first step is timed from here

if TYPE_CHECKING:
    import jax

    from nanochat_jax.model import gpt

WARM_UP = 3  # steps before the clock starts
TRACED = 3  # steps in a trace
GIB = 2**30
COLLECTIVE = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)")


def device(job: dict) -> dict:
    """Describes the devices. `peak` is the FLOP/s of all devices in bfloat16, or None if it is unknown."""
    import jax

    from nanochat_jax.parallel import devices

    devices.start(job["device_type"])
    first = jax.devices()[0]
    return {
        "device": first.device_kind, "platform": first.platform, "devices": jax.device_count(),
        "peak": devices.peak_flops(), "version": jax.__version__,
    }  # fmt: skip


def ours(job: dict) -> dict:
    """Measures our training step. If the shape is refused, returns {"refused": message}.

    first     seconds from START to the end of the first step
    compile   seconds that XLA took to compile the step, or to load it from the compilation cache
    steps     seconds of each step, in a loop like that of training
    programs  median seconds of the nested programs that `_programs` describes
    peak      peak memory in bytes: of the first device, or of this process on a CPU
    """
    os.environ["JAX_COMPILATION_CACHE_DIR"] = job["cache"]  # takes precedence over the cache of training
    from nanochat_jax.config import UserError

    try:
        return _Measurement(job).run()
    except UserError as error:
        return {"refused": str(error)}


class _Measurement:
    """The compiled step, its state and a batch of random tokens."""

    def __init__(self, job: dict) -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np

        from nanochat_jax.config import Base, GPTConfig
        from nanochat_jax.model import attention
        from nanochat_jax.parallel import devices, sharding
        from nanochat_jax.training import optim
        from nanochat_jax.training.batch_shape import BatchShape
        from nanochat_jax.training.run import choose_blocks, new_state, optimizer_of, peak_memory, state_shapes
        from nanochat_jax.training.step import execution, make_step

        self.job, self.model_cfg, rows = job, GPTConfig(**job["shape"]), job["rows"]
        self.flags = Base(compute_dtype=job["dtype"], **job["flags"])
        devices.start(job["device_type"])
        self._check_memory(16 * self.model_cfg.num_params)  # before XLA compiles for minutes
        self.dtype = devices.choose_precision(job["dtype"], self.flags.attention, self.model_cfg)
        attention.check_rows(rows, self.model_cfg)
        mesh = sharding.make_mesh()
        self.layout = sharding.Layout(mesh, self.flags.shard)
        fused = choose_blocks(self.flags, self.model_cfg, self.layout, self.dtype)
        self.execution = execution(self.flags, self.layout if fused else None)
        optimizer = optimizer_of(self.flags, self.model_cfg, optim.momentum_warmup, self.dtype, self.layout)
        state = state_shapes(self.model_cfg, optimizer, self.layout)
        replicas = sharding.replicas(mesh)
        self.batch_shape = BatchShape(1, rows, replicas, self.model_cfg.sequence_len)
        rng = np.random.default_rng(0)
        size = (rows * replicas, self.model_cfg.sequence_len + 1)
        ids = rng.integers(0, self.model_cfg.vocab_size, size, dtype=np.int32)
        self.batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}  # on the host, as from a data loader
        arrays, lr = self.put()

        step = make_step(self.model_cfg, optimizer, self.dtype, self.flags.grad_clip, self.layout, self.execution)
        lowered = step.lower(state, arrays, lr)
        start = time.perf_counter()
        self.step = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        self.step_bytes = peak_memory(self.step)
        self._check_memory(self.step_bytes)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        self.state = jax.jit(lambda: new_state(self.model_cfg, optimizer), out_shardings=shardings)()
        assert self.state.params["wte"].dtype == jnp.float32

    def put(self) -> tuple[dict[str, jax.Array], jax.Array]:
        """Sends the batch and the learning rate's multiplier to the devices, as training does before each step."""
        import jax
        import numpy as np

        from nanochat_jax.parallel import sharding

        arrays = self.batch_shape.shaped(self.batch, self.layout.mesh, self.model_cfg.vocab_size)
        replicated = sharding.replicated(self.layout.mesh)
        return arrays, jax.make_array_from_process_local_data(replicated, np.float32(1))

    def _check_memory(self, needed: int) -> None:
        """Raises UserError if a step needs more memory than the device has, or than is free on a CPU."""
        import jax

        from nanochat_jax.config import UserError

        stats = jax.local_devices()[0].memory_stats() or {}
        limit = stats.get("bytes_limit") or _status("/proc/meminfo", "MemAvailable")
        if limit is None or needed <= limit:
            return
        advice = self._advice()
        if 16 * self.model_cfg.num_params > limit:
            advice = f"lower --depth (now {self.model_cfg.n_layer}) or --vocab_size (now {self.model_cfg.vocab_size})"
        raise UserError(
            f"{self.job['rows']} rows of {self.model_cfg.sequence_len} tokens do not fit: a step needs "
            f"{needed / GIB:.1f} GiB, and {limit / GIB:.1f} GiB are free: {advice}"
        )

    def _advice(self) -> str:
        rows, length = self.job["rows"], self.model_cfg.sequence_len
        return f"lower --device_batch_size (now {rows})" if rows > 1 else f"lower --max_seq_len (now {length})"

    def run(self) -> dict:
        from nanochat_jax.model import attention
        from nanochat_jax.parallel import devices

        with devices.out_of_memory_explained("a step", f"{self._advice()}, or try --remat=full"):
            self.one_step()
            first = time.perf_counter() - START
            self.loop(WARM_UP)
            _reset_peak()
            steps = self.loop(self.job["steps"])
            peak = _peak()
            programs = {"step": _median(self.one_step, self.job["repeats"])}
            communication = self.communication()
            if self.job["profile"]:
                self.trace(Path(self.job["profile"]))
            programs = self._programs() | programs
        return {
            "first": first, "compile": self.compile_seconds, "steps": steps, "programs": programs,
            "communication": communication, "peak": peak, "step_bytes": self.step_bytes, "loss": self.loss,
            "attention": "cudnn" if attention.most_rows(self.model_cfg) else "xla",
        }  # fmt: skip

    def one_step(self) -> None:
        """Runs one step on a batch that is already on the devices, and waits for it."""
        import jax

        if not hasattr(self, "resident"):
            self.resident = self.put()
        self.state, metrics = self.step(self.state, *self.resident)
        jax.block_until_ready((self.state, metrics))

    def loop(self, steps: int) -> list[float]:
        """Runs steps like the training loop, which reads the metrics of a step after it has dispatched the next one.

        Returns the seconds of each step.
        """
        laps, pending, last = [], None, time.perf_counter()
        for _ in range(steps + 2):  # the first lap would hold two dispatches
            arrays, lr = self.put()
            self.state, metrics = self.step(self.state, arrays, lr)
            if pending is not None:
                self.loss = float(pending.loss)
                now = time.perf_counter()
                laps.append(now - last)
                last = now
            pending = metrics
        assert pending is not None
        float(pending.loss)
        return laps[1:]

    def _programs(self) -> dict[str, float]:
        """Times programs of which each contains the one before. Returns the median seconds of each.

        forward    the hidden states
        loss       and the loss, with its gradients with respect to the hidden states and the head
        gradients  and the gradients of all weights

        One device computes the rows of one replica with whole weights, so that nothing is communicated.
        """
        import jax

        from nanochat_jax.model import gpt
        from nanochat_jax.model.fused import trial
        from nanochat_jax.model.fused.block import apply_blocks
        from nanochat_jax.model.loss import cross_entropy, num_chunks

        model_cfg, rows, how = self.model_cfg, self.job["rows"], self.execution
        if how.fused:  # these programs run on one device, outside the mesh
            how = dataclasses.replace(how, fused=functools.partial(apply_blocks, trial.alone))
        first = jax.local_devices()[0]
        params = self.state.params
        if self.layout.mesh.size > 1:
            params = jax.device_put(params, first)
        ids, targets = (jax.device_put(self.batch[name][:rows], first) for name in ("inputs", "targets"))
        weights = jax.device_put(jax.numpy.ones(targets.shape, jax.numpy.float32), first)

        def forward(params: gpt.Params, ids: jax.Array) -> jax.Array:
            return gpt.hidden(params, model_cfg, ids, self.dtype, how)

        def loss_of(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
            chunks = num_chunks(*targets.shape)
            return cross_entropy(x, head[: model_cfg.vocab_size], targets, weights, model_cfg.softcap, chunks)

        def loss(params: gpt.Params, ids: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
            return jax.value_and_grad(loss_of, (0, 1))(forward(params, ids), params["lm_head"], targets, weights)

        def gradients(params: gpt.Params, ids: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
            return jax.value_and_grad(lambda p: loss_of(forward(p, ids), p["lm_head"], targets, weights))(params)

        times = {}
        for program, arguments in (
            (forward, (params, ids)), (loss, (params, ids, targets, weights)),
            (gradients, (params, ids, targets, weights)),
        ):  # fmt: skip
            compiled = jax.jit(program).lower(*arguments).compile()

            def call(compiled: Any = compiled, arguments: tuple = arguments) -> None:
                jax.block_until_ready(compiled(*arguments))

            call()
            times[program.__name__] = _median(call, self.job["repeats"])
        return times

    # -----------------------------------------------------------------------------
    # Traces

    def communication(self) -> float:
        """Returns the seconds per step that a device spends in collectives, from a trace. It is 0 on one device."""
        if self.layout.mesh.size == 1:
            return 0.0
        with tempfile.TemporaryDirectory() as folder:
            events = self._events(Path(folder))
        microseconds = sum(
            e["dur"] for e in events if COLLECTIVE.match(e["args"]["hlo_op"]) and "end:" not in e["name"]
        )
        return microseconds / 1e6 / TRACED / self.layout.mesh.size

    def trace(self, folder: Path) -> None:
        """Writes a trace of some steps for XProf, and the file trace.json.gz in the same folder for Perfetto.

        In the file for Perfetto, operations have the names of their scopes in the source instead of XLA's names.
        """
        text, scopes = self.step.as_text() or "", {}
        for name, scope in re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]+)"', text, re.M):
            scopes[name] = scope.removeprefix("jit(step)/")
        for event in self._events(folder):
            event["name"] = scopes.get(event["args"]["hlo_op"], event["name"])
        with gzip.open(folder / "trace.json.gz", "wt", encoding="utf-8") as file:
            json.dump(self.document, file)

    def _events(self, folder: Path) -> list[dict]:
        """Traces some steps into `folder`. Returns the trace's events that are operations on a device.

        `self.document` keeps the whole trace, which holds these events.
        """
        import jax

        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python's calls would fill the trace
        with jax.profiler.trace(folder, profiler_options=options):
            for i in range(TRACED):
                with jax.profiler.StepTraceAnnotation("step", step_num=i):
                    self.one_step()
        newest = max(folder.rglob("plugins/profile/*/*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
        self.document = json.loads(gzip.decompress(newest.read_bytes()))
        return [e for e in self.document["traceEvents"] if e.get("ph") == "X" and "hlo_op" in e.get("args", {})]


def _median(call: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# -----------------------------------------------------------------------------
# Memory


def _status(path: str, name: str) -> int | None:
    """Returns a number of bytes from a file of Linux's that lists them in kB, or None if there is no such number."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        return None


def _reset_peak() -> None:
    """Makes Linux forget this process's peak memory, so that compiling is not part of it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _peak() -> int:
    """Returns the peak memory of the first device, or that of this process on a CPU, in bytes."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    if found := stats.get("peak_bytes_in_use") or _status("/proc/self/status", "VmHWM"):
        return found
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps({"device": device, "ours": ours}[job["job"]](job)))
