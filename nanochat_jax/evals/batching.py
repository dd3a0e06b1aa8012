"""Batches for evaluation: prompts padded to few static shapes, their rows spread over the devices.

An evaluation of thousands of prompts thus compiles a handful of programs. What a prompt scores does not depend on the
others in its batch: attention is causal, so padding on the right changes nothing before it.
"""

import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.engine.cache import bucket
from nanochat_jax.model import gpt
from nanochat_jax.parallel import sharding

SHORTEST = 32  # tokens; shorter prompts are padded to it


def padded_length(length: int, limit: int) -> int:
    """The smallest power of two that holds `length` tokens, at least SHORTEST and at most `limit`."""
    assert 0 < length <= limit, f"{length} tokens in a context of {limit}"
    return bucket(length, limit, SHORTEST)


def padded(sequences: Sequence[np.ndarray], rows: int, limit: int, fill: int) -> np.ndarray:
    """At most `rows` sequences as int32 [rows, padded length of the longest]; missing rows and tails are `fill`."""
    assert 0 < len(sequences) <= rows, f"{len(sequences)} sequences in {rows} rows"
    batch = np.full((rows, padded_length(max(map(len, sequences)), limit)), fill, np.int32)
    for row, ids in zip(batch, sequences, strict=False):
        row[: len(ids)] = ids
    return batch


def fixed_rows(values: Sequence, rows: int) -> np.ndarray:
    """`values` as int32 [rows, ...], the first one repeated for the rows that are missing."""
    array = np.asarray(values, np.int32)
    return np.concatenate([array, np.repeat(array[:1], rows - len(array), axis=0)])


def num_rows(params: gpt.Params, batch_size: int) -> int:
    """The rows of all devices, of which each takes `batch_size` at once."""
    mesh = sharding.mesh_of(params)
    share = 1 if mesh is None else sharding.replicas(mesh)
    return batch_size * share


def put(params: gpt.Params, rows: np.ndarray) -> jax.Array:
    """Rows that every process holds in full, onto the devices."""
    place = sharding.batch_sharding(sharding.mesh_of(params))
    if place is None:
        return jnp.asarray(rows)
    return jax.make_array_from_callback(rows.shape, place, lambda index: rows[index])


def put_local(params: gpt.Params, rows: np.ndarray | jax.Array) -> jax.Array:
    """Rows of which every process holds its own, as one array of all of them."""
    place = sharding.batch_sharding(sharding.mesh_of(params))
    if place is None or isinstance(rows, jax.Array):
        return jnp.asarray(rows)
    return jax.make_array_from_process_local_data(place, rows)


def fetch(rows: jax.Array) -> np.ndarray:
    """All rows, back on the host of every process."""
    if rows.is_fully_addressable:
        return np.asarray(rows)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(rows, tiled=True)


def gather(values: list) -> list:
    """What the processes hold, each some values that JSON can hold, in one list: theirs in turn, as `range(process,
    n, processes)` deals them out."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    told = np.frombuffer(json.dumps(values).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(told)))
    texts = multihost_utils.process_allgather(np.pad(told, (0, sizes.max() - len(told))))
    parts = [json.loads(bytes(text[:size])) for text, size in zip(texts, sizes, strict=True)]
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]
