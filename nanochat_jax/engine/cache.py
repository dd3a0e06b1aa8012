"""The engine's key/value cache. Each slot has one row in the cache.

A cache is a dict of two lists, "k" and "v", each with one array [b,n,s,k] per layer. In memory, the keys of a head are
contiguous, which is how attention reads them. The number of positions s is the same for all rows, and it is one of a
few bucket sizes. This keeps the number of compiled shapes small, and attention covers little more than the filled
positions. Rows are never cleared: attention masks the positions beyond a row's length until new tokens overwrite them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from nanochat_jax.config import GPTConfig
from nanochat_jax.model.precision import accum_dtype
from nanochat_jax.parallel import sharding

SMALLEST = 128  # positions in the smallest bucket; fewer would save little time, since reading the weights takes longer

KV = dict[str, list[jax.Array]]


def bucket(length: int, limit: int, smallest: int = SMALLEST) -> int:
    """Returns `length` rounded up to a power of two, but at least `smallest` and at most `limit`.

    With a limit of 2048, length 0 gives 128, length 129 gives 256, and length 2000 gives 2048.
    """
    assert 0 <= length <= limit, f"{length} positions, at most {limit}"
    return min(limit, max(smallest, 1 << max(length - 1, 0).bit_length()))


def allocate(
    model_cfg: GPTConfig, rows: int, size: int, dtype: DTypeLike, where: jax.sharding.Sharding | None = None
) -> KV:
    """Returns an empty cache of arrays [rows,n,size,k], for a model that computes in `dtype`.

    The arrays hold zeros: uninitialised memory may hold NaNs, and the attention mask does not remove NaNs.
    """
    shape = (rows, model_cfg.n_kv_head, size, model_cfg.head_dim)
    return {
        name: [jnp.zeros(shape, dtype_for(dtype), device=where) for _ in range(model_cfg.n_layer)]
        for name in ("k", "v")
    }


def dtype_for(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype of the cache for a model that computes in `dtype`. On a CPU, bfloat16 is
    stored as float32, since XLA's batched bfloat16 products take up to 12 times as long."""
    return jnp.dtype(accum_dtype(dtype) if jax.default_backend() == "cpu" else dtype)


def size_of(cache: KV) -> int:
    """Returns the number of positions in each row of the cache."""
    return cache["k"][0].shape[2]


def resize(cache: KV, size: int) -> KV:
    """Truncates the rows of the cache to `size` positions, or extends them to `size` positions.

    The arrays are replaced one at a time, and each old array is freed at once, so that memory never holds two caches.
    """
    for buffers in cache.values():
        for i, old in enumerate(buffers):
            buffers[i] = _resize(old, size)
    return cache


@functools.partial(jax.jit, static_argnames=("size", "mesh"))
def copy_row(cache: KV, slot: jax.Array, *, size: int, mesh: Mesh | None) -> KV:
    """Returns a copy of the slot's row: a cache of arrays [1,n,size,k], replicated on every device."""
    row = jax.tree.map(lambda x: _resize(jax.lax.dynamic_slice_in_dim(x, slot, 1), size), cache)
    return sharding.replicate(row, mesh)


@functools.partial(jax.jit, static_argnums=1)
def _resize(x: jax.Array, size: int) -> jax.Array:
    grow = (0, size - x.shape[2], 0)  # number of positions to append; if it is negative, lax.pad truncates
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 0, 0), grow, (0, 0, 0)))


@functools.partial(jax.jit, donate_argnums=0)
def insert_rows(cache: KV, prefix: KV, source: jax.Array, target: jax.Array, count: jax.Array) -> KV:
    """Copies row source[i] of `prefix` to the beginning of row target[i] of `cache`, for every i below `count`.

    The arrays of `prefix` are [p,n,s',k], and the arrays of `cache` are [b,n,s,k], with s' <= s. `source` and `target`
    are int32 [b]. The samples of a prompt share one prefill, whose row is copied to several slots. A loop of slice
    updates is used instead of a scatter, because the loop works in place and moves only the rows that change.
    """

    def copy(i: jax.Array, cache: KV) -> KV:
        def put(to: jax.Array, rows: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_slice_in_dim(rows, source[i], 1)
            return jax.lax.dynamic_update_slice(to, row, (target[i], 0, 0, 0))

        return jax.tree.map(put, cache, prefix)

    return jax.lax.fori_loop(0, count, copy, cache)
