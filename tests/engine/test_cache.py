"""Rows are inserted into the cache, as on a GPU and as on a CPU. test_engine_devices.py does the same on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.config import GPTConfig
from nanochat_jax.engine import cache as kv

MODEL = GPTConfig(n_layer=2, n_head=2, n_kv_head=2, n_embd=16, sequence_len=64)


def random_cache(rows: int, size: int, seed: int) -> kv.KV:
    numbers = iter(jax.random.split(jax.random.key(seed), 2 * MODEL.n_layer))
    return jax.tree.map(
        lambda x: jax.random.normal(next(numbers), x.shape), kv.allocate(MODEL, rows, size, jnp.float32)
    )


@pytest.fixture(params=["cuda", "default"])
def platform(request, monkeypatch):
    """Runs what this platform would run, on the CPU."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, **branches: branches[request.param](*args))
    kv.insert_rows.clear_cache()
    yield request.param
    kv.insert_rows.clear_cache()


def test_rows_are_inserted_where_they_belong_and_nowhere_else(platform):
    cache, prefix = random_cache(6, 64, seed=0), random_cache(2, 32, seed=1)
    source, target = np.array([1, 0, 1, 1, 1, 1], np.int32), np.array([5, 0, 2, 3, 3, 3], np.int32)
    expected = jax.tree.map(np.array, cache)
    for name in expected:
        for to, rows in zip(expected[name], prefix[name], strict=True):
            for i in range(3):
                to[target[i], :, :32] = rows[source[i]]
    inserted = kv.insert_rows(cache, prefix, source, target, np.int32(3), mesh=None)
    jax.tree.map(np.testing.assert_array_equal, inserted, expected)
