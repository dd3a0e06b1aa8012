"""The engine's key/value cache. The engine has a fixed number of slots, and each slot has one row in the cache.

A cache is a dict of two lists, "k" and "v". Each list has one array [b,n,s,k] per layer: b rows, n key/value heads,
s positions and k numbers per head. Attention reads all keys of one head together, so they are stored contiguously.

All rows have the same number of positions. This number is rounded up to one of a few bucket sizes, so that only a few
programs are compiled. It is kept as small as possible, because attention reads empty positions too. Rows are never
cleared: attention masks the positions beyond a row's length.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from nanochat_jax.config import GPTConfig
from nanochat_jax.model.precision import accum_dtype
from nanochat_jax.parallel import sharding

# The number of positions in the smallest bucket. A smaller bucket would hardly make decoding faster, because reading
# the weights takes most of the time.
SMALLEST = 128

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

    The arrays are filled with zeros, because uninitialised memory may hold NaNs. Attention gives masked positions a
    weight of 0, but 0 times NaN is still NaN.
    """
    shape = (rows, model_cfg.n_kv_head, size, model_cfg.head_dim)
    return {
        name: [jnp.zeros(shape, dtype_for(dtype), device=where) for _ in range(model_cfg.n_layer)]
        for name in ("k", "v")
    }


def dtype_for(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype of the cache for a model that computes in `dtype`.

    On a CPU, the cache of a bfloat16 model is float32, because XLA's batched matmuls take up to 12 times as long in
    bfloat16.
    """
    return jnp.dtype(accum_dtype(dtype) if jax.default_backend() == "cpu" else dtype)


def size_of(cache: KV) -> int:
    """Returns the number of positions in each row of the cache."""
    return cache["k"][0].shape[2]


def resize(cache: KV, size: int) -> KV:
    """Truncates or extends every row of the cache to `size` positions.

    Replaces one array at a time, so that memory never holds two whole caches.
    """
    for buffers in cache.values():
        for i, old in enumerate(buffers):
            buffers[i] = _resize(old, size)
    return cache


@functools.partial(jax.jit, static_argnames=("size", "mesh"))
def copy_row(cache: KV, slot: jax.Array, *, size: int, mesh: Mesh | None) -> KV:
    """Copies the row of `slot` into a new cache of arrays [1,n,size,k]. Every device gets the whole copy.

    If the rows are divided over a mesh, only this row travels between the devices.
    """

    def take(cache: KV, slot: jax.Array) -> KV:
        place, here = _place(cache, slot, mesh)
        row = jax.tree.map(lambda x: _resize(jax.lax.dynamic_slice_in_dim(x, place, 1), size), cache)
        if mesh is None:
            return row
        return jax.lax.psum(jax.tree.map(lambda x: jnp.where(here, x, 0), row), sharding.BATCH_AXES)

    if mesh is None:
        return take(cache, slot)
    return jax.shard_map(take, mesh=mesh, in_specs=(P(sharding.BATCH_AXES), P()), out_specs=P())(cache, slot)


def _place(cache: KV, slot: jax.Array, mesh: Mesh | None) -> tuple[jax.Array, jax.Array | bool]:
    """Returns the place of a slot among this replica's rows of the cache, and whether this replica holds it."""
    if mesh is None:
        return slot, True
    rows = cache["k"][0].shape[0]
    place = slot - jax.lax.axis_index(sharding.BATCH_AXES) * rows
    return jnp.clip(place, 0, rows - 1), (place >= 0) & (place < rows)


@functools.partial(jax.jit, static_argnums=1)
def _resize(x: jax.Array, size: int) -> jax.Array:
    grow = (0, size - x.shape[2], 0)  # if the padding is negative, lax.pad truncates
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 0, 0), grow, (0, 0, 0)))


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def insert_rows(
    cache: KV, prefix: KV, source: jax.Array, target: jax.Array, count: jax.Array, *, mesh: Mesh | None
) -> KV:
    """For every i < count, copies row source[i] of `prefix` to the beginning of row target[i] of `cache`.

    The arrays of `prefix` are [p,n,s',k], and the arrays of `cache` are [b,n,s,k], with s' <= s. `source` and `target`
    are int32 [b]. The same row of `prefix` may be copied to several slots, because a prompt is prefilled once for all
    its samples. Only the rows that change are moved, in place.
    """

    def insert(shared: tuple, cache: KV) -> KV:
        prefix, source, target, count = shared
        return jax.lax.platform_dependent(cache, prefix, source, target, count, cuda=scatter, default=loop)

    def scatter(cache: KV, prefix: KV, source: jax.Array, target: jax.Array, count: jax.Array) -> KV:
        # The loop below has a dynamic number of iterations. On a GPU, the host would have to check the loop's condition
        # before every iteration.
        rows, size = cache["k"][0].shape[0], size_of(prefix)
        place, here = _place(cache, target, mesh)
        place = jnp.where(here & (jnp.arange(len(target)) < count), place, rows)  # beyond the last row: dropped
        return jax.tree.map(lambda to, x: to.at[place, :, :size].set(x[source], mode="drop"), cache, prefix)

    def loop(cache: KV, prefix: KV, source: jax.Array, target: jax.Array, count: jax.Array) -> KV:
        # On a CPU, XLA's scatter is slow.
        def copy(i: jax.Array, cache: KV) -> KV:
            place, here = _place(cache, target[i], mesh)

            def put(to: jax.Array, rows: jax.Array) -> jax.Array:
                row = jax.lax.dynamic_slice_in_dim(rows, source[i], 1)
                start = (place, 0, 0, 0)
                if mesh is not None:  # if another replica holds the row, nothing may change here
                    row = jnp.where(here, row, jax.lax.dynamic_slice(to, start, row.shape))
                return jax.lax.dynamic_update_slice(to, row, start)

            return jax.tree.map(put, cache, prefix)

        return jax.lax.fori_loop(0, count, copy, cache)

    return sharding.shard_map_rows(insert, mesh)((prefix, source, target, count), cache)
