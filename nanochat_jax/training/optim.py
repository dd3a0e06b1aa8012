"""Defines Muon for the transformer's matrices, AdamW for the embedding and the head, and learning-rate schedules.

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a weight matrix with the nearest
semi-orthogonal matrix. Five Newton-Schulz iterations approximate this matrix.

This module does not use `optax.contrib.muon`, for two reasons. First, our momentum follows a schedule and has no bias
correction. Second, all layers of an array [l, in, out] must be orthogonalised as one batch.
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

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of a quintic, tuned to make small singular values grow fast
ITERATIONS = 5


class MuonState(NamedTuple):
    """The state that Muon keeps between steps."""

    count: jax.Array  # int32 scalar: the number of steps taken
    momentum: optax.Updates  # float32: one array per parameter array


def orthogonalize(g: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Moves the singular values of the matrices g [..., in, out] close to 1 (about 0.7 to 1.2). Computes in `dtype`."""
    x = g.astype(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # makes the Gram matrix x @ x.mT as small as possible
    size = jnp.linalg.norm(x.astype(accum_dtype(dtype)), axis=(-2, -1), keepdims=True)
    x = x / (size + 1e-7).astype(dtype)
    # In bf16, the rounding errors of `_iterate_on_gram` would grow too large.
    x = (_iterate_on_gram if dtype != jnp.bfloat16 and x.shape[-1] >= 2 * x.shape[-2] else _iterate)(x)
    return x if wide else x.mT


def _iterate(x: jax.Array) -> jax.Array:
    """Applies five Newton-Schulz iterations to x [..., m, n]: x becomes p(gram) @ x, where gram is x @ x.mT."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def _iterate_on_gram(x: jax.Array) -> jax.Array:
    """Like `_iterate`, but multiplies only matrices [..., m, m] until the end, which is faster if n is at least 2m.

    If x becomes p @ x, its Gram matrix becomes p @ gram @ p. So the first Gram matrix determines the product of all p.
    For n = 4m, this takes as many FLOPs as 25 matmuls of m x m matrices, instead of 45.
    """
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.mT
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    product = None
    for i in range(ITERATIONS):
        p = a * eye + b * gram + c * (gram @ gram)
        product = p if product is None else p @ product
        if i + 1 < ITERATIONS:
            gram = p @ gram @ p
    return product @ x


def scale_by_muon(
    momentum: optax.Schedule | float = 0.95, dtype: DTypeLike = jnp.float32, layout: Layout | None = None
) -> optax.GradientTransformation:
    """Computes the Muon update without the learning rate: orthogonalised Nesterov momentum times sqrt(max(1, out/in)).

    All parameter arrays have the shape [l, in, out]. `momentum` is a number or a function of the step. The
    Newton-Schulz iterations compute in `dtype` (bfloat16 on GPUs).

    With a `layout`, gradients and momentum are sharded. First, an all-to-all gives each device whole matrices to
    orthogonalise. With --shard=optimizer, an all-gather in `dtype` then gives every device all results. With
    --shard=full, a second all-to-all shards the results again.
    """

    def init(params: optax.Params) -> MuonState:
        return MuonState(jnp.zeros([], jnp.int32), jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:  # `state` is a MuonState, but optax declares it as any tree
        with jax.named_scope("muon"):
            mu = momentum if isinstance(momentum, int | float) else momentum(state.count)
            buffers = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, state.momentum, updates)
            nesterov = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, buffers, updates)
            if layout is None:
                transposed = jax.tree.map(lambda x: x.shape[-2] > x.shape[-1], nesterov)
            else:
                # Each device needs whole matrices, so `_orthogonalize_all` shards the arrays along the layers alone. If
                # `in` and `out` are both sharded before that, XLA all-gathers whole arrays. So the arrays are first
                # resharded over the mesh axis `data` alone, which leaves `in` or `out` unsharded.
                specs = layout.shard_specs(nesterov, ("data",))
                nesterov = layout.constrain(nesterov, specs)
                # `_by_shape` can concatenate matrices only if all are sharded along `in`. So matrices that are sharded
                # along `out` are transposed.
                transposed = jax.tree.map(lambda x, spec: spec[-1] == "data", nesterov, specs)
            updates = _by_shape(lambda x: _orthogonalize_all(x, dtype, layout), nesterov, transposed)
            if layout and layout.full:
                updates = layout.constrain(updates, specs)
            updates = jax.tree.map(lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5, updates)
            return updates, MuonState(state.count + 1, buffers)

    return optax.GradientTransformation(init, update)


def _orthogonalize_all(x: jax.Array, dtype: DTypeLike, layout: Layout | None) -> jax.Array:
    """Orthogonalises the n matrices of x [n, in, out]. Each device computes a part of them."""
    if layout is None or layout.mesh.size == 1:
        return orthogonalize(x, dtype).astype(x.dtype)
    y = orthogonalize(layout.all_to_all_matrices(x.astype(dtype)), dtype)
    # Otherwise, XLA may gather the operands of the last matmul, instead of its result.
    y = layout.constrain(y, P("data"))
    if not layout.full:
        y = layout.constrain(y, P())  # gathering before the cast to float32 sends half as many bytes
    return y[: x.shape[0]].astype(x.dtype)


def _by_shape(f: Callable[[jax.Array], jax.Array], tree: Any, transposed: Any) -> Any:
    """Applies `f` to the leaves [l, in, out] of `tree`. All matrices of the same shape form one batch.

    If `transposed` is true for a leaf, its matrices are transposed before `f` is applied, and the results are
    transposed back.

    Example: if w_out [20, 5120, 1280] is transposed, it forms one batch [40, 1280, 5120] with w_in [20, 1280, 5120].
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
    """Returns where to split concatenated arrays of these sizes: [3, 4, 5] -> [3, 7]."""
    return [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]


def momentum_warmup(step: ArrayLike) -> jax.Array:
    """Returns Muon's momentum in pretraining and midtraining. It rises from 0.85 to 0.95 in the first 300 steps."""
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
    """Returns the optimizer of every stage: AdamW for wte and lm_head, Muon for the blocks.

    All updates are proportional to the learning rates. The train step can therefore apply a learning-rate schedule by
    multiplying all updates by one factor. AdamW's learning rates were tuned at width 768, so they are multiplied by
    (width / 768)^-0.5. Muon's learning rate does not depend on the width. Weight decay applies only to AdamW.
    `momentum` applies only to Muon. With a `layout`, the updates of both are gathered in `dtype`.
    """
    factor = (width / 768) ** -0.5

    def adamw(lr: float) -> optax.GradientTransformation:
        rule = optax.adamw(lr * factor, b1=0.8, b2=0.95, eps=1e-10, weight_decay=weight_decay)

        def update(updates: optax.Updates, state: Any, params: optax.Params | None = None) -> tuple[optax.Updates, Any]:
            with jax.named_scope("adamw"):
                updates, state = rule.update(updates, state, params)
                return updates if layout is None else layout.gather_updates(updates, dtype), state

        return optax.GradientTransformation(rule.init, update)

    groups: dict[Hashable, optax.GradientTransformation] = {
        "embedding": adamw(embedding_lr),
        "head": adamw(unembedding_lr),
        "matrices": optax.chain(scale_by_muon(momentum, dtype, layout), optax.scale(-matrix_lr)),
    }
    labels = {"wte": "embedding", "lm_head": "head", "blocks": "matrices"}
    return optax.partition(groups, lambda params: {name: labels[name] for name in params})


# -----------------------------------------------------------------------------
# Learning-rate multipliers. The host computes them in Python and passes them to the train step as numbers.


def trapezoid(step: int, steps: int, warmup_ratio: float, warmdown_ratio: float, final: float) -> float:
    """Returns the learning-rate multiplier in pretraining.

    The multiplier rises linearly to 1 during warmup, stays at 1, and falls linearly to `final` during warmdown.
    `warmup_ratio` and `warmdown_ratio` are fractions of `steps`.
    """
    warmup, warmdown = round(warmup_ratio * steps), round(warmdown_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    if step <= steps - warmdown:
        return 1.0
    left = (steps - step) / warmdown
    return left + (1 - left) * final


def late_decay(progress: float) -> float:
    """Returns the learning-rate multiplier in midtraining.

    It stays at 1 until `progress` is 0.8, then falls linearly to 0.
    """
    return 1.0 if progress < 0.8 else max(0.0, (1 - progress) / 0.2)


def linear_decay(progress: float) -> float:
    """Returns the learning-rate multiplier in SFT and RL.

    It falls linearly from 1 to 0 as `progress` rises from 0 to 1.
    """
    return max(0.0, 1 - progress)
