"""The engine's key/value cache: one pair of buffers per layer, one row per slot.

A cache is {"k": [l arrays [b,n,s,k]], "v": the same}. The keys of one head are contiguous, because attention reads them
that way. All rows have the same number of positions s, which is always one of a few bucket sizes. Attention therefore
covers little more than the filled positions, not the whole context, and only a few shapes are compiled. Rows are never
cleared: attention masks the positions beyond a row's length, and new tokens overwrite them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from nanochat_jax.config import GPTConfig
from nanochat_jax.model.precision import accum_dtype
from nanochat_jax.parallel import sharding

SMALLEST = 128  # positions in the smallest bucket; a smaller one would save little, as reading the weights takes longer

KV = dict[str, list[jax.Array]]


def bucket(length: int, limit: int, smallest: int = SMALLEST) -> int:
    """The smallest power of two that holds `length` positions, at least `smallest` and at most `limit`.

    With a limit of 2048: 0 -> 128, 129 -> 256, 2000 -> 2048.
    """
    assert 0 <= length <= limit, f"{length} positions, at most {limit}"
    return min(limit, max(smallest, 1 << max(length - 1, 0).bit_length()))


def allocate(
    model_cfg: GPTConfig, rows: int, size: int, dtype: DTypeLike, where: jax.sharding.Sharding | None = None
) -> KV:
    """An empty cache with arrays [rows,n,size,k], for a model that computes in `dtype`.

    It is filled with zeros, since uninitialised memory may hold NaNs, which the attention mask does not remove.
    """
    shape = (rows, model_cfg.n_kv_head, size, model_cfg.head_dim)
    return {
        name: [jnp.zeros(shape, dtype_for(dtype), device=where) for _ in range(model_cfg.n_layer)]
        for name in ("k", "v")
    }


def dtype_for(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which keys and values are stored: `dtype`, except on a CPU. There it is float32, since XLA's
    batched bf16 products take up to 12 times as long."""
    return jnp.dtype(accum_dtype(dtype) if jax.default_backend() == "cpu" else dtype)


def size_of(cache: KV) -> int:
    """The number of positions s in each row of a cache."""
    return cache["k"][0].shape[2]


def resize(cache: KV, size: int) -> KV:
    """Arrays [b,n,s,k] -> [b,n,size,k]: rows are truncated, or empty positions are appended to them.

    The buffers are replaced one at a time, and each old one is freed at once, so that memory never holds two caches.
    """
    for buffers in cache.values():
        for i, old in enumerate(buffers):
            buffers[i] = _resize(old, size)
    return cache


@functools.partial(jax.jit, static_argnames=("size", "mesh"))
def copy_row(cache: KV, slot: jax.Array, *, size: int, mesh: Mesh | None) -> KV:
    """A copy of one slot's row, as a cache with a single row: arrays [1,n,size,k], replicated on every device."""
    row = jax.tree.map(lambda x: _resize(jax.lax.dynamic_slice_in_dim(x, slot, 1), size), cache)
    return sharding.replicate(row, mesh)


@functools.partial(jax.jit, static_argnums=1)
def _resize(x: jax.Array, size: int) -> jax.Array:
    grow = (0, size - x.shape[2], 0)  # how many positions to add; if negative, lax.pad truncates
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 0, 0), grow, (0, 0, 0)))


@functools.partial(jax.jit, donate_argnums=0)
def insert_rows(cache: KV, prefix: KV, source: jax.Array, target: jax.Array, count: jax.Array) -> KV:
    """For every i below `count`, copies row source[i] of `prefix` [p,n,s',k] to the beginning of row target[i] of
    `cache` [b,n,s,k], where s' <= s. source and target are int32 [b].

    One prefix row may go to many slots: that is how the samples of a prompt share its prefill. A loop of slice updates
    is used rather than a scatter, because the loop moves only the rows that change and works in place.
    """

    def copy(i: jax.Array, cache: KV) -> KV:
        def put(to: jax.Array, rows: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_slice_in_dim(rows, source[i], 1)
            return jax.lax.dynamic_update_slice(to, row, (target[i], 0, 0, 0))

        return jax.tree.map(put, cache, prefix)

    return jax.lax.fori_loop(0, count, copy, cache)
