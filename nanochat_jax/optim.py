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

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients tuned for a steep start; 5 iterations


class MuonState(NamedTuple):
    count: jax.Array  # int32 scalar, steps taken
    momentum: optax.Updates  # like the parameters, float32


def orthogonalize(g: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Singular values of the matrices g [..., in, out] pushed towards 1 (into about 0.7 to 1.2), in g's dtype."""
    a, b, c = NEWTON_SCHULZ
    x = g.astype(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # the Gram matrix on the short side
    x = x / (jnp.linalg.norm(x.astype(jnp.float32), axis=(-2, -1), keepdims=True) + 1e-7).astype(dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x if wide else x.mT).astype(g.dtype)


def scale_by_muon(
    momentum: optax.Schedule | float = 0.95, dtype: jnp.dtype = jnp.float32
) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, times sqrt(max(1, out/in)). For leaves [l, in, out]; no learning rate in it.

    `momentum` may be a schedule of the step; `dtype` is that of the iterations (bfloat16 on GPUs).
    """

    def init(params):
        return MuonState(jnp.zeros([], jnp.int32), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))

    def update(grads, state, params=None):
        mu = momentum(state.count) if callable(momentum) else momentum
        buffers = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, state.momentum, grads)
        nesterov = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, buffers, grads)
        updates = _by_shape(lambda x: orthogonalize(x, dtype), nesterov)
        updates = jax.tree.map(lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5, updates)
        return updates, MuonState(state.count + 1, buffers)

    return optax.GradientTransformation(init, update)


def _by_shape(f: Callable, tree):
    """f over the leaves [l, in, out], those of equal matrices (or their transposes) merged into one batch."""
    leaves, treedef = jax.tree.flatten(tree)
    groups: dict[tuple, list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(tuple(sorted(leaf.shape[-2:])), []).append(i)
    results: list = [None] * len(leaves)
    for members in groups.values():
        wide = [leaves[i] if leaves[i].shape[-2] <= leaves[i].shape[-1] else leaves[i].mT for i in members]
        parts = jnp.split(f(jnp.concatenate(wide)), _offsets([w.shape[0] for w in wide]))
        for i, part in zip(members, parts, strict=True):
            results[i] = part if part.shape == leaves[i].shape else part.mT
    return treedef.unflatten(results)


def _offsets(sizes: list[int]) -> list[int]:
    return [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]


def momentum_warmup(step: jax.Array) -> jax.Array:
    """Muon's momentum in pretraining and midtraining: 0.85 -> 0.95 over 300 steps."""
    return 0.85 + 0.10 * jnp.minimum(step / 300, 1.0)


def make_optimizer(
    width: int, *, embedding_lr: float, unembedding_lr: float, matrix_lr: float, weight_decay: float = 0.0,
    momentum: optax.Schedule | float = 0.95, dtype: jnp.dtype = jnp.float32,
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
        "matrices": optax.chain(scale_by_muon(momentum, dtype), optax.scale(-matrix_lr)),
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
