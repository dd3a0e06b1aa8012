"""Makes batches for evaluation: prompts are padded to one of a few lengths, and the rows are sharded over the devices.

CORE (scripts.base_eval), multiple choice (scripts.chat_eval) and bits per byte (scripts.base_loss) use this module.

Because there are only a few lengths, an evaluation of thousands of prompts compiles only a handful of programs. A
prompt's score does not depend on the other prompts in its batch: attention is causal, so the padding to the right of a
prompt affects none of the prompt's tokens.
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

SHORTEST = 32  # in tokens; shorter prompts are padded to this length


def padded_length(length: int, limit: int) -> int:
    """Rounds `length` up to a power of two. The result is at least SHORTEST and at most `limit`.

    Example: a length of 100 with a limit of 2048 -> 128.
    """
    assert 0 < length <= limit, f"{length} tokens in a context of {limit}"
    return bucket(length, limit, SHORTEST)


def padded(sequences: Sequence[np.ndarray], rows: int, limit: int, fill: int) -> np.ndarray:
    """Puts the sequences into an array int32 [rows, padded length of the longest sequence]. The rest of the array is
    `fill`."""
    assert 0 < len(sequences) <= rows, f"{len(sequences)} sequences in {rows} rows"
    batch = np.full((rows, padded_length(max(map(len, sequences)), limit)), fill, np.int32)
    for row, ids in zip(batch, sequences, strict=False):
        row[: len(ids)] = ids
    return batch


def fixed_rows(values: ArrayLike, rows: int) -> np.ndarray:
    """Returns `values` as int32 [rows, ...]. If there are fewer than `rows` values, copies of the first value are
    appended.

    Example: [5, 7] with rows=4 -> [5, 7, 5, 5].
    """
    array = np.asarray(values, np.int32)
    return np.concatenate([array, np.repeat(array[:1], rows - len(array), axis=0)])


def num_rows(params: gpt.Params, batch_size: int) -> int:
    """The number of rows in a batch that gives `batch_size` rows to each replica of the model."""
    mesh = sharding.mesh_of(params)
    return batch_size * (1 if mesh is None else sharding.replicas(mesh))


def put(params: gpt.Params, rows: np.ndarray) -> jax.Array:
    """Puts rows on the devices as one array, sharded like a batch. Every process must pass all of the rows."""
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
    """Returns all rows as a NumPy array on every process."""
    if rows.is_fully_addressable:
        return np.asarray(rows)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(rows, tiled=True)


def gather(values: list[Any]) -> list[Any]:
    """Returns a list of the JSON values of all processes, on every process.

    Of n values, process i of p processes passes the values at the indices range(i, n, p). The list has the values in
    the order of these indices. Example: [a, c, e] on process 0 and [b, d] on process 1 -> [a, b, c, d, e] on both
    processes.
    """
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    encoded = np.frombuffer(json.dumps(values).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(encoded)))
    texts = multihost_utils.process_allgather(np.pad(encoded, (0, sizes.max() - len(encoded))))
    parts = [json.loads(bytes(text[:size])) for text, size in zip(texts, sizes, strict=True)]
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]
