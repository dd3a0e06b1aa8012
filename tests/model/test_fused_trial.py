"""The fused block is used only where a trial shows that it is right and faster."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from nanochat_jax.config import Base, GPTConfig
from nanochat_jax.model.fused import block, rows, trial
from nanochat_jax.parallel.sharding import Layout, make_mesh
from nanochat_jax.training.run import choose_blocks
from nanochat_jax.training.step import execution

MODEL = GPTConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=128, vocab_size=100, sequence_len=128)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU for which the kernels were written. Here, on a CPU, their reference implementations run."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability="9.0")])
    monkeypatch.setattr(trial, "ROWS", 1)


def test_a_cpu_needs_no_trial():
    assert trial.choose(MODEL, jnp.bfloat16) == (False, "no NVIDIA GPU")


def test_an_unknown_gpu_a_dtype_and_a_shape_are_refused(hopper, monkeypatch):
    assert trial.choose(MODEL, jnp.float32) == (False, "the kernels are for bfloat16")
    assert not trial.choose(GPTConfig(2, 2, 2, 96, 100, 128), jnp.bfloat16)[0]
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability="12.0")])
    assert trial.choose(MODEL, jnp.bfloat16) == (False, "the kernels are for compute capability 9.0, not 12.0")


@pytest.mark.parametrize("width", [128, 256, 512])
def test_the_trial_finds_right_kernels_right(hopper, width):
    """Rounding stays far below the limit, whatever the width of the model."""
    error, _ = trial._compare(GPTConfig(2, 2, 2, width, 100, 128), jnp.bfloat16)
    assert 0 < error < trial.LARGEST_ERROR / 2


def test_the_faster_is_chosen_if_it_is_right(hopper, monkeypatch):
    error = trial.LARGEST_ERROR
    for speed, chosen in ((1.25, True), (1.01, False), (0.9, False)):
        monkeypatch.setattr(trial, "_compare", lambda *_, speed=speed: (error, speed))
        assert trial.choose(MODEL, jnp.bfloat16) == (chosen, f"{speed:.2f} times as fast in a trial")
    assert trial.choose(MODEL, jnp.bfloat16, must_be_faster=False)[0]


def test_a_run_that_resumes_keeps_its_blocks(hopper, monkeypatch, capsys):
    layout = Layout(make_mesh())
    monkeypatch.setattr(trial, "_compare", lambda *_: (0.0, 0.9))
    assert choose_blocks(Base(), MODEL, layout, jnp.bfloat16, before=True)
    assert not choose_blocks(Base(), MODEL, layout, jnp.bfloat16)
    monkeypatch.setattr(trial, "_compare", lambda *_: (0.0, 1.5))
    assert not choose_blocks(Base(), MODEL, layout, jnp.bfloat16, before=False)
    assert "blocks by XLA (as in the run so far)" in capsys.readouterr().out


def test_a_kernel_that_is_wrong_or_fails_is_not_used(hopper, monkeypatch):
    monkeypatch.setattr(block, "add_norm_backward", lambda *arrays: rows.reference_add_norm_backward(*arrays) * 1.1)
    assert "wrong by" in trial.choose(MODEL, jnp.bfloat16)[1]

    def fail(*_):
        raise RuntimeError("ptxas: too many registers\nmore")

    monkeypatch.setattr(block, "add_norm_backward", fail)
    jax.clear_caches()
    assert trial.choose(MODEL, jnp.bfloat16) == (False, "the kernels failed: ptxas: too many registers")


def test_settings_that_recompute_or_scan_keep_the_plain_block():
    layout = Layout(make_mesh())
    assert execution(Base(), layout).fused
    for cfg in (Base(remat="matmuls"), Base(scan_layers=True), Base(shard="full")):
        assert execution(cfg, layout).fused is None
    assert execution(Base()).fused is None
