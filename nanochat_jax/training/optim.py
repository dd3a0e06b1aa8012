"""Muon for the transformer's matrices, AdamW for embedding and head, and the learning-rate schedules.

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a weight matrix with the nearest
semi-orthogonal matrix, which five Newton-Schulz iterations approximate. Unlike `optax.contrib.muon`, the Muon here does
what nanochat needs: momentum has no bias correction and follows a schedule of its own, and layers stacked as
[l, in, out] are orthogonalised as one batch.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from nanochat_jax.model.precision import accum_dtype
from nanochat_jax.parallel.sharding import Layout

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of a quintic, tuned to raise small singular values fast


class MuonState(NamedTuple):
    """What Muon carries from step to step."""

    count: jax.Array  # int32 scalar, steps taken
    momentum: optax.Updates  # float32, one array for each parameter array


def orthogonalize(g: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Pushes singular values of the matrices g [..., in, out] towards 1 (to about 0.7 to 1.2), computing in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    x = g.astype(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # so that the Gram matrix has the size of the short side
    size = jnp.linalg.norm(x.astype(accum_dtype(dtype)), axis=(-2, -1), keepdims=True)
    x = x / (size + 1e-7).astype(dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if wide else x.mT


def scale_by_muon(
    momentum: optax.Schedule | float = 0.95, dtype: DTypeLike = jnp.float32, layout: Layout | None = None
) -> optax.GradientTransformation:
    """The Muon update without the learning rate: orthogonalised Nesterov momentum times sqrt(max(1, out/in)).

    All parameter arrays are [l, in, out]. `momentum` may be a schedule over steps. The Newton-Schulz iterations compute
    in `dtype` (bfloat16 on GPUs). With a `layout`, gradients and momentum arrive sharded. An all-to-all then gives each
    device whole matrices to orthogonalise. The results are returned by an all-gather in `dtype` or, with --shard=full,
    by a second all-to-all.
    """

    def init(params: optax.Params) -> MuonState:
        return MuonState(jnp.zeros([], jnp.int32), jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:  # `state` is a MuonState, but optax annotates it as any tree of arrays
        with jax.named_scope("muon"):
            mu = momentum if isinstance(momentum, int | float) else momentum(state.count)
            buffers = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, state.momentum, updates)
            nesterov = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, buffers, updates)
            if layout is None:
                transposed = jax.tree.map(lambda x: x.shape[-2] > x.shape[-1], nesterov)
            else:
                # XLA would all-gather the whole array to move the sharding from two array axes to the third. So the
                # array is first resharded over the mesh axis `data` alone.
                specs = layout.shard_specs(nesterov, ("data",))
                nesterov = layout.constrain(nesterov, specs)
                # All matrices must be sharded on `in` to be concatenated, so those sharded on `out` are transposed.
                transposed = jax.tree.map(lambda x, spec: spec[-1] == "data", nesterov, specs)
            updates = _by_shape(lambda x: _orthogonalize_all(x, dtype, layout), nesterov, transposed)
            if layout and layout.full:
                updates = layout.constrain(updates, specs)
            updates = jax.tree.map(lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5, updates)
            return updates, MuonState(state.count + 1, buffers)

    return optax.GradientTransformation(init, update)


def _orthogonalize_all(x: jax.Array, dtype: DTypeLike, layout: Layout | None) -> jax.Array:
    """Orthogonalises x [n, in, out]; each device does its share of the n matrices."""
    if layout is None or layout.mesh.size == 1:
        return orthogonalize(x, dtype).astype(x.dtype)
    y = orthogonalize(layout.all_to_all_matrices(x), dtype)
    if not layout.full:
        y = layout.constrain(y, P())  # all-gathered before the cast to float32, to halve the bytes sent
    return y[: x.shape[0]].astype(x.dtype)


def _by_shape(f: Callable[[jax.Array], jax.Array], tree: Any, transposed: Any) -> Any:
    """Applies f to the leaves [l, in, out]. Leaves whose matrices have the same shape are merged into one batch.

    `transposed` says for each leaf whether to transpose its matrices first and the results back afterwards. Example:
    w_in [20, 1280, 5120] and the transposed w_out [20, 5120, 1280] form one batch [40, 1280, 5120].
    """
    leaves, treedef = jax.tree.flatten(tree)
    transposed = treedef.flatten_up_to(transposed)
    upright = [leaf.mT if turn else leaf for leaf, turn in zip(leaves, transposed, strict=True)]
    groups: dict[tuple, list[int]] = {}
    for i, x in enumerate(upright):
        groups.setdefault(x.shape[-2:], []).append(i)
    results: list = [None] * len(leaves)
    for members in groups.values():
        batch = [upright[i] for i in members]
        parts = jnp.split(f(jnp.concatenate(batch)), _offsets([x.shape[0] for x in batch]))
        for i, part in zip(members, parts, strict=True):
            results[i] = part.mT if transposed[i] else part
    return treedef.unflatten(results)


def _offsets(sizes: list[int]) -> list[int]:
    """Where to split a concatenation of arrays of these sizes: [3, 4, 5] -> [3, 7]."""
    return [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]


def momentum_warmup(step: ArrayLike) -> jax.Array:
    """Muon's momentum in pretraining and midtraining: it rises from 0.85 to 0.95 over 300 steps."""
    return 0.85 + 0.10 * jnp.minimum(jnp.asarray(step) / 300, 1.0)


