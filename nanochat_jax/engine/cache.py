"""The key/value cache of the engine: one pair of buffers a layer, one row a slot.

A cache is {"k": [l arrays [b,n,s,k]], "v": the same}; a head's keys lie together, because that is how attention reads
them. All rows share s, which is always one of a few bucket sizes, so that attention covers what is filled rather than
the whole context, and few shapes are compiled. Rows need no clearing: what lies behind a row's length is masked by
attention and overwritten as the row grows.
"""

import functools

import jax
import jax.numpy as jnp

from nanochat_jax.config import GPTConfig
from nanochat_jax.model.precision import accum_dtype
from nanochat_jax.parallel import sharding

SMALLEST = 128  # positions; below this, attention costs little next to the weights

KV = dict[str, list[jax.Array]]


def bucket(length: int, limit: int, smallest: int = SMALLEST) -> int:
    """The least power of two that holds `length` positions, at least `smallest` and at most `limit`."""
    assert 0 <= length <= limit, f"{length} positions, at most {limit}"
    return min(limit, max(smallest, 1 << max(length - 1, 0).bit_length()))


def make(
    model_cfg: GPTConfig, slots: int, size: int, dtype: jnp.dtype, where: jax.sharding.Sharding | None = None
) -> KV:
    """An empty cache of `slots` rows with `size` positions, for a model that computes in `dtype`. Zeros, since masked
    garbage could be NaN."""
    shape = (slots, model_cfg.n_kv_head, size, model_cfg.head_dim)
    return {
        name: [jnp.zeros(shape, dtype_for(dtype), device=where) for _ in range(model_cfg.n_layer)]
        for name in ("k", "v")
    }


def dtype_for(dtype: jnp.dtype) -> jnp.dtype:
    """What keys and values are kept in: `dtype`, but float32 on a CPU, where XLA's batched bf16 products take up to 12
    times as long."""
    return jnp.dtype(accum_dtype(dtype) if jax.default_backend() == "cpu" else dtype)


def resize(cache: KV, size: int) -> KV:
    """The cache with `size` positions: the last are cut off, or empty ones follow.

    Buffer by buffer, freeing each as it is replaced: memory never holds two caches.
    """
    for buffers in cache.values():
        for i, old in enumerate(buffers):
            buffers[i] = _resize(old, size)
    return cache


@functools.partial(jax.jit, static_argnames=("size", "mesh"))
def row(cache: KV, slot: jax.Array, *, size: int, mesh) -> KV:
    """A copy of one row, with `size` positions, whole on every device."""
    one = jax.tree.map(lambda x: _resize(jax.lax.dynamic_slice_in_dim(x, slot, 1), size), cache)
    return sharding.replicate(one, mesh)


@functools.partial(jax.jit, static_argnums=1)
def _resize(x: jax.Array, size: int) -> jax.Array:
    grow = (0, size - x.shape[2], 0)  # lax.pad cuts where this is negative
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 0, 0), grow, (0, 0, 0)))


@functools.partial(jax.jit, donate_argnums=0)
def insert(cache: KV, prefix: KV, source: jax.Array, target: jax.Array, count: jax.Array) -> KV:
    """Copies row source[i] of `prefix` to the front of row target[i] of `cache`, for i below `count`.

    One prefix row may go to many slots: that is how the samples of a prompt share its prefill. A loop of slice updates
    rather than a scatter, because it moves only the rows that change and stays in place.
    """

    def copy(i, cache):
        def put(to, rows):
            row = jax.lax.dynamic_slice_in_dim(rows, source[i], 1)
            return jax.lax.dynamic_update_slice(to, row, (target[i], 0, 0, 0))

        return jax.tree.map(put, cache, prefix)

    return jax.lax.fori_loop(0, count, copy, cache)
