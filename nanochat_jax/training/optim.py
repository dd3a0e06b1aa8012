"""Muon for the transformer's matrices, AdamW for embedding and head, and the learning-rate schedules.

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest
semi-orthogonal one, by five Newton-Schulz iterations. Ours differs from `optax.contrib.muon` in what nanochat needs:
momentum without bias correction, on a schedule of its own, and layers stacked [l, in, out] orthogonalised as one batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from nanochat_jax.model.precision import accum_dtype
from nanochat_jax.parallel.sharding import Layout

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients tuned for a steep start; 5 iterations


class MuonState(NamedTuple):
    count: jax.Array  # int32 scalar, steps taken
    momentum: optax.Updates  # like the parameters, float32


def orthogonalize(g: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Singular values of the matrices g [..., in, out] pushed towards 1 (into about 0.7 to 1.2), in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    x = g.astype(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # the Gram matrix on the short side
    size = jnp.linalg.norm(x.astype(accum_dtype(dtype)), axis=(-2, -1), keepdims=True)
    x = x / (size + 1e-7).astype(dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if wide else x.mT


def scale_by_muon(
    momentum: optax.Schedule | float = 0.95, dtype: jnp.dtype = jnp.float32, layout: Layout | None = None
) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, times sqrt(max(1, out/in)). For leaves [l, in, out]; no learning rate in it.

    `momentum` may be a schedule of the step; `dtype` is that of the iterations (bfloat16 on GPUs). With a `layout` the
    matrices are shared out among its devices: gradients and momentum come cut, each device orthogonalises whole
    matrices, and the results travel back in `dtype`.
    """

    def init(params):
        return MuonState(jnp.zeros([], jnp.int32), jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params))

    def update(grads, state, params=None):
        mu = momentum(state.count) if callable(momentum) else momentum
        buffers = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, state.momentum, grads)
        nesterov = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, buffers, grads)
        transposed = jax.tree.map(lambda x: x.shape[-2] > x.shape[-1], nesterov)
        if layout:
            # XLA reshards from two cut axes to another only by gathering the whole: first from two to one.
            cut = layout.shard_specs(nesterov, ("data",))
            nesterov = layout.constrain(nesterov, cut)
            # In a batch of matrices the axis that is cut is the first of all of them.
            transposed = jax.tree.map(lambda x, spec: spec[-1] == "data", nesterov, cut)
        updates = _by_shape(lambda x: _orthogonalize_all(x, dtype, layout), nesterov, transposed)
        if layout and layout.full:
            updates = layout.constrain(updates, cut)
        updates = jax.tree.map(lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5, updates)
        return updates, MuonState(state.count + 1, buffers)

    return optax.GradientTransformation(init, update)


def _orthogonalize_all(x: jax.Array, dtype: jnp.dtype, layout: Layout | None) -> jax.Array:
    """x [n, in, out], each device taking its share of the n."""
    if layout is None or layout.mesh.size == 1:
        return orthogonalize(x, dtype).astype(x.dtype)
    y = orthogonalize(layout.all_to_all_matrices(x), dtype)
    if not layout.full:
        y = layout.constrain(y, P())  # gathered before it is widened: half the bytes
    return y[: x.shape[0]].astype(x.dtype)


def _by_shape(f: Callable, tree, transposed):
    """f over the leaves [l, in, out], those of equal matrices merged into one batch; `transposed` says of each leaf
    whether it is transposed for that."""
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
    return [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]


def momentum_warmup(step: jax.Array) -> jax.Array:
    """Muon's momentum in pretraining and midtraining: 0.85 -> 0.95 over 300 steps."""
    return 0.85 + 0.10 * jnp.minimum(step / 300, 1.0)


def make_optimizer(
    width: int, *, embedding_lr: float, unembedding_lr: float, matrix_lr: float, weight_decay: float = 0.0,
    momentum: optax.Schedule | float = 0.95, dtype: jnp.dtype = jnp.float32, layout: Layout | None = None,
) -> optax.GradientTransformation:  # fmt: skip
    """The optimizer of every stage. Its updates are linear in the learning rates, so that a schedule is a factor on
    them, applied by the train step.

    AdamW's rates were tuned at width 768 and scale with width^-0.5; Muon's does not depend on the width.
    """
    factor = (width / 768) ** -0.5

    def adamw(lr):
        return optax.adamw(lr * factor, b1=0.8, b2=0.95, eps=1e-10, weight_decay=weight_decay)

    groups = {
        "embedding": adamw(embedding_lr),
        "head": adamw(unembedding_lr),
        "matrices": optax.chain(scale_by_muon(momentum, dtype, layout), optax.scale(-matrix_lr)),
    }
    labels = {"wte": "embedding", "lm_head": "head", "blocks": "matrices"}
    return optax.partition(groups, lambda params: {name: labels[name] for name in params})


# -----------------------------------------------------------------------------
# Learning-rate multipliers, plain Python: the host hands the number to the step


def trapezoid(step: int, steps: int, warmup_ratio: float, warmdown_ratio: float, final: float) -> float:
    """Pretraining: linear up, constant, linear down to `final`."""
    warmup, warmdown = round(warmup_ratio * steps), round(warmdown_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    if step <= steps - warmdown:
        return 1.0
    left = (steps - step) / warmdown
    return left + (1 - left) * final


def late_decay(progress: float) -> float:
    """Midtraining: constant until 80% of the way, then linear to 0."""
    return 1.0 if progress < 0.8 else max(0.0, (1 - progress) / 0.2)


def linear_decay(progress: float) -> float:
    """SFT and RL: linear to 0."""
    return max(0.0, 1 - progress)
