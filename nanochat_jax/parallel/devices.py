"""The devices of this machine: choosing them, the precision they are good at, their peaks and their memory's end."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nanochat_jax.config import GPTConfig, UserError, base_dir
from nanochat_jax.parallel import processes

if TYPE_CHECKING:
    import jax.numpy as jnp

# Dense bf16 peaks of one device, FLOP/s, from the vendors' data sheets. Unknown devices have no MFU.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "GB200": 2500e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip

# Memory, bytes/s of one device, from the same sheets.
PEAK_BANDWIDTH = {
    "H100 PCIe": 2.0e12, "H100 NVL": 3.9e12, "H100": 3.35e12, "H200": 4.8e12, "GH200": 4.0e12, "B200": 8e12,
    "GB200": 8e12, "A100-SXM4-80GB": 2.039e12, "A100 80GB": 1.935e12, "A100": 1.555e12, "L40S": 864e9, "L4": 300e9,
    "RTX 4090": 1.008e12, "RTX 3090": 936e9,
}  # fmt: skip


def start(device_type: str = "", coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Chooses the platform, switches the compile cache on, and joins the other processes of a run (`processes.join`).

    All but process 0 fall silent. Call it before anything else touches JAX.
    """
    platforms = {"": None, "cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}
    import jax

    if platforms[device_type]:
        jax.config.update("jax_platforms", platforms[device_type])
    if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR
        jax.config.update("jax_compilation_cache_dir", str(base_dir() / "compile_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    processes.join(coordinator, num_processes, process_id)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where JAX's build knows no such platform
        reason = str(error).splitlines()[0] if str(error) else "this build of JAX finds no such device"
        raise UserError(f"--device_type={device_type}: {reason}") from None
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)


@contextlib.contextmanager
def out_of_memory_explained(what: str, advice: str) -> Iterator[None]:
    """Turns the runtime's out-of-memory error into one line: for `what` there was no memory, and what to do then."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"out of memory for {what}: {advice}") from error


def describe() -> str:
    import jax

    devices = jax.devices()
    count = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){count}, jax {jax.__version__}"


def choose_precision(compute_dtype: str, attention: str = "", model_cfg: GPTConfig | None = None) -> "jnp.dtype":
    """Chooses the dtype of matmul operands, and for `model` the kernel of `causal_attention` (decoding has its own and
    needs none). Prints the choice with its reasons."""
    import jax
    import jax.numpy as jnp

    from nanochat_jax.model import attention as kernels
    from nanochat_jax.model.precision import choose_dtype

    dtype, why = choose_dtype(compute_dtype)
    if dtype == jnp.float32 and jax.default_backend() != "cpu":  # else GPUs and TPUs round the operands (TF32, bf16)
        jax.config.update("jax_default_matmul_precision", "highest")
    line = f"devices: {describe()}; matmuls in {dtype.__name__} ({why})"
    if model_cfg is not None:
        kernel, because = kernels.choose_kernel(attention, dtype, model_cfg)
        if processes.all_min(kernel == "cudnn") < (kernel == "cudnn"):  # all compile the same program
            kernel, because = kernels.choose_kernel("xla", dtype, model_cfg)[0], "cuDNN failed in another process"
        line += f", attention by {kernel} ({because})"
    print(line)
    return dtype


def peak_flops() -> float | None:
    """Peak FLOP/s of all devices together in bf16, None where unknown."""
    import jax

    one = _of_device(PEAK_FLOPS)
    return one and one * jax.device_count()


def expected_seconds(flops: float) -> float | None:
    """How long training would take at half of the devices' peak, None where that is unknown."""
    peak = peak_flops()
    return peak and flops / (0.5 * peak)


def peak_bandwidth() -> float | None:
    """Peak bytes/s of one device's memory, None where unknown."""
    return _of_device(PEAK_BANDWIDTH)


def _of_device(figures: dict[str, float]) -> float | None:
    import jax

    kind = jax.devices()[0].device_kind
    names = sorted((n for n in figures if re.search(rf"\b{n}\b", kind)), key=len)  # an L40 is no L4
    return figures[names[-1]] if names else None
