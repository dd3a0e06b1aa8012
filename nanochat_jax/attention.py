"""Causal attention: over a whole sequence in training, and against a cache in decoding.

Axis letters: b batch, t query time, s key time, h query head, n key/value head, k head dim.
"""

import jax
import jax.numpy as jnp


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of q [b,t,h,k] to k, v [b,t,n,k] -> [b,t,h,k]; query head i uses kv head i // (h/n).

    cuDNN's flash attention on GPUs in bf16, where causality is a flag and never a mask: a mask tensor would take cuDNN
    off its fast path. XLA elsewhere. Scale 1/sqrt(head dim), softmax in float32.
    """
    if jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    # In four blocks of queries, each against the keys up to its end: 5/8 of the scores, the rest being masked anyway.
    # On a CPU forward and backward take about two thirds of the time of one masked square (t = 256).
    b, t, h, d = q.shape
    n = k.shape[2]
    q = jnp.moveaxis(q.reshape(b, t, n, h // n, d) * d**-0.5, 1, 3)  # [b,n,g,t,k], g query heads a kv head
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [b,n,s,k]
    block = t // 4 if t % 4 == 0 and t >= 128 else t
    out = []
    for start in range(0, t, block):
        end = start + block
        rows, seen = q[..., start:end, :], k[:, :, :end]
        scores = jnp.einsum("bngtk,bnsk->bngts", rows, seen, preferred_element_type=jnp.float32)
        visible = jnp.arange(end)[None] <= jnp.arange(start, end)[:, None]
        weights = jax.nn.softmax(jnp.where(visible[None, None, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
        out.append(jnp.einsum("bngts,bnsk->bngtk", weights, v[:, :, :end], preferred_element_type=jnp.float32))
    return jnp.moveaxis(jnp.concatenate(out, axis=3), 3, 1).reshape(b, t, h, d).astype(v.dtype)


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
