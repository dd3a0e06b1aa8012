"""Batches for evaluation: prompts are padded to a few static shapes, and the rows are sharded over the devices.

Used by CORE (scripts.base_eval), multiple choice (scripts.chat_eval) and bits per byte (scripts.base_loss).

With so few shapes, an evaluation of thousands of prompts compiles only a handful of programs. A prompt's score does not
depend on the other prompts in its batch: attention is causal, so padding on the right affects no token before it.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from nanochat_jax.engine.cache import bucket
from nanochat_jax.model import gpt
from nanochat_jax.parallel import sharding

SHORTEST = 32  # tokens; shorter prompts are padded to this length


def padded_length(length: int, limit: int) -> int:
    """The smallest power of two that holds `length` tokens, at least SHORTEST and at most `limit`.

    100 tokens in a context of 2048 -> 128
    """
    assert 0 < length <= limit, f"{length} tokens in a context of {limit}"
    return bucket(length, limit, SHORTEST)


def padded(sequences: Sequence[np.ndarray], rows: int, limit: int, fill: int) -> np.ndarray:
    """Up to `rows` sequences as one array int32 [rows, padded length of the longest sequence]. The rest is `fill`."""
    assert 0 < len(sequences) <= rows, f"{len(sequences)} sequences in {rows} rows"
    batch = np.full((rows, padded_length(max(map(len, sequences)), limit)), fill, np.int32)
    for row, ids in zip(batch, sequences, strict=False):
        row[: len(ids)] = ids
    return batch


def fixed_rows(values: ArrayLike, rows: int) -> np.ndarray:
    """`values` as int32 [rows, ...]; if there are fewer than `rows`, copies of the first value fill the rest.

    [5, 7] in 4 rows -> [5, 7, 5, 5]
    """
    array = np.asarray(values, np.int32)
    return np.concatenate([array, np.repeat(array[:1], rows - len(array), axis=0)])


def num_rows(params: gpt.Params, batch_size: int) -> int:
    """The number of rows in a batch that has `batch_size` rows on each device."""
    mesh = sharding.mesh_of(params)
    return batch_size * (1 if mesh is None else sharding.replicas(mesh))


def put(params: gpt.Params, rows: np.ndarray) -> jax.Array:
    """Puts rows on the devices, sharded like a batch. Every process must pass all of the rows."""
    place = sharding.batch_sharding(sharding.mesh_of(params))
    if place is None:
        return jnp.asarray(rows)
    return jax.make_array_from_callback(rows.shape, place, lambda index: rows[index])


def put_local(params: gpt.Params, rows: np.ndarray | jax.Array) -> jax.Array:
    """Puts rows on the devices as one array, sharded like a batch. Each process passes only its own rows."""
    place = sharding.batch_sharding(sharding.mesh_of(params))
    if place is None or isinstance(rows, jax.Array):
        return jnp.asarray(rows)
    return jax.make_array_from_process_local_data(place, rows)


def fetch(rows: jax.Array) -> np.ndarray:
    """Copies all rows to the host of every process."""
    if rows.is_fully_addressable:
        return np.asarray(rows)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(rows, tiled=True)


def gather(values: list[Any]) -> list[Any]:
    """All-gathers JSON values into one list, in their original order. Each process passes the values at the indices
    `range(process, n, processes)`.

    [a, c, e] on process 0 and [b, d] on process 1 -> [a, b, c, d, e] on both
    """
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    encoded = np.frombuffer(json.dumps(values).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(encoded)))
    texts = multihost_utils.process_allgather(np.pad(encoded, (0, sizes.max() - len(encoded))))
    parts = [json.loads(bytes(text[:size])) for text, size in zip(texts, sizes, strict=True)]
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]
