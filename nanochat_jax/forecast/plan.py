"""Compiles what a run on a target would compile. Finds how many rows fit or, if none do, which settings would fit."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jax.sharding import Mesh

from nanochat_jax import config
from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.engine import sampler
from nanochat_jax.forecast import card, compiled, programs
from nanochat_jax.forecast.card import Target
from nanochat_jax.forecast.compiled import GIB, Compiled
from nanochat_jax.model.fused import trial
from nanochat_jax.parallel import devices, sharding
from nanochat_jax.parallel.sharding import Layout
from nanochat_jax.progress import count_of
from nanochat_jax.training.batch_shape import USABLE, BatchShape, rows_that_fit, shape_for_tokens
from nanochat_jax.training.run import state_bytes

# About how many seconds compiling takes for each layer, on two cores. Only used for the time that is printed first.
SECONDS_PER_LAYER = {"step": 0.9, "decode": 0.7, "prefill": 0.4}


@dataclass(frozen=True)
class Plan:
    """The programs of a run on a target."""

    target: Target
    mesh: Mesh
    model_cfg: GPTConfig
    shape: BatchShape
    limit: int  # the bytes that a program may use on each GPU
    weights: int  # bytes on each GPU
    optimizer: int  # bytes on each GPU
    step: Compiled
    decode: Compiled | None  # for chat_web, on one GPU; None if the model does not fit on one
    prefill: Compiled | None
    slots: int  # of `decode`


def usable_memory(target: Target) -> int:
    """The bytes of each GPU's memory that a training run may use."""
    return int(USABLE * devices.GPU_MEMORY_FRACTION * target.card.memory)


def _may_fuse(target: Target) -> bool:
    """Whether a run on the target would try the kernels of model/fused."""
    return target.card.capability == trial.CAPABILITY


def make(cfg: config.Doctor, target: Target, model_cfg: GPTConfig, say: Callable[[str], None]) -> Plan:
    """Compiles the training step, a chunk of decoding and a prefill. Calls `say` with lines about the progress.

    Raises UserError if the training step does not fit.
    """
    if cfg.compute_dtype == "float32":
        raise UserError("--target compiles for bfloat16: leave out --compute_dtype=float32")
    mesh = compiled.mesh_of(target, cfg.mesh)
    layout = Layout(mesh, cfg.shard)
    layout.check(model_cfg)
    limit, steps = usable_memory(target), {}

    def need(grad_accum_steps: int, rows: int) -> int:
        if (grad_accum_steps, rows) not in steps:
            steps[grad_accum_steps, rows] = _timed(
                f"the training step with {count_of(rows, 'row')} on each replica", "step", model_cfg, say,
                lambda: programs.training_step(cfg, model_cfg, mesh, grad_accum_steps, rows, fused=_may_fuse(target)),
            )  # fmt: skip
        return steps[grad_accum_steps, rows].peak

    def fit(rows: int) -> int:
        try:
            return rows_that_fit(model_cfg, rows, need=need, limit=limit)
        except UserError as error:
            fewest = min(steps, key=lambda shape: shape[1])
            raise _too_small(cfg, target, model_cfg, steps[fewest].peak, limit, say) from error

    replicas = sharding.replicas(mesh)
    shape = shape_for_tokens(cfg.total_batch_size, cfg.device_batch_size, model_cfg.sequence_len, replicas, fit)
    peak = need(shape.grad_accum_steps, shape.rows)
    if peak > limit:
        raise UserError(
            f"--device_batch_size={cfg.device_batch_size}: needs {peak / GIB:.1f} GiB, and a run may use "
            f"{limit / GIB:.1f} of a {target.card.name}: leave it out to use as many rows as fit"
        )
    weights, optimizer = state_bytes(cfg, model_cfg, layout, programs.BF16)
    slots, one = config.ChatWeb().slots, compiled.mesh_of(Target(target.card, 1))
    decode = prefill = None
    if 2 * model_cfg.num_params < limit:
        decode = _timed("decoding", "decode", model_cfg, say, lambda: programs.decode(
            model_cfg, one, slots, model_cfg.sequence_len, sampler.Plan(sampler.WIDTHS[0], False)))  # fmt: skip
        prefill = _timed("the prefill of a prompt", "prefill", model_cfg, say, lambda: programs.prefill(
            model_cfg, one, 1, model_cfg.sequence_len))  # fmt: skip
    step = steps[shape.grad_accum_steps, shape.rows]
    return Plan(target, mesh, model_cfg, shape, limit, weights, optimizer, step, decode, prefill, slots)


