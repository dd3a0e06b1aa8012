"""Which attention kernel is taken and why, and what cuDNN is asked for. The numbers are in test_gpt.py, test_gpu.py."""

import jax
import jax.numpy as jnp
import pytest

from nanochat_jax import attention, devices
from nanochat_jax.config import UserError


@pytest.fixture(autouse=True)
def chosen_before(monkeypatch):
    monkeypatch.setattr(attention, "_chosen", "xla")


@pytest.fixture
def asked(monkeypatch):
    """Arguments of every call of cuDNN, which gives back the queries."""
    calls = []

    def cudnn(q, k, v, **how):
        calls.append(how)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    return calls


def test_without_a_gpu_it_is_xla():
    assert attention.choose("", jnp.bfloat16) == ("xla", "no NVIDIA GPU")
    assert attention.choose("xla", jnp.bfloat16) == ("xla", "as asked")


def test_on_a_gpu_it_is_cudnn_if_that_runs_when_tried(monkeypatch, asked):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention.choose("", jnp.float32) == ("xla", "cuDNN has no float32 kernel")
    assert attention.choose("xla", jnp.bfloat16) == ("xla", "as asked") and not asked
    assert attention.choose("", jnp.bfloat16) == ("cudnn", "tried, it runs") and asked
    assert attention.choose("cudnn", jnp.bfloat16) == ("cudnn", "tried, it runs")


def test_where_cudnn_fails_xla_does_the_work_and_the_reason_is_told(monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # that is all: cuDNN is tried, and fails
    kernel, reason = attention.choose("", jnp.bfloat16)
    assert kernel == "xla" and reason.startswith("cuDNN failed: ") and "\n" not in reason
    devices.precision("bfloat16", head_dim=64)
    assert f"matmuls in bfloat16 (as asked), attention by xla ({reason})" in capsys.readouterr().out


def test_cudnn_is_tried_with_the_heads_of_the_model(monkeypatch):
    def cudnn(q, k, v, **how):
        if q.shape[-1] % 8:
            raise NotImplementedError(f"The head dim must be a multiple of 8, but got {q.shape[-1]}.")
        return q

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    assert attention.choose("", jnp.bfloat16, 40)[0] == "cudnn"
    assert attention.choose("", jnp.bfloat16, 36) == (
        "xla", "cuDNN failed: The head dim must be a multiple of 8, but got 36."
    )  # fmt: skip
    with pytest.raises(UserError, match="--attention=cudnn does not run here: The head dim must be a multiple of 8"):
        attention.choose("cudnn", jnp.bfloat16, 36)


def test_a_kernel_that_cannot_be_had_is_refused():
    with pytest.raises(UserError, match="--attention=flash: must be one of cudnn, xla"):
        attention.choose("flash", jnp.bfloat16)
    with pytest.raises(UserError, match="--attention=cudnn needs --compute_dtype=bfloat16, not float32"):
        attention.choose("cudnn", jnp.float32)
    with pytest.raises(UserError, match="--attention=cudnn does not run here: ") as error:
        attention.choose("cudnn", jnp.bfloat16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("window", "local"), [(0, None), (100, (100, 0))])
def test_cudnn_is_given_flags_and_windows_and_never_a_mask(monkeypatch, asked, window, local):
    monkeypatch.setattr(attention, "_chosen", "cudnn")
    q = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
    attention.causal_attention(q, q, q, window)
    assert asked == [{"is_causal": True, "local_window_size": local, "implementation": "cudnn"}]
