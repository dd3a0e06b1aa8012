"""Makes batches for evaluation: pads prompts to one of a few lengths, and shards the rows over the devices.

CORE (scripts.base_eval), multiple choice (scripts.chat_eval) and bits per byte (scripts.base_loss) use this module.

JAX compiles one program for each length, so a few lengths need only a few programs. A prompt's score depends neither on
the other prompts in its batch nor on the padding. The padding is to the right of the prompt, and causal attention never
looks to the right.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from nanochat_jax.config import GPTConfig
from nanochat_jax.engine.cache import bucket
from nanochat_jax.model import attention, gpt
from nanochat_jax.parallel import sharding

SHORTEST = 32  # in tokens; shorter prompts are padded to this length


def padded_length(length: int, limit: int) -> int:
    """Rounds `length` up to a power of two. The result is at least SHORTEST and at most `limit`.

    Example: padded_length(100, 2048) -> 128.
    """
    assert 0 < length <= limit, f"{length} tokens in a context of {limit}"
    return bucket(length, limit, SHORTEST)


def padded(sequences: Sequence[np.ndarray], rows: int, limit: int, fill: int) -> np.ndarray:
    """Returns int32 [rows, padded length of the longest sequence]. Each sequence fills the beginning of a row, and all
    other entries are `fill`."""
    assert 0 < len(sequences) <= rows, f"{len(sequences)} sequences in {rows} rows"
    batch = np.full((rows, padded_length(max(map(len, sequences)), limit)), fill, np.int32)
    for row, ids in zip(batch, sequences, strict=False):
        row[: len(ids)] = ids
    return batch


def fixed_rows(values: ArrayLike, rows: int) -> np.ndarray:
    """Returns `values` as int32 [rows, ...]. Missing rows are filled with copies of the first value.

    Example: [5, 7] with rows=4 -> [5, 7, 5, 5].
    """
    array = np.asarray(values, np.int32)
    return np.concatenate([array, np.repeat(array[:1], rows - len(array), axis=0)])


def num_rows(params: gpt.Params, model_cfg: GPTConfig, batch_size: int) -> int:
    """Returns the number of rows in a batch that has `batch_size` rows for each replica of the model.

    Raises UserError if the attention kernel cannot compute that many rows on one device.
    """
    attention.check_rows(batch_size, model_cfg)
    mesh = sharding.mesh_of(params)
    return batch_size * (1 if mesh is None else sharding.replicas(mesh))


def put(params: gpt.Params, rows: np.ndarray) -> jax.Array:
    """Puts rows on the devices as one array, split over the replicas. Every process must pass all rows."""
    place = sharding.batch_sharding(sharding.mesh_of(params))
    if place is None:
        return jnp.asarray(rows)
    return jax.make_array_from_callback(rows.shape, place, lambda index: rows[index])


def put_local(params: gpt.Params, rows: np.ndarray | jax.Array) -> jax.Array:
    """Puts rows on the devices as one array, split over the replicas. Each process passes only its own rows."""
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
    """Returns the values of all processes as one list on every process. The values must be JSON-serializable.

    With p processes, process i passes every p-th value, starting with value i. The result has the values in their
    original order. Example: [a, c, e] on process 0 and [b, d] on process 1 -> [a, b, c, d, e] on both processes.
    """
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    encoded = np.frombuffer(json.dumps(values).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(encoded)))
    texts = multihost_utils.process_allgather(np.pad(encoded, (0, sizes.max() - len(encoded))))
    parts = [json.loads(bytes(text[:size])) for text, size in zip(texts, sizes, strict=True)]
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]
