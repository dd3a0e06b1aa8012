"""Five training steps in float64 on a mesh of 8 devices, for test_sharding.py: python sharded_steps.py OUT CASE...

A case is "MESH SHARD" or a key of CASES. Writes OUT/<case>.npz (losses, gradient norms, parameters, optimizer state)
and OUT/<case>.hlo (the compiled step). The case "muon DEPTH WIDTH" only orthogonalises DEPTH layers, on all devices and
on one. With PROCESS=I/N@HOST:PORT in the environment this is process I of N, and process 0 writes "<case> in N.npz".
"""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from nanochat_jax.config import Base, GPTConfig
from nanochat_jax.model import gpt
from nanochat_jax.parallel import devices
from nanochat_jax.parallel.sharding import Layout, make_mesh, put_rows
from nanochat_jax.training import optim
from nanochat_jax.training.step import TrainState, execution, make_step

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


def own_rows(x: np.ndarray) -> np.ndarray:
    """A batch [accum, rows, t] -> this process's rows of it."""
    return np.split(x, jax.process_count(), axis=1)[jax.process_index()]


def whole(x) -> np.ndarray:
    """The whole array, all-gathered if there are several processes."""
    return np.asarray(multihost_utils.process_allgather(x, tiled=True) if jax.process_count() > 1 else x)


def muon(depth: int, d: int, out: Path) -> None:
    """Writes Muon's update and momentum for `depth` layers of width d, computed on all devices and on one."""
    shapes = {"wq": (d, 2 * d), "wk": (d, d), "wv": (d, d), "wo": (2 * d, d), "w_in": (d, 4 * d), "w_out": (4 * d, d)}
    rng = np.random.default_rng(0)
    grads = {"blocks": {name: rng.normal(size=(depth, *shape)) for name, shape in shapes.items()}}
    results = {}
    for case, where in (("all", Layout(make_mesh())), ("full", Layout(make_mesh(), "full")), ("one", None)):
        tx = optim.scale_by_muon(0.9, jnp.float64, where)
        updates, state = jax.jit(tx.update)(grads, tx.init(grads))
        results |= {f"{case}/{n}": u for n, u in updates["blocks"].items()}
        results |= {f"{case}/{n} momentum": m for n, m in state.momentum["blocks"].items()}
    np.savez(out / f"muon {depth} {d}.npz", **results)


def run(case: str, out: Path) -> None:
    mesh, shard = ("", "optimizer") if case in CASES else case.split()
    layout = None if case in CASES else Layout(make_mesh(mesh), shard)
    how = execution(CASES.get(case, Base(shard=shard)))
    tx = optim.make_optimizer(
        MODEL.n_embd, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, momentum=optim.momentum_warmup,
        dtype=jnp.float64, layout=layout,
    )  # fmt: skip
    step = make_step(MODEL, tx, jnp.float64, layout=layout, execution=how)
    # Unlike the initialisation, no weight is zero, so every weight has a gradient.
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.05, p.shape)), jax.eval_shape(lambda: gpt.init(MODEL)))
    opt_state = jax.jit(tx.init)(params)
    if layout:
        params = jax.device_put(params, layout.shardings(layout.param_specs(params)))
        opt_state = jax.device_put(opt_state, layout.shardings(layout.shard_specs(opt_state)))
    state, results = TrainState(params, opt_state), []
    for batch in batches():
        if case == "one batch":
            batch = {k: v.reshape(1, -1, v.shape[-1]) for k, v in batch.items()}
        batch = {k: put_rows(layout.mesh, own_rows(v)) if layout else jnp.asarray(v) for k, v in batch.items()}
        if not results and jax.process_count() == 1:
            (out / f"{case}.hlo").write_text(step.lower(state, batch, 1.0).compile().as_text())
        state, metrics = step(state, batch, 1.0)
        results.append([float(metrics.loss), float(metrics.grad_norm)])
    # Muon's and Adam's momenta are sums of the gradients of all steps.
    leaves = {jax.tree_util.keystr(path): whole(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    if jax.process_index() == 0:
        name = case if jax.process_count() == 1 else f"{case} in {jax.process_count()}"
        np.savez(out / f"{name}.npz", results=np.array(results), **leaves)


if __name__ == "__main__":
    if process := os.environ.get("PROCESS"):
        which, _, where = process.partition("@")
        devices.start("cpu", where, int(which.split("/")[1]), int(which.split("/")[0]))
    for name in sys.argv[2:]:
        if name.startswith("muon "):
            muon(*map(int, name.split()[1:]), Path(sys.argv[1]))
        else:
            run(name, Path(sys.argv[1]))
