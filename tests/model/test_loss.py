"""The chunked loss equals the plain formula, and needs less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.model.loss import cross_entropy, num_chunks, token_losses

B, T, D, V, CAP = 2, 12, 8, 20, 15.0
keys = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(keys[0], (B, T, D)) * 3
HEAD = jax.random.normal(keys[1], (V, D)) * 3
TARGETS = jax.random.randint(keys[2], (B, T), -1, V)
WEIGHTS = jax.random.normal(keys[3], (B, T))


def plain(x, head, targets=TARGETS, weights=WEIGHTS):
    logits = CAP * jnp.tanh(jnp.einsum("btd,vd->btv", x, head) / CAP)
    right = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return -(weights * right * (targets >= 0)).sum()


@pytest.mark.parametrize("chunks", [1, 3, 12])
def test_value_and_gradients_equal_the_plain_formula(chunks):
    ours = jax.value_and_grad(lambda x, h: cross_entropy(x, h, TARGETS, WEIGHTS, CAP, chunks), (0, 1))(X, HEAD)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(jax.value_and_grad(plain, (0, 1))(X, HEAD)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_bfloat16_has_its_gradients_for_any_number_of_chunks(batch, chunks):
    """On some CPUs, XLA has no bf16 dot for some axis orders."""
    x, head = jnp.ones((batch, 64, 32), jnp.bfloat16), jnp.ones((320, 32))
    ids, weights = jnp.zeros((batch, 64), jnp.int32), jnp.ones((batch, 64))
    both = jax.jit(jax.grad(lambda x, h: cross_entropy(x, h, ids, weights, CAP, chunks), (0, 1)))(x, head)
    assert [g.dtype for g in both] == [jnp.bfloat16, jnp.float32]


def test_the_form_without_gradient_gives_the_loss_of_each_token():
    losses = token_losses(X, HEAD, TARGETS, CAP, 4)
    np.testing.assert_allclose((losses * WEIGHTS).sum(), plain(X, HEAD), rtol=1e-5)
    assert (losses[TARGETS < 0] == 0).all()


def test_no_counted_target_gives_zero_and_no_nan():
    ignored = jnp.full((B, T), -1)
    value, gradients = jax.value_and_grad(lambda x: cross_entropy(x, HEAD, ignored, WEIGHTS, CAP, 3))(X)
    assert value == 0 and (gradients == 0).all()


def test_the_cotangent_scales_the_gradients():
    one = jax.grad(lambda x: cross_entropy(x, HEAD, TARGETS, WEIGHTS, CAP, 3))(X)
    half = jax.grad(lambda x: 0.5 * cross_entropy(x, HEAD, TARGETS, WEIGHTS, CAP, 3))(X)
    np.testing.assert_allclose(half, 0.5 * one, rtol=1e-6)


def test_chunks_need_less_memory():
    def temporaries(chunks):
        x, head = jax.ShapeDtypeStruct((4, 256, 64), jnp.float32), jax.ShapeDtypeStruct((4096, 64), jnp.float32)
        targets, weights = jax.ShapeDtypeStruct((4, 256), jnp.int32), jax.ShapeDtypeStruct((4, 256), jnp.float32)
        gradient = jax.jit(jax.grad(lambda x, h, t, w: cross_entropy(x, h, t, w, CAP, chunks), (0, 1)))
        return gradient.lower(x, head, targets, weights).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16) < temporaries(1) / 4


def test_number_of_chunks_divides_the_time_axis():
    assert num_chunks(1, 512) == 1
    assert num_chunks(32, 2048) == 8
    assert num_chunks(16384, 8) == 8
    assert 15 % num_chunks(4000, 15) == 0
