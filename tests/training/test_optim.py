"""Muon and AdamW equal literal transcriptions in NumPy; groups and schedules follow the specification."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax.training import optim

rng = np.random.default_rng(0)


def muon_in_numpy(gradients, momentum, lr=0.02):
    """The specification's steps for one torch weight [out, in]: a list of successive gradients -> their updates."""
    buffer, updates = np.zeros_like(gradients[0]), []
    for g, mu in zip(gradients, momentum, strict=True):
        buffer = mu * buffer + (1 - mu) * g
        x = (1 - mu) * g + mu * buffer
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.T if tall else x
        updates.append(-lr * max(1, x.shape[0] / x.shape[1]) ** 0.5 * x)
    return updates


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (24, 24)])  # [in, out]
def test_muon_equals_the_transcription(shape, dtype):
    gradients = [rng.normal(size=(3, *shape)).astype(dtype) for _ in range(4)]
    momentum = [float(optim.momentum_warmup(t)) for t in range(4)]
    expected = [muon_in_numpy([g[layer].T for g in gradients], momentum) for layer in range(3)]
    with jax.enable_x64(dtype == "float64"):
        muon = optax.chain(optim.scale_by_muon(optim.momentum_warmup, jnp.dtype(dtype)), optax.scale(-0.02))
        params = {"w": jnp.zeros((3, *shape), dtype)}
        state = muon.init(params)
        for t, g in enumerate(gradients):
            updates, state = muon.update({"w": jnp.asarray(g)}, state, params)
            for layer in range(3):
                largest = {"float32": 2e-5, "float64": 1e-12}[dtype]
                np.testing.assert_allclose(updates["w"][layer], expected[layer][t].T, rtol=0, atol=largest)


def test_merging_equal_shapes_changes_nothing():
    tree = {n: jnp.asarray(rng.normal(size=(2, *s)), jnp.float32) for n, s in
            {"wq": (8, 8), "wk": (8, 4), "w_in": (8, 32), "w_out": (32, 8), "wo": (8, 8)}.items()}  # fmt: skip
    merged, _ = optim.scale_by_muon(0.9).update(tree, optim.scale_by_muon(0.9).init(tree))
    for name, leaf in tree.items():
        alone, _ = optim.scale_by_muon(0.9).update({name: leaf}, optim.scale_by_muon(0.9).init({name: leaf}))
        np.testing.assert_allclose(merged[name], alone[name], atol=1e-5)


def test_singular_values_lie_in_the_known_band():
    x = optim.orthogonalize(jnp.asarray(rng.normal(size=(4, 64, 128)), jnp.float32))
    values = np.linalg.svd(x, compute_uv=False)
    assert values.min() > 0.5 and values.max() < 1.3


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-6])
def test_iterating_on_the_gram_matrix_equals_the_plain_iteration(smallest):
    """Also for matrices whose singular values differ by up to a million."""
    left, right = (np.linalg.qr(rng.normal(size=(n, 32)))[0] for n in (32, 128))
    x = (left * np.geomspace(1, smallest, 32) @ right.T).astype(np.float32)[None]
    x /= np.linalg.norm(x)
    plain, fast = np.asarray(optim._iterate(jnp.asarray(x))), np.asarray(optim._iterate_on_gram(jnp.asarray(x)))
    assert np.linalg.norm(plain - fast) < 1e-3 * np.linalg.norm(plain)


def test_groups_have_their_own_rates_and_the_width_factor():
    params = {"wte": jnp.ones((8, 4)), "lm_head": jnp.ones((8, 4)), "blocks": {"wq": jnp.ones((1, 4, 4))}}
    tx = optim.make_optimizer(192, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    factor = (192 / 768) ** -0.5
    np.testing.assert_allclose(updates["wte"], -0.2 * factor, rtol=1e-4)  # Adam's first step is the sign
    np.testing.assert_allclose(updates["lm_head"], -0.004 * factor, rtol=1e-4)
    muon, _ = optim.scale_by_muon().update(grads["blocks"], optim.scale_by_muon().init(params["blocks"]))
    np.testing.assert_allclose(updates["blocks"]["wq"], -0.02 * muon["wq"], rtol=1e-4)  # independent of the width


def adamw_in_numpy(p, gradients, lr, weight_decay, b1=0.8, b2=0.95, eps=1e-10):
    """The specification's steps: a parameter and a list of successive gradients -> the parameter after them."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p - lr * weight_decay * p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_the_transcription(weight_decay):
    start = rng.normal(size=(8, 4)).astype(np.float32)
    gradients = [rng.normal(size=(8, 4)).astype(np.float32) for _ in range(4)]
    rates = {"embedding_lr": 0.2, "unembedding_lr": 0.004, "matrix_lr": 0.02}
    tx = optim.make_optimizer(4 * 768, **rates, weight_decay=weight_decay)
    params = {"wte": jnp.asarray(start), "lm_head": jnp.asarray(start)}
    state = tx.init(params)
    for g in gradients:
        updates, state = tx.update({name: jnp.asarray(g) for name in params}, state, params)
        params = optax.apply_updates(params, updates)
    for name, lr in (("wte", 0.1), ("lm_head", 0.002)):  # halved by the width
        np.testing.assert_allclose(params[name], adamw_in_numpy(start, gradients, lr, weight_decay), atol=1e-5)


def test_muon_composes_with_other_transformations():
    """With clipping, weight decay, a schedule, a mask, and updates every second step, under jit."""
    params = {"w": jnp.ones((2, 4, 8)), "bias": jnp.ones(8)}
    chain = optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optim.scale_by_muon(0.9), {"w": True, "bias": False}),
        optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(optax.linear_schedule(0.5, 0.0, 10)),
    )  # fmt: skip
    tx = optax.MultiSteps(chain, every_k_schedule=2)
    g = {"w": jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32), "bias": jnp.zeros(8)}
    state, update = tx.init(params), jax.jit(tx.update)
    nothing, state = update(g, state, params)
    assert not any(x.any() for x in jax.tree.leaves(nothing))
    updates, state = update(g, state, params)
    size = np.linalg.norm(np.asarray(g["w"]).ravel())
    muon, _ = optim.scale_by_muon(0.9).update({"w": g["w"] / size}, optim.scale_by_muon(0.9).init({"w": g["w"]}))
    np.testing.assert_allclose(updates["w"], -0.5 * (muon["w"] + 0.1), atol=1e-4)
    np.testing.assert_allclose(updates["bias"], -0.5 * 0.1, atol=1e-6)


def test_momentum_warms_up_over_300_steps():
    values = [float(optim.momentum_warmup(t)) for t in (0, 150, 300, 9000)]
    np.testing.assert_allclose(values, [0.85, 0.90, 0.95, 0.95], rtol=1e-6)


def test_schedules_at_their_corners():
    def trapezoid(t):
        return optim.trapezoid(t, 100, 0.1, 0.2, 0.1)

    assert [trapezoid(t) for t in (0, 9, 10, 80)] == [0.1, 1.0, 1.0, 1.0]
    assert trapezoid(90) == pytest.approx(0.55) and trapezoid(100) == pytest.approx(0.1)
    assert [optim.late_decay(p) for p in (0, 0.79, 1.0, 1.5)] == [1, 1, 0, 0]  # never negative, not even past the end
    assert optim.late_decay(0.9) == pytest.approx(0.5)
    assert [optim.linear_decay(p) for p in (0, 0.25, 1, 2)] == [1, 0.75, 0, 0]
