"""Which precision is chosen for a device, and what its peak FLOP/s are."""

import builtins
import io
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from nanochat_jax.model.precision import choose_dtype
from nanochat_jax.parallel import devices


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "why"),
    [("gpu", "9.0", jnp.bfloat16, "the GPU has bf16 units"), ("gpu", "12.0", jnp.bfloat16, "the GPU has bf16 units"),
     ("gpu", "7.5", jnp.float32, "this GPU has no bf16 units"), ("tpu", "", jnp.bfloat16, "TPUs multiply in bf16")],
)  # fmt: skip
def test_precision_is_what_the_device_is_good_at(monkeypatch, platform, capability, dtype, why):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert choose_dtype("") == (dtype, why)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "highest"), ("bfloat16", None)])
def test_float32_is_float32_on_a_gpu_too(monkeypatch, dtype, precision):
    """JAX's default on GPUs is TF32, with a mantissa of ten bits."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    try:
        devices.choose_precision(dtype)
        assert jax.config.jax_default_matmul_precision == precision
    finally:
        jax.config.update("jax_default_matmul_precision", None)


@pytest.mark.parametrize(("flags", "dtype"), [("avx2 amx_bf16 amx_tile", jnp.bfloat16), ("avx512_bf16", jnp.float32)])
def test_a_cpu_multiplies_in_bfloat16_where_it_has_amx(monkeypatch, flags, dtype):
    opened = builtins.open

    def read(path, *args, **kwargs):
        return io.StringIO(f"flags : {flags}\n") if path == "/proc/cpuinfo" else opened(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", read)
    chosen, why = choose_dtype("")
    assert chosen == dtype and "AMX" in why


def test_the_flag_overrides_and_the_choice_is_printed_with_its_reason(capsys):
    assert devices.choose_precision("bfloat16") == jnp.bfloat16 and devices.choose_precision("float32") == jnp.float32
    out = capsys.readouterr().out
    assert "matmuls in bfloat16 (as asked)" in out and "matmuls in float32 (as asked)" in out


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA L4", 121e12), ("NVIDIA L40", None), ("NVIDIA L40S", 362e12), ("NVIDIA H100 80GB HBM3", 989e12),
     ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GH200 480GB", 989e12), ("cpu", None)],
)  # fmt: skip
def test_a_peak_is_that_of_the_very_device(kind, peak, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert devices.peak_flops() == peak


@pytest.mark.parametrize(
    ("given", "flags", "fraction"),
    [({}, "--xla_gpu_memory_limit_slop_factor=112", "0.92"),
     ({"XLA_FLAGS": "--xla_dump_to=x"}, "--xla_dump_to=x --xla_gpu_memory_limit_slop_factor=112", "0.92"),
     ({"XLA_FLAGS": "--xla_gpu_memory_limit_slop_factor=90"}, "--xla_gpu_memory_limit_slop_factor=90", "0.92"),
     ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, "--xla_gpu_memory_limit_slop_factor=112", None)],
)  # fmt: skip
def test_memory_settings_of_gpus_leave_the_users_alone(monkeypatch, given, flags, fraction):
    """JAX refuses to start if both names of the memory fraction are set."""
    for name in ("XLA_FLAGS", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(devices.os, "environ", dict(devices.os.environ))
    devices.set_gpu_defaults()
    assert devices.os.environ["XLA_FLAGS"] == flags
    assert devices.os.environ.get("XLA_CLIENT_MEM_FRACTION") == fraction
