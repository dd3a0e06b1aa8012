"""Soft-capped cross-entropy that never materialises the logits of a whole batch.

The time axis is split into chunks, and the head and the softmax are applied to one chunk at a time. While the logits of
a chunk are in memory, the forward pass also computes the gradients of the hidden states and of the head. The backward
pass only scales these gradients by the cotangent. Each chunk takes three matmuls, and no logits are computed twice.
Only one chunk's logits are in memory at a time. With a vocabulary of 65,536, the float32 logits of a whole batch of
32 x 2048 tokens would take 16 GiB. The idea comes from Liger's fused linear cross-entropy (arXiv:2410.10989).
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nanochat_jax.model.precision import accum_dtype

MOST_WITHOUT_MAXIMUM = 60.0  # up to this soft cap, float32 can hold the sum of exp(logit) over any vocabulary


def num_chunks(batch: int, time: int, tokens: int = 8192) -> int:
    """Returns the smallest number of equal time chunks such that each chunk has at most `tokens` tokens.

    Returns `time` if `batch` alone exceeds `tokens`. Example: num_chunks(32, 2048) -> 8 chunks of 32 x 256 tokens.
    """
    return next(c for c in range(1, time + 1) if time % c == 0 and (batch * time // c <= tokens or c == time))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, softcap: float, chunks: int
) -> jax.Array:
    """Returns the weighted sum of the cross-entropy over all counted targets, as a float32 scalar.

    x        hidden states [b,t,d] in the compute dtype
    head     [v,d], without padding rows
    targets  int [b,t]; negative targets are not counted
    weights  float32 [b,t]: ones, or advantages in RL
    chunks   a divisor of t

    The caller divides the sum by the number of counted targets in the global batch. If that number is 0, the caller
    divides by 1, so that the result is 0 and not NaN.
    """
    return (weights * token_losses(x, head, targets, softcap, chunks)).sum()


def token_losses(x: jax.Array, head: jax.Array, targets: jax.Array, softcap: float, chunks: int) -> jax.Array:
    """Returns the cross-entropy of each target, float32 [b,t]. It is 0 for negative targets.

    The arguments are the same as in `cross_entropy`. Evaluation uses this function, and training uses `cross_entropy`.
    """
    w = head.astype(x.dtype)

    def one_chunk(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, _losses(chunk[0], w, chunk[1], softcap)[0]

    losses = jax.lax.scan(one_chunk, None, (_split(x, chunks), _split(targets, chunks)))[1]
    return _join(losses)


def _losses(x: jax.Array, w: jax.Array, targets: jax.Array, softcap: float) -> tuple[jax.Array, ...]:
    """Returns a chunk's losses [b,t], logits before the soft cap, log-sum-exp, one-hot targets, and counted targets."""
    z = _reread(jnp.einsum("btd,vd->btv", x, w, preferred_element_type=accum_dtype(x.dtype)), x.dtype)
    lse = _logsumexp(softcap * jnp.tanh(z / softcap), softcap)
    counted = targets >= 0
    right = jax.nn.one_hot(targets, w.shape[0], dtype=z.dtype)  # all zeros for a negative target
    of_target = softcap * jnp.tanh((z * right).sum(-1) / softcap)
    losses = jnp.where(counted, lse[..., 0] - of_target, 0.0)
    return losses, z, lse, right, counted


def _reread(z: jax.Array, dtype: DTypeLike) -> jax.Array:
    """On a GPU, makes XLA write the logits z once, in `dtype`, and read them again in the next pass over them.

    The time of the loss is the time to move the logits. Without the barrier, XLA would write them in float32, and would
    also write their tanh. In the original nanochat, too, the logits are rounded to bf16. On a CPU, returns z itself.
    """

    def rounded(z: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(z.astype(dtype)).astype(z.dtype)

    return jax.lax.platform_dependent(z, cuda=rounded, default=lambda z: z)


def _logsumexp(z: jax.Array, softcap: float) -> jax.Array:
    """Returns the log-sum-exp [b,t,1] of capped logits z [b,t,v]. No pass finds a maximum, because z is bounded."""
    if softcap > MOST_WITHOUT_MAXIMUM:
        return jax.nn.logsumexp(z, axis=-1, keepdims=True)
    return jnp.log(jnp.exp(z).sum(axis=-1, keepdims=True))


def _forward(
    x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, softcap: float, chunks: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns (loss, (dx [b,t,d], dhead [v,d])). The gradients assume a cotangent of 1."""
    w = head.astype(x.dtype)

    def one_chunk(dw: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        x, targets, weights = chunk
        losses, z, lse, right, counted = _losses(x, w, targets, softcap)
        tanh = jnp.tanh(_reread(z, x.dtype) / softcap)
        dz = (jnp.exp(softcap * tanh - lse) - right) * (weights * counted)[..., None] * (1 - jnp.square(tanh))
        dz = dz.astype(x.dtype)
        dx = jnp.einsum("btv,vd->btd", dz, w, preferred_element_type=accum_dtype(x.dtype)).astype(x.dtype)
        # The head's gradient is computed as [d,v], because computing it as [v,d] is slow on CPUs.
        dw = dw + jnp.einsum("btd,btv->dv", x, dz, preferred_element_type=accum_dtype(x.dtype))
        return dw, ((weights * losses).sum(), dx)

    split = tuple(_split(a, chunks) for a in (x, targets, weights))
    dw, (losses, dx) = jax.lax.scan(one_chunk, jnp.zeros(head.shape[::-1], accum_dtype(x.dtype)), split)
    # If there is only one chunk, this barrier keeps XLA from computing the gradient as [v,d]. Some CPUs have no bf16
    # matmul for the axis order [v,d].
    dw = jax.lax.optimization_barrier(dw).T
    return losses.sum(), (_join(dx), dw.astype(head.dtype))


def _backward(
    softcap: float, chunks: int, gradients: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    dx, dw = gradients
    return (dx * g).astype(dx.dtype), (dw * g).astype(dw.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


def _split(x: jax.Array, chunks: int) -> jax.Array:
    """Splits the time axis: [b,t,...] -> [chunks, b, t/chunks, ...].

    Splitting the batch axis instead would move rows to other devices.
    """
    b, t = x.shape[:2]
    return jnp.moveaxis(x.reshape(b, chunks, t // chunks, *x.shape[2:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """Inverts `_split`: [chunks, b, t/chunks, ...] -> [b,t,...]."""
    c, b, t = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(b, c * t, *x.shape[3:])
