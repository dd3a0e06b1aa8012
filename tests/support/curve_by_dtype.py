"""The loss of 300 steps on 8 devices, for test_sharding.py: python curve_by_dtype.py DTYPE...

Prints a JSON list of losses for each DTYPE in which gradients and updates travel. Everything else is float32.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.config import GPTConfig
from nanochat_jax.model import gpt
from nanochat_jax.parallel.sharding import Layout, make_mesh, put_rows
from nanochat_jax.training import optim
from nanochat_jax.training.step import TrainState, make_step

MODEL = GPTConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, vocab_size=64, sequence_len=32)


class Narrow(Layout):
    """A layout in which gradients and updates travel in `dtype`."""

    def __init__(self, dtype: str):
        super().__init__(make_mesh())
        reduce, gather = Layout.reduce_scatter_grads, Layout.gather_updates
        object.__setattr__(self, "reduce_scatter_grads", lambda grads, _: reduce(self, grads, dtype))
        object.__setattr__(self, "gather_updates", lambda updates, _: gather(self, updates, dtype))


def rows(rng: np.random.Generator, likely: np.ndarray) -> np.ndarray:
    """Token ids [1, 16, 33] in which each token is mostly one of two successors of the token before it."""
    ids = [rng.integers(0, 64, 16)]
    for _ in range(32):
        next_ids = likely[ids[-1], rng.integers(0, 2, 16)]
        ids.append(np.where(rng.random(16) < 0.9, next_ids, rng.integers(0, 64, 16)))
    return np.stack(ids, -1)[None].astype(np.int32)


def curve(dtype: str, steps: int = 300) -> list[float]:
    layout = Narrow(dtype)
    tx = optim.make_optimizer(
        MODEL.n_embd, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, momentum=optim.momentum_warmup,
        layout=layout,
    )  # fmt: skip
    step = make_step(MODEL, tx, jnp.float32, layout=layout)
    params = gpt.init(MODEL)
    opt_state = jax.jit(tx.init)(params)
    params = jax.device_put(params, layout.shardings(layout.param_specs(params)))
    state = TrainState(params, jax.device_put(opt_state, layout.shardings(layout.shard_specs(opt_state))))
    rng, losses = np.random.default_rng(0), []
    put = functools.partial(put_rows, layout.mesh)
    likely = rng.integers(0, 64, (64, 2))
    for _ in range(steps):
        ids = rows(rng, likely)
        state, metrics = step(state, {"inputs": put(ids[..., :-1]), "targets": put(ids[..., 1:])}, 1.0)
        losses.append(float(metrics.loss))
    return losses


if __name__ == "__main__":
    print(json.dumps([curve(dtype) for dtype in sys.argv[1:]]))
