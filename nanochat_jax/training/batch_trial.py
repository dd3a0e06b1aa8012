"""Chooses how many rows a replica computes at once, if --device_batch_size does not say it.

More rows at once need fewer micro-batches, but they are not always faster: XLA may choose other kernels, or recompute
activations to save memory. Therefore this module times a few steps with the most rows that fit and with the next
smaller number, on a state that is thrown away. The number of rows affects only rounding errors in the losses. A run
that resumes keeps its number, so that its losses stay the same to the last bit.
"""

import functools
import statistics

import jax
import numpy as np

from nanochat_jax import checkpoint
from nanochat_jax.parallel import devices, processes, sharding
from nanochat_jax.progress import Timer
from nanochat_jax.training.batch_shape import BatchShape, memory_limit, possible_rows, rows_that_fit
from nanochat_jax.training.run import Run, compile_step, out_of_memory_in_state, out_of_memory_in_step, peak_memory
from nanochat_jax.training.step import TrainState

TIMED_STEPS = 3  # for each number of rows, after one step that is not timed
# The second program takes up to a minute to compile, and the faster one saves a few percent. So in shorter runs, timing
# would take more than it saves.
WORTH_TIMING = 20 * 60  # seconds
# If the next smaller number of rows is less than this share of the largest, it is not timed, because it is slower.
SMALLEST_SHARE = 1 / 4


def choose_rows(run: Run, rows: int, tokens: float) -> int:
    """Returns how many rows a replica computes at once, a divisor of `rows`, and prints the reason for the choice.

    `rows` is the number of rows that a replica computes in a step. `tokens` is how many tokens the whole run trains on,
    roughly. All processes return the same number.
    """
    limit = memory_limit()
    compiled = functools.cache(lambda n: compile_step(run, rows // n, n))

    def need(grad_accum_steps: int, n: int) -> int:
        return peak_memory(compiled(n))

    if limit is not None:
        print("choosing how many rows to compute at once (to skip this, give --device_batch_size) ...", flush=True)
    saved = _saved_rows(run)
    if limit is None:
        most = rows_that_fit(run.model_cfg, rows, need, limit)
        if saved not in (None, most):
            print(f"rows at once: {most}; the run computed {saved} so far (to keep them: --device_batch_size={saved})")
        return most
    if saved in possible_rows(run.model_cfg, rows) and _fits(need(rows // saved, saved), limit):
        print(f"rows at once: {saved}, as in the run so far")
        return saved
    if saved is not None:
        print(f"the run computed {saved} rows at once so far, which this machine or --mesh does not allow")
    most = rows_that_fit(run.model_cfg, rows, need, limit)
    smaller = max((n for n in possible_rows(run.model_cfg, rows) if n < most), default=0)
    if not (smaller and smaller >= SMALLEST_SHARE * most):
        print(f"rows at once: {most}, the most that fit")
        return most
    if run.cfg.dry_run:
        print(f"rows at once: {most} fit; a run of more than 20 minutes also times {smaller}, and takes what is faster")
        return most
    seconds = devices.expected_seconds(tokens * run.model_cfg.flops_per_token)
    if seconds is not None and seconds < WORTH_TIMING:
        print(f"rows at once: {most}, the most that fit (in a run of less than 20 minutes, nothing is timed)")
        return most
    return _faster(run, rows, {n: compiled(n) for n in (most, smaller)})


def _saved_rows(run: Run) -> int | None:
    """Returns how many rows at once the checkpoint was trained with, if the run resumes and the checkpoint says it."""
    return None if run.data is None else checkpoint.read_meta(run.dir, run.step).get("rows")


def _fits(needed: int, limit: int) -> bool:
    """Whether a step that needs this many bytes fits in all processes."""
    return bool(processes.all_min(int(needed <= limit)))


def _faster(run: Run, rows: int, compiled: dict[int, jax.stages.Compiled]) -> int:
    """Returns the number of rows with the shortest step, and prints the times. `compiled` has the numbers as keys."""
    with out_of_memory_in_state():
        state = run.random_state()
    times = {}
    for n, step in compiled.items():
        with out_of_memory_in_step(n):
            seconds, state = time_step(run, step, state, rows // n, n)
        # All processes must choose the same number, so the slowest process decides.
        times[n] = processes.all_max(round(1e6 * seconds)) / 1e6
    best = min(times, key=lambda n: times[n])  # if the times are equal, the first, which is the largest number
    found = ", ".join(f"{1000 * seconds:.1f} ms a step with {n}" for n, seconds in times.items())
    print(f"rows at once: {best}, the fastest of those timed ({found})")
    return best


def time_step(
    run: Run, step: jax.stages.Compiled, state: TrainState, grad_accum_steps: int, rows: int
) -> tuple[float, TrainState]:
    """Returns the median time of a step on random tokens, in seconds, and the state after the steps.

    The steps use up `state`.
    """
    mesh, model_cfg = run.layout.mesh, run.model_cfg
    shape = BatchShape(grad_accum_steps, rows, sharding.replicas(mesh), model_cfg.sequence_len)
    own_rows = shape.total_rows // sharding.process_rows(mesh)[1]
    ids = np.random.default_rng(0).integers(0, model_cfg.vocab_size, (own_rows, shape.seq_len + 1), dtype=np.int32)
    batch = shape.shaped({"inputs": ids[:, :-1], "targets": ids[:, 1:]}, mesh, model_cfg.vocab_size)
    lr_mult = run.put_scalar(1.0)
    times = []
    for _ in range(1 + TIMED_STEPS):
        timer = Timer()
        state, results = step(state, batch, lr_mult)
        jax.block_until_ready((state, results))
        times.append(timer.lap())
    return statistics.median(times[1:]), state
