"""Causal attention: over a whole sequence in training, and against a cache in decoding.

Axis letters: b batch, t query time, s key time, h query head, n key/value head, k head dim.
"""

import jax
import jax.numpy as jnp


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of q [b,t,h,k] to k, v [b,t,n,k] -> [b,t,h,k]; query head i uses kv head i // (h/n).

    cuDNN's flash attention on GPUs in bf16, XLA elsewhere. Causality is a flag, never a mask: a mask tensor would
    take cuDNN off its fast path. Scale 1/sqrt(head dim).
    """
    flash = jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn" if flash else "xla")


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array) -> jax.Array:
    """Attention of q [b,t,h,k], whose first token sits at position start [b], to cache rows k, v [b,s,n,k].

    A query at position p sees slots 0..p. Softmax in float32.
    """
    b, t, h, d = q.shape
    n = k.shape[2]
    q = q.reshape(b, t, n, h // n, d)
    scores = jnp.einsum("btngk,bsnk->bngts", q, k, preferred_element_type=jnp.float32) * d**-0.5
    position = start[:, None] + jnp.arange(t)[None]  # [b,t]
    visible = jnp.arange(k.shape[1])[None, None, :] <= position[:, :, None]  # [b,t,s]
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bngts,bsnk->btngk", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(b, t, h, d).astype(v.dtype)
