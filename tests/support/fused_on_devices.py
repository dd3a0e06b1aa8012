"""Compares a step of the fused block with one of the plain block on 8 devices, for test_fused.py.

python fused_on_devices.py MESH... prints a JSON list with a number for each mesh: by how much the weights differ after
a step, as the norm of the difference divided by the norm of the step.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.config import Base, GPTConfig
from nanochat_jax.parallel.sharding import Layout, make_mesh, put_rows
from nanochat_jax.training import optim
from nanochat_jax.training.run import new_state
from nanochat_jax.training.step import execution, make_step

MODEL = GPTConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=64, vocab_size=64, sequence_len=128)


def difference(mesh: str) -> float:
    layout, results = Layout(make_mesh(mesh)), []
    tx = optim.make_optimizer(
        MODEL.n_embd, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, momentum=0.95, layout=layout
    )
    ids = np.random.default_rng(0).integers(0, 64, (1, 16, 129), dtype=np.int32)
    batch = {"inputs": put_rows(layout.mesh, ids[..., :-1]), "targets": put_rows(layout.mesh, ids[..., 1:])}
    for how in (execution(Base()), execution(Base(), layout)):
        assert bool(how.fused) == bool(results), "the second step is that of the fused block"
        state = new_state(MODEL, tx)
        params = jax.tree.map(lambda p: p + 0.02, state.params)  # away from the zeros of the initialisation
        start = jax.tree.map(np.asarray, params)
        params = jax.device_put(params, layout.shardings(layout.param_specs(params)))
        opt_state = jax.device_put(state.opt_state, layout.shardings(layout.shard_specs(state.opt_state)))
        step = make_step(MODEL, tx, jnp.float32, layout=layout, execution=how)
        state, metrics = step(state._replace(params=params, opt_state=opt_state), batch, 1.0)
        results.append(jax.tree.map(np.asarray, (state.params, metrics.grad_norm)))
    (plain, norm), (fused, fused_norm) = results
    np.testing.assert_allclose(fused_norm, norm, rtol=1e-4)
    off = jax.tree.map(lambda a, b, p: float(np.linalg.norm(a - b) / np.linalg.norm(a - p)), plain, fused, start)
    return max(jax.tree.leaves(off))


if __name__ == "__main__":
    print(json.dumps([difference(mesh) for mesh in sys.argv[1:]]))
