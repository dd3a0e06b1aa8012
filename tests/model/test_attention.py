"""Which attention kernel is chosen and why, and how cuDNN is called. test_gpt.py and test_gpu.py check the numbers."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.model import attention
from nanochat_jax.parallel import devices, processes

MODEL = GPTConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=128, sequence_len=64)


def heads_of(size: int) -> GPTConfig:
    return GPTConfig(n_layer=1, n_head=2, n_kv_head=2, n_embd=2 * size, sequence_len=64)


@pytest.fixture(autouse=True)
def chosen_before(monkeypatch):
    monkeypatch.setattr(attention, "_chosen", "xla")


@pytest.fixture
def cudnn_calls(monkeypatch):
    """The keyword arguments of every call of a fake cuDNN, which returns the queries."""
    calls = []

    def cudnn(q, k, v, **arguments):
        calls.append(arguments)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    return calls


def test_without_a_gpu_it_is_xla():
    assert attention.choose_kernel("", jnp.bfloat16, MODEL) == ("xla", "no NVIDIA GPU")
    assert attention.choose_kernel("xla", jnp.bfloat16, MODEL) == ("xla", "as asked")


def test_on_a_gpu_it_is_cudnn_if_that_runs_when_tried(monkeypatch, cudnn_calls):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention.choose_kernel("", jnp.float32, MODEL) == ("xla", "cuDNN has no float32 kernel")
    assert attention.choose_kernel("xla", jnp.bfloat16, MODEL) == ("xla", "as asked") and not cudnn_calls
    assert attention.choose_kernel("", jnp.bfloat16, MODEL) == ("cudnn", "it passed a trial run") and cudnn_calls
    assert attention.choose_kernel("cudnn", jnp.bfloat16, MODEL) == ("cudnn", "it passed a trial run")


def test_where_cudnn_fails_xla_does_the_work_and_the_reason_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # there is no real GPU, so trying cuDNN fails
    kernel, reason = attention.choose_kernel("", jnp.bfloat16, MODEL)
    assert kernel == "xla" and reason.startswith("cuDNN failed: ") and "\n" not in reason
    devices.choose_precision("bfloat16", model_cfg=MODEL)
    assert f"matmuls in bfloat16 (as asked), attention by xla ({reason})" in capsys.readouterr().out


def test_hopper_does_not_go_on_without_cudnn_unless_told(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability, refused in (("8.0", False), ("9.0", True), ("10.0", True)):
        device = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        if not refused:
            assert attention.choose_kernel("", jnp.bfloat16, MODEL)[0] == "xla"
            continue
        with pytest.raises(UserError, match=r"cuDNN's attention failed its trial run \(.*\): .* \(--attention=xla\)"):
            attention.choose_kernel("", jnp.bfloat16, MODEL)
        assert attention.choose_kernel("xla", jnp.bfloat16, MODEL) == ("xla", "as asked")
        # Evaluations have no flag for the kernel, and they are short.
        monkeypatch.setattr(devices, "describe", lambda: "1 x H100")
        devices.choose_precision("bfloat16", model_cfg=MODEL, may_be_slow=True)
        assert attention._chosen == "xla"


def test_the_limit_of_cudnn_counts_the_rows_of_one_device(monkeypatch):
    """d32 has 2^22 numbers a row in its queries, so 512 rows reach 2^31. On sixteen GPUs, that is 32 rows each."""
    d32 = GPTConfig(n_layer=32, n_head=16, n_kv_head=16, n_embd=2048, sequence_len=2048)
    monkeypatch.setattr(attention, "_chosen", "cudnn")
    assert attention.most_rows(d32) == 511
    attention.check_rows(511, d32)
    with pytest.raises(UserError, match=r"512 rows of 2048 tokens are too many .* at most 511$"):
        attention.check_rows(512, d32)
    q = jax.ShapeDtypeStruct((16 * 32, 2048, 16, 128), jnp.bfloat16)  # the rows of all devices together
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *_, **__: q)
    assert jax.eval_shape(attention.causal_attention, q, q, q).shape == q.shape
    monkeypatch.setattr(attention, "_chosen", "xla")
    assert attention.most_rows(d32) is None


def test_cudnn_is_tried_with_the_heads_of_the_model(monkeypatch):
    def cudnn(q, k, v, **_):
        if q.shape[-1] % 8:
            raise NotImplementedError(f"The head dim must be a multiple of 8, but got {q.shape[-1]}.")
        return q

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    assert attention.choose_kernel("", jnp.bfloat16, heads_of(40))[0] == "cudnn"
    assert attention.choose_kernel("", jnp.bfloat16, heads_of(36)) == (
        "xla", "cuDNN failed: The head dim must be a multiple of 8, but got 36."
    )  # fmt: skip
    with pytest.raises(UserError, match="--attention=cudnn does not work here: The head dim must be a multiple of 8"):
        attention.choose_kernel("cudnn", jnp.bfloat16, heads_of(36))


def test_cudnn_is_tried_with_grouped_heads_and_every_window_forward_and_backward(monkeypatch):
    tried = []

    def cudnn(q, k, v, *, local_window_size, **_):
        tried.append((q.shape[2], k.shape[2], local_window_size))
        return q * k.mean() * v.mean()

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    model = GPTConfig(n_layer=3, n_head=4, n_kv_head=2, n_embd=256, sequence_len=1024, window_pattern="SL")
    assert attention.choose_kernel("", jnp.bfloat16, model)[0] == "cudnn"
    assert set(tried) == {(4, 2, None), (4, 2, (256, 0))}


def test_all_processes_take_the_kernel_that_runs_in_all(monkeypatch, cudnn_calls, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(processes, "all_min", lambda works_here: 0)
    devices.choose_precision("bfloat16", model_cfg=MODEL)
    assert attention._chosen == "xla"
    assert "attention by xla (cuDNN failed in another process)" in capsys.readouterr().out


def test_a_kernel_that_cannot_be_had_is_refused():
    with pytest.raises(UserError, match="--attention=cudnn needs --compute_dtype=bfloat16, not float32"):
        attention.choose_kernel("cudnn", jnp.float32, MODEL)
    with pytest.raises(UserError, match="--attention=cudnn does not work here: ") as error:
        attention.choose_kernel("cudnn", jnp.bfloat16, MODEL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("window", "local"), [(0, None), (100, (100, 0))])
def test_cudnn_is_given_flags_and_windows_and_never_a_mask(monkeypatch, cudnn_calls, window, local):
    monkeypatch.setattr(attention, "_chosen", "cudnn")
    q = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
    attention.causal_attention(q, q, q, window)
    assert cudnn_calls == [{"is_causal": True, "local_window_size": local, "implementation": "cudnn"}]
