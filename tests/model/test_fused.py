"""The kernels of the fused block equal their reference implementations, and the block equals the plain block."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from nanochat_jax.config import REPOSITORY, GPTConfig
from nanochat_jax.model import gpt
from nanochat_jax.model.fused import matmul, rows, trial
from nanochat_jax.model.fused.block import apply_blocks

DTYPES = [jnp.float32, jnp.bfloat16]
EPS = 1e-6
MODEL = GPTConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=128, vocab_size=100, sequence_len=64, window_pattern="SL")


def numbers(*shape: int, dtype=jnp.float32, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def assert_equal(kernel, reference, dtype) -> None:
    """Equal, or one rounding apart."""
    a, b = (jax.tree.map(lambda x: np.asarray(x, np.float32), jax.tree.leaves(x)) for x in (kernel, reference))
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 8, 64), (1, 7, 160), (3, 5, 96)])
def test_norms(shape, dtype):
    x, y, ds = (numbers(*shape, dtype=dtype, seed=i) for i in range(3))
    out = rows.add_norm(x, y, eps=EPS, interpret=True)
    assert_equal(out, rows.reference_add_norm(x, y, eps=EPS), dtype)
    for count in (1, 3):
        arguments = (ds, out[1], out[2], *[numbers(*shape, dtype=dtype, seed=9 + i) for i in range(count)])
        kernel = rows.add_norm_backward(*arguments, interpret=True)
        assert_equal(kernel, rows.reference_add_norm_backward(*arguments), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 8, 3, 16), (1, 7, 1, 64), (2, 96, 2, 8)])
def test_rotations(shape, dtype):
    x, g = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype, seed=1)
    angle = numbers(shape[1], shape[3] // 2, seed=2)
    table = jnp.cos(angle), jnp.sin(angle)
    out = rows.rotate_norm(x, *table, eps=EPS, interpret=True)
    assert_equal(out, rows.reference_rotate_norm(x, *table, eps=EPS), dtype)
    kernel = rows.rotate_norm_backward(g, *out, *table, interpret=True)
    assert_equal(kernel, rows.reference_rotate_norm_backward(g, *out, *table), dtype)


@pytest.mark.parametrize(("dtype", "shape"), [(jnp.float32, (2, 64, 64, 256)), (jnp.bfloat16, (3, 128, 128, 512))])
def test_matmuls(dtype, shape):
    b, t, i, o = shape
    x, w_in, w_out = numbers(b, t, i, dtype=dtype), numbers(i, o, dtype=dtype) / i, numbers(o, i, dtype=dtype) / i
    a = matmul.relu2(x, w_in, interpret=True)
    assert_equal(a, matmul.reference_relu2(x, w_in), dtype)
    kernel = matmul.relu2_backward(x, a, w_out, interpret=True)
    assert_equal(kernel, matmul.reference_relu2_backward(x, a, w_out), dtype)


def test_the_references_have_the_gradients_of_autodiff():
    x, y = numbers(2, 6, 32), numbers(2, 6, 32, seed=1)
    forward = functools.partial(rows.reference_add_norm, eps=EPS)
    (_, n, r), vjp = jax.vjp(forward, x, y)
    ds, g = numbers(2, 6, 32, seed=2), numbers(2, 6, 32, seed=3)
    assert_equal(rows.reference_add_norm_backward(ds, n, r, g), vjp((ds, g, jnp.zeros_like(r)))[0], jnp.float32)
    x, angle = numbers(2, 6, 3, 16), numbers(6, 8)
    (n, r), vjp = jax.vjp(lambda x: rows.reference_rotate_norm(x, jnp.cos(angle), jnp.sin(angle), eps=EPS), x)
    g = numbers(2, 6, 3, 16, seed=2)
    reference = rows.reference_rotate_norm_backward(g, n, r, jnp.cos(angle), jnp.sin(angle))
    assert_equal(reference, vjp((g, jnp.zeros_like(r)))[0], jnp.float32)


def test_a_rotation_is_that_of_the_plain_model():
    x, (cos, sin) = numbers(1, 6, 3, 16), gpt.rotary(jnp.arange(6)[None], dataclasses.replace(MODEL, n_embd=32))
    plain = gpt.norm(gpt.rotate(x, cos, sin), EPS)
    assert_equal(rows.reference_rotate_norm(x, cos[0, :, 0], sin[0, :, 0], eps=EPS)[0], plain, jnp.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_and_its_gradients_are_those_of_the_plain_blocks(dtype):
    params = jax.tree.map(lambda p: numbers(*p.shape) * 0.1, gpt.init(MODEL))
    ids = jax.random.randint(jax.random.key(1), (2, 64), 0, 100)

    def loss(params, execution):
        return jnp.square(gpt.hidden(params, MODEL, ids, dtype, execution).astype(jnp.float32) - 0.3).sum()

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain = gradient(params, gpt.PLAIN)
    fused = gradient(params, gpt.Execution(fused=functools.partial(apply_blocks, trial.alone)))
    np.testing.assert_allclose(fused[0], plain[0], rtol=1e-2 if dtype == jnp.bfloat16 else 1e-6)
    for path, x in jax.tree_util.tree_leaves_with_path({"wte": plain[1]["wte"], "blocks": plain[1]["blocks"]}):
        y = functools.reduce(lambda tree, key: tree[key.key], path, fused[1])
        error = jnp.linalg.norm(x - y) / jnp.linalg.norm(x)
        assert error < (0.02 if dtype == jnp.bfloat16 else 1e-5), (path, error)


def test_a_step_of_the_fused_block_equals_that_of_the_plain_block_on_eight_devices(tmp_path):
    """Each device computes its own rows, in one node and in two."""
    command = [sys.executable, "tests/support/fused_on_devices.py", "node=1,data=8,model=1", "node=2,data=4,model=1"]
    environment = tiny.environment(tmp_path, devices=8) | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout)) < 2e-3
