"""Soft-capped cross-entropy that never materialises the logits of a whole batch.

The time axis is split into chunks, and the head and the softmax are applied to one chunk at a time. While the chunk's
logits exist, the forward pass computes the gradients with respect to the hidden states and the head. The backward pass
only scales these gradients by the cotangent. This takes three matmuls per chunk, recomputes nothing, and holds the
float32 logits of only one chunk at a time. With a vocabulary of 65,536, the logits of a whole batch of 32 x 2048 tokens
would take 16 GiB. The idea comes from Liger's fused linear cross-entropy (arXiv:2410.10989).
"""

import functools

import jax
import jax.numpy as jnp

from nanochat_jax.model.precision import accum_dtype


def num_chunks(batch: int, time: int, tokens: int = 8192) -> int:
    """Returns the smallest divisor of `time` for which a chunk has at most `tokens` tokens.

    If there is no such divisor, returns `time`. Example: num_chunks(32, 2048) -> 8, for chunks of 32 x 256 tokens.
    """
    return next(c for c in range(1, time + 1) if time % c == 0 and (batch * time // c <= tokens or c == time))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, softcap: float, chunks: int
) -> jax.Array:
    """Returns the sum, over all counted targets, of weight times cross-entropy, as a float32 scalar.

    Arguments: hidden states x [b,t,d] in the compute dtype; head [v,d] without padding rows; int targets [b,t]
    (negative: not counted); float32 weights [b,t] (ones, or advantages in RL); `chunks`, a divisor of t. The caller
    divides the sum by the number of counted targets in the global batch. If no target is counted, the caller divides
    by 1, so that the result is 0 and not NaN.
    """
    return (weights * token_losses(x, head, targets, softcap, chunks)).sum()


def token_losses(x: jax.Array, head: jax.Array, targets: jax.Array, softcap: float, chunks: int) -> jax.Array:
    """Returns the cross-entropy of each token, float32 [b,t]; it is 0 where the target is negative.

    Use this function for bits per byte, and `cross_entropy` for gradients. The arguments are those of `cross_entropy`.
    """
    w = head.astype(x.dtype)

    def one_chunk(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, _losses(chunk[0], w, chunk[1], softcap)[0]

    losses = jax.lax.scan(one_chunk, None, (_split(x, chunks), _split(targets, chunks)))[1]
    return _join(losses)


def _losses(x: jax.Array, w: jax.Array, targets: jax.Array, softcap: float) -> tuple[jax.Array, ...]:
    """Returns a chunk's losses [b,t] and what gradients need: capped logits, log-sum-exp, one-hot targets, mask."""
    z = jnp.einsum("btd,vd->btv", x, w, preferred_element_type=accum_dtype(x.dtype))
    z = softcap * jnp.tanh(z / softcap)
    lse = jax.nn.logsumexp(z, axis=-1, keepdims=True)
    counted = targets >= 0
    right = jax.nn.one_hot(targets, w.shape[0], dtype=z.dtype)  # all zero for a negative target
    losses = jnp.where(counted, lse[..., 0] - (z * right).sum(-1), 0.0)
    return losses, z, lse, right, counted


def _forward(
    x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, softcap: float, chunks: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns (loss, (dx [b,t,d], dhead [v,d])): the loss, and its gradients for a cotangent of 1."""
    w = head.astype(x.dtype)

    def one_chunk(dw: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        x, targets, weights = chunk
        losses, z, lse, right, counted = _losses(x, w, targets, softcap)
        dz = (jnp.exp(z - lse) - right) * (weights * counted)[..., None] * (1 - jnp.square(z / softcap))
        dz = dz.astype(x.dtype)
        dx = jnp.einsum("btv,vd->btd", dz, w, preferred_element_type=accum_dtype(x.dtype)).astype(x.dtype)
        # The head's gradient is computed as [d,v], since computing it as [v,d] is slow on CPUs.
        dw = dw + jnp.einsum("btd,btv->dv", x, dz, preferred_element_type=accum_dtype(x.dtype))
        return dw, ((weights * losses).sum(), dx)

    split = tuple(_split(a, chunks) for a in (x, targets, weights))
    dw, (losses, dx) = jax.lax.scan(one_chunk, jnp.zeros(head.shape[::-1], accum_dtype(x.dtype)), split)
    # Without this barrier, XLA would compute the gradient of a single chunk as [v,d], for which some CPUs have no bf16
    # dot.
    dw = jax.lax.optimization_barrier(dw).T
    return losses.sum(), (_join(dx), dw.astype(head.dtype))


def _backward(
    softcap: float, chunks: int, gradients: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    dx, dw = gradients
    return (dx * g).astype(dx.dtype), (dw * g).astype(dw.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


def _split(x: jax.Array, chunks: int) -> jax.Array:
    """[b,t,...] -> [chunks, b, t/chunks, ...]: splits time, not the batch, so that no row moves to another device."""
    b, t = x.shape[:2]
    return jnp.moveaxis(x.reshape(b, chunks, t // chunks, *x.shape[2:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """[chunks, b, t/chunks, ...] -> [b,t,...]: the inverse of `_split`."""
    c, b, t = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(b, c * t, *x.shape[3:])