def _timed(
    what: str, kind: str, model_cfg: GPTConfig, say: Callable[[str], None], compile_it: Callable[[], Compiled]
) -> Compiled:
    say(f"compiling {what}: about {SECONDS_PER_LAYER[kind] * model_cfg.n_layer:.0f} s on two idle cores ...")
    start = time.monotonic()
    program = compile_it()
    say(f"  took {time.monotonic() - start:.0f} s, needs {program.peak / GIB:.1f} GiB on each GPU")
    return program


def _too_small(
    cfg: config.Doctor, target: Target, model_cfg: GPTConfig, need: int, limit: int, say: Callable[[str], None]
) -> UserError:
    """Returns an error that says by how much a target is too small, and names two settings with which a row fits."""
    found = []
    for flags, other, where in _alternatives(cfg, target):
        if peak := _peak_of_one_row(other, where, model_cfg.vocab_size, flags, say):
            found.append(f"{flags} ({peak / GIB:.1f} GiB)")
        if len(found) == 2:
            break
    settings = f"with one row, these fit: {' or '.join(found)}" if found else "use a smaller model"
    return UserError(
        f"--target={cfg.target}: one row of {cfg.max_seq_len} tokens needs {need / GIB:.1f} GiB, which is "
        f"{(need - limit) / GIB:.1f} more than a run may use of a {target.card.name}: {settings}"
    )


def _alternatives(cfg: config.Doctor, target: Target) -> Iterator[tuple[str, config.Doctor, Target]]:
    """Yields settings that need less memory: (their flags, the settings, the target), the smallest change first."""
    name = cfg.target.rpartition(":")[0] or cfg.target
    remat = dataclasses.replace(cfg, remat="full")
    if cfg.remat != "full":
        yield "--remat=full", remat, target
    if cfg.shard != "full" and target.count > 1:
        yield "--shard=full", dataclasses.replace(cfg, shard="full"), target
        yield "--shard=full --remat=full", dataclasses.replace(remat, shard="full"), target
    if target.count < target.card.gpus_per_node:
        node = Target(target.card, target.card.gpus_per_node)
        flags = f"--target={name}:{node.count} --shard=full --remat=full"
        yield flags, dataclasses.replace(remat, shard="full", mesh=""), node
    cards = [(stem, card.read(card.CARDS / f"{stem}.toml")) for stem in card.known()]
    for stem, larger in sorted(cards, key=lambda pair: pair[1].memory):
        if larger.memory > 1.2 * target.card.memory and target.count <= larger.gpus_per_node:
            yield f"--target={stem}:{target.count}", cfg, Target(larger, target.count)
    for depth in range(cfg.depth - 2, 0, -2):
        yield f"--depth={depth} --remat=full", dataclasses.replace(remat, depth=depth), target


def _peak_of_one_row(
    cfg: config.Doctor, target: Target, vocab_size: int, flags: str, say: Callable[[str], None]
) -> int | None:
    """Returns the bytes that a step with one row needs, or None if it does not fit."""
    limit, model_cfg = usable_memory(target), cfg.gpt_config(vocab_size)
    layout = Layout(compiled.mesh_of(target, cfg.mesh), cfg.shard)
    try:
        layout.check(model_cfg)
    except UserError:
        return None
    weights, optimizer = state_bytes(cfg, model_cfg, layout, programs.BF16)
    if 2 * weights + optimizer > limit:  # gradients are as large as weights, so this need not be compiled
        return None
    say(f"trying {flags} ...")
    peak = programs.training_step(cfg, model_cfg, layout.mesh, 1, 1, fused=_may_fuse(target)).peak
    return peak if peak <= limit else None
