"""One optimizer step: what is compiled."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanochat_jax.config import GPTConfig, Train
from nanochat_jax.model import gpt
from nanochat_jax.model.loss import cross_entropy, num_chunks
from nanochat_jax.parallel import sharding
from nanochat_jax.parallel.sharding import Layout


class TrainState(NamedTuple):
    params: gpt.Params
    opt_state: optax.OptState


def make_step(
    model_cfg: GPTConfig, optimizer: optax.GradientTransformation, dtype, grad_clip: float = 0.0,
    layout: Layout | None = None, execution: gpt.Execution = gpt.PLAIN,
) -> Callable:  # fmt: skip
    """step(state, batch, lr_mult) -> (state, metrics), jitted, its state donated.

    batch: inputs, targets int32 [micro, rows, t] (targets -1: not counted), optionally weights float32 of the same
    shape, one a target, and `stop` int32 [devices], whose sum comes back among the metrics. The loss is the sum over
    all micro-batches and devices divided by the number of counted tokens, so that how a batch is cut changes nothing
    but rounding; no counted token gives a loss of 0.

    With the optimizer sharded, the gradients of a replica's rows stay with it through all micro-batches (by a vmap over
    the replicas) and are reduced once, each replica keeping its share; with the weights sharded, once a micro-batch.
    """
    replicas = sharding.replicas(layout.mesh) if layout else 1
    apart = replicas > 1 and not layout.full
    if layout:
        execution = dataclasses.replace(execution, gather=layout.gather)

    def loss_sum(params, batch):
        x = gpt.hidden(params, model_cfg, batch["inputs"], dtype, execution)
        head = execution.gather("lm_head", params["lm_head"])[: model_cfg.vocab_size]
        rows, time = batch["targets"].shape
        weights = batch.get("weights", jnp.ones((rows, time), jnp.float32))
        chunks = num_chunks(rows if apart else rows // replicas, time)  # of what one device holds
        return cross_entropy(x, head, batch["targets"], weights, model_cfg.softcap, chunks)

    def gradients(params, batch):
        """(sum of losses, its gradient); over one micro-batch, or as many as the batch has."""
        gradient_of = jax.value_and_grad(loss_sum)
        if apart:
            gradient_of = jax.vmap(gradient_of, in_axes=(None, 0), spmd_axis_name=sharding.BATCH_AXES)
            batch = layout.by_replica(batch)
        if batch["targets"].shape[0] == 1:
            return gradient_of(params, jax.tree.map(lambda x: x[0], batch))

        def accumulate(total, micro_batch):
            return jax.tree.map(jnp.add, total, gradient_of(params, micro_batch)), None

        like = jax.eval_shape(gradient_of, params, jax.tree.map(lambda x: x[0], batch))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        if apart:
            zero = layout.constrain_per_replica(zero)
        return jax.lax.scan(accumulate, zero, batch)[0]

    def step(state: TrainState, batch: dict, lr_mult: jax.Array):
        params = state.params
        stop = batch.get("stop")
        loss, grads = gradients(params, {k: v for k, v in batch.items() if k != "stop"})
        if apart:
            loss, grads = loss.sum(), layout.reduce_scatter_grads(grads)
        count = (batch["targets"] >= 0).sum()
        scale = 1.0 / jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g * scale, grads)
        grad_norm = optax.tree.norm(grads)
        if grad_clip > 0:
            # Over the global gradient; the specification clips every rank's own, which depends on how many there are.
            # Off by default: the norm does not pass 1 in these runs, and clipping costs about 2% of the speed.
            grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, grad_clip / (grad_norm + 1e-6)), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        if layout:
            updates = layout.constrain(updates, layout.param_specs(updates))
            opt_state = layout.constrain(opt_state, layout.shard_specs(opt_state))
        params = jax.tree.map(lambda p, u: p + lr_mult * u, params, updates)
        results = {"loss": loss * scale, "grad_norm": grad_norm, "count": count}
        return TrainState(params, opt_state), results if stop is None else results | {"stop": stop.sum()}

    return jax.jit(step, donate_argnums=0)


def execution(cfg: Train) -> gpt.Execution:
    """How the stage's settings want the blocks computed."""
    kept = jax.checkpoint_policies
    known = {"none": None, "matmuls": kept.save_only_these_names(gpt.MATMUL), "full": kept.nothing_saveable}
    policy = known[cfg.remat]
    if policy is None and cfg.shard == "full":  # a weight is gathered again for the backward pass
        policy = kept.save_anything_except_these_names(sharding.GATHERED)
    return gpt.Execution(cfg.scan_layers, policy)
