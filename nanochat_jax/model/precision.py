"""Chooses the dtype of matmul operands, and the dtype in which their products are summed."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def accum_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype in which products of numbers in `dtype` are summed: float64 for float64, otherwise float32."""
    return jnp.promote_types(dtype, jnp.float32)


def choose_dtype(requested: str) -> tuple[DTypeLike, str]:
    """Returns the dtype of matmul operands, and the reason for choosing it.

    `requested` is the value of --compute_dtype. If it is empty, the dtype depends on the device. For example, on an
    H100, the result is (jnp.bfloat16, "the GPU has bf16 units").
    """
    known = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
    if requested:
        return known[requested], "as asked"
    device = jax.devices()[0]
    if device.platform == "gpu":
        if float(getattr(device, "compute_capability", "0")) >= 8:
            return jnp.bfloat16, "the GPU has bf16 units"
        return jnp.float32, "this GPU has no bf16 units"
    if device.platform == "tpu":
        return jnp.bfloat16, "TPUs multiply in bf16"
    # On a CPU without AMX, bf16 matmuls are slower than float32 matmuls. Even with AVX512-BF16, they reach only 0.6
    # times the float32 speed.
    if _cpu_has_amx():
        return jnp.bfloat16, "the CPU has AMX"
    return jnp.float32, "a CPU without AMX multiplies float32 faster"


def _cpu_has_amx() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            return "amx_bf16" in info.read()
    except OSError:  # the file exists only on Linux
        return False