def make_optimizer(
    width: int,
    *,
    embedding_lr: float,
    unembedding_lr: float,
    matrix_lr: float,
    weight_decay: float = 0.0,
    momentum: optax.Schedule | float = 0.95,
    dtype: DTypeLike = jnp.float32,
    layout: Layout | None = None,
) -> optax.GradientTransformation:
    """The optimizer of every stage: AdamW for wte and lm_head, Muon for the blocks.

    The updates are linear in the learning rates, so a learning-rate schedule is one factor on all updates. The train
    step applies this factor. AdamW's rates were tuned at width 768 and scale with width^-0.5; Muon's rate does not
    depend on the width. `momentum`, `dtype` and `layout` are passed to `scale_by_muon`; weight decay applies to AdamW
    alone.
    """
    factor = (width / 768) ** -0.5

    def adamw(lr: float) -> optax.GradientTransformation:
        return optax.adamw(lr * factor, b1=0.8, b2=0.95, eps=1e-10, weight_decay=weight_decay)

    groups: dict[Hashable, optax.GradientTransformation] = {
        "embedding": adamw(embedding_lr),
        "head": adamw(unembedding_lr),
        "matrices": optax.chain(scale_by_muon(momentum, dtype, layout), optax.scale(-matrix_lr)),
    }
    labels = {"wte": "embedding", "lm_head": "head", "blocks": "matrices"}
    return optax.partition(groups, lambda params: {name: labels[name] for name in params})


# -----------------------------------------------------------------------------
# Learning-rate multipliers, computed in plain Python on the host and passed to the step as a number


def trapezoid(step: int, steps: int, warmup_ratio: float, warmdown_ratio: float, final: float) -> float:
    """Pretraining: linear warm-up over `warmup_ratio` of the steps, then 1, then linear decay to `final` at the end."""
    warmup, warmdown = round(warmup_ratio * steps), round(warmdown_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    if step <= steps - warmdown:
        return 1.0
    left = (steps - step) / warmdown
    return left + (1 - left) * final


def late_decay(progress: float) -> float:
    """Midtraining, for `progress` from 0 to 1: constant at 1 until 0.8, then linear decay to 0."""
    return 1.0 if progress < 0.8 else max(0.0, (1 - progress) / 0.2)


def linear_decay(progress: float) -> float:
    """SFT and RL, for `progress` from 0 to 1: linear decay from 1 to 0."""
    return max(0.0, 1 - progress)
