"""The optimizer step. Gradient accumulation, reduction, clipping and update are compiled as one function."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from nanochat_jax.config import GPTConfig, Train
from nanochat_jax.model import gpt
from nanochat_jax.model.loss import cross_entropy, num_chunks
from nanochat_jax.parallel import sharding
from nanochat_jax.parallel.sharding import Layout


class TrainState(NamedTuple):
    """Weights and optimizer state. A step consumes one state and returns the next."""

    params: gpt.Params
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """The scalars that a step reports. They stay on the device until they are read."""

    loss: jax.Array  # float32: mean cross-entropy of the counted targets
    grad_norm: jax.Array  # float32: norm of the whole gradient before clipping
    count: jax.Array  # int32: number of counted targets, which are all except -1
    stop: jax.Array | None = None  # int32: positive if any process wants to stop; None if the batch has no `stop`


def make_step(
    model_cfg: GPTConfig,
    optimizer: optax.GradientTransformation,
    dtype: DTypeLike,
    grad_clip: float = 0.0,
    layout: Layout | None = None,
    execution: gpt.Execution = gpt.PLAIN,
) -> jax.stages.Wrapped:
    """Returns the jitted function step(state, batch, lr_mult) -> (TrainState, StepMetrics).

    The function donates `state`, so the caller must not use `state` again. `lr_mult` is a float32 scalar that
    multiplies all learning rates.

    `batch` contains `inputs` and `targets`, both int32 [accum, rows, t]. For example, [2, 256, 2048] means 2
    micro-batches of 256 rows. On 8 devices, each device then computes 32 rows at once. Targets of -1 are not counted.
    Optionally, `batch` contains `weights`, float32 [accum, rows, t], with one weight per target. It may also contain
    `stop`, int32 [devices]. The step reports the sum of `stop`.

    The loss is summed over all micro-batches and devices, then divided by the number of counted targets. So the number
    of micro-batches affects only rounding errors. If no targets are counted, the loss is 0.

    With --shard=optimizer, a vmap over the replicas lets each replica accumulate its own gradients. Then one
    exchange per step, in `dtype`, sums the gradients of all replicas. With --shard=full, the gradients of all replicas
    are summed in every micro-batch.
    """
    replicas = sharding.replicas(layout.mesh) if layout else 1
    zero1 = layout if layout and replicas > 1 and not layout.full else None  # set if replicas accumulate separately
    if layout:
        execution = dataclasses.replace(execution, gather=layout.gather, whole=layout.whole)

    def loss_sum(params: gpt.Params, batch: dict[str, jax.Array]) -> jax.Array:
        """Returns the summed loss of a micro-batch [rows, t]."""
        x = gpt.hidden(params, model_cfg, batch["inputs"], dtype, execution)
        with jax.named_scope("loss"):
            head = execution.gather("lm_head", params["lm_head"])[: model_cfg.vocab_size]
            rows, time = batch["targets"].shape
            weights = batch.get("weights", jnp.ones((rows, time), jnp.float32))
            chunks = num_chunks(rows if zero1 else rows // replicas, time)  # for the rows of one replica
            return cross_entropy(x, head, batch["targets"], weights, model_cfg.softcap, chunks)

    def gradients(params: gpt.Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, gpt.Params]:
        """Returns the summed loss of `batch` [accum, rows, t] and its gradient."""
        gradient_of = jax.value_and_grad(loss_sum)
        if zero1:  # losses get the shape [replicas], and gradients get the shape [replicas, ...]
            gradient_of = jax.vmap(gradient_of, in_axes=(None, 0), spmd_axis_name=sharding.BATCH_AXES)
            batch = zero1.by_replica(batch)
        if batch["targets"].shape[0] == 1:
            return gradient_of(params, jax.tree.map(lambda x: x[0], batch))

        def accumulate(total: Any, micro_batch: dict[str, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient_of(params, micro_batch)), None

        like = jax.eval_shape(gradient_of, params, jax.tree.map(lambda x: x[0], batch))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        if zero1:
            zero = zero1.constrain_per_replica(zero)
        return jax.lax.scan(accumulate, zero, batch)[0]

    def step(state: TrainState, batch: dict[str, jax.Array], lr_mult: jax.Array) -> tuple[TrainState, StepMetrics]:
        params = state.params
        stop = batch.get("stop")
        loss, grads = gradients(params, {k: v for k, v in batch.items() if k != "stop"})
        if zero1:
            with jax.named_scope("reduce_gradients"):
                loss, grads = loss.sum(), zero1.reduce_scatter_grads(grads, dtype)
        count = (batch["targets"] >= 0).sum()
        scale = 1.0 / jnp.maximum(count, 1)
        with jax.named_scope("gradient_norm"):
            grads = jax.tree.map(lambda g: g * scale, grads)
            grad_norm = optax.tree.norm(grads)
        if grad_clip > 0:
            # Clips the gradient of the whole batch. The original nanochat clips each rank's gradient, so its result
            # depends on the number of ranks. Clipping costs about 2% of the speed. It is off by default, because the
            # gradient norm does not exceed 1 in our runs.
            grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, grad_clip / (grad_norm + 1e-6)), grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, params)
            if layout:
                updates = layout.constrain(updates, layout.param_specs(updates))
                opt_state = layout.constrain(opt_state, layout.shard_specs(opt_state))
        with jax.named_scope("update_weights"):
            params = jax.tree.map(lambda p, u: p + lr_mult * u, params, updates)
        metrics = StepMetrics(loss * scale, grad_norm, count, None if stop is None else stop.sum())
        return TrainState(params, opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def execution(cfg: Train, layout: Layout | None = None) -> gpt.Execution:
    """Returns how to compute the blocks, as set by --scan_layers, --remat and --shard.

    With a `layout`, they are computed by the kernels of model/fused, if the settings allow it. Those kernels leave
    nothing to recompute, and do not communicate.
    """
    policies = jax.checkpoint_policies
    known = {"none": None, "matmuls": policies.save_only_these_names(gpt.MATMUL), "full": policies.nothing_saveable}
    policy = known[cfg.remat]
    if policy is None and cfg.shard == "full":  # discard gathered weights; the backward pass gathers them again
        policy = policies.save_anything_except_these_names(sharding.GATHERED)
    if layout is None or policy is not None or cfg.scan_layers or layout.mesh.shape["model"] > 1:
        return gpt.Execution(cfg.scan_layers, policy)
    from nanochat_jax.model.fused.block import (
        apply_blocks,
    )  # imports Pallas, which runs without the kernels do not need

    return gpt.Execution(fused=functools.partial(apply_blocks, layout.per_device))
