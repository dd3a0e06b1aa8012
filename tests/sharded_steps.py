"""Five training steps in float64 on a mesh of 8 devices, for test_sharding.py: python sharded_steps.py OUT CASE...

A case is "MESH SHARD" or a word of CASES. Writes OUT/<case>.npz (losses, gradient norms, parameters) and OUT/<case>.hlo
(the compiled step).
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import gpt, optim
from nanochat_jax.config import Base, GPTConfig
from nanochat_jax.run import TrainState
from nanochat_jax.sharding import Layout, make_mesh, put_rows
from nanochat_jax.step import execution, make_step

MODEL = GPTConfig(n_layer=3, n_head=4, n_kv_head=2, n_embd=64, vocab_size=320, sequence_len=64)
CASES = {
    "one device": Base(),
    "one batch": Base(),
    "scan": Base(scan_layers=True),
    "remat": Base(remat="full"),
    "remat matmuls": Base(scan_layers=True, remat="matmuls"),
}


def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 320, (2, 16, 65)).astype(np.int32) for _ in range(5)]
    uncounted = rng.random((2, 16, 64)) < 0.3
    return [{"inputs": x[..., :-1], "targets": np.where(uncounted, -1, x[..., 1:])} for x in ids]


def run(case: str, out: Path) -> None:
    mesh, shard = ("", "optimizer") if case in CASES else case.split()
    layout = None if case in CASES else Layout(make_mesh(mesh), shard)
    how = execution(CASES.get(case, Base(shard=shard)))
    tx = optim.make_optimizer(
        MODEL.n_embd, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, momentum=optim.momentum_warmup,
        dtype=jnp.float64, layout=layout,
    )  # fmt: skip
    step = make_step(MODEL, tx, jnp.float64, layout=layout, execution=how)
    # Away from the zeros of the initialisation, so that every weight has a gradient.
    noise = lambda p: p.astype(jnp.float64) + 0.02 * jax.random.normal(jax.random.key(3), p.shape, jnp.float64)  # noqa: E731
    params = jax.tree.map(noise, gpt.init(MODEL, seed=1))
    opt_state = tx.init(params)
    if layout:
        params = jax.device_put(params, layout.shardings(layout.stored(params)))
        opt_state = jax.device_put(opt_state, layout.shardings(layout.cut(opt_state)))
    state, results = TrainState(params, opt_state), []
    for batch in batches():
        if case == "one batch":
            batch = {k: v.reshape(1, -1, v.shape[-1]) for k, v in batch.items()}
        batch = {k: put_rows(layout.mesh, v) if layout else jnp.asarray(v) for k, v in batch.items()}
        if not results:
            (out / f"{case}.hlo").write_text(step.lower(state, batch, 1.0).compile().as_text())
        state, metrics = step(state, batch, 1.0)
        results.append([metrics["loss"], metrics["grad_norm"]])
    leaves = {"/".join(k.key for k in path): p for path, p in jax.tree_util.tree_leaves_with_path(state.params)}
    np.savez(out / f"{case}.npz", results=np.array(results), **leaves)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        run(name, Path(sys.argv[1]))
