"""Starts JAX, chooses the precision, explains out-of-memory errors, and lists peak FLOP/s and memory bandwidths."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING

from nanochat_jax.config import GPTConfig, UserError, base_dir, first_line
from nanochat_jax.parallel import gpu_node, host_memory, processes
from nanochat_jax.progress import count_of

# Functions import JAX only when they need it, because the import takes seconds. `start` configures JAX before its first
# use.
if TYPE_CHECKING:
    from jax.typing import DTypeLike

# By default, XLA silently recomputes activations if a program needs more than 76% of a GPU's memory. The memory
# analysis of the compiled program does not show this. The flag raises XLA's limit to 89.6%. JAX may allocate 92%, and
# `rows_that_fit` accepts at most 95% of that, which is 87.4%. So the number of rows that it chooses needs no
# recomputation.
XLA_GPU_FLAGS = ("--xla_gpu_memory_limit_slop_factor=112",)
GPU_MEMORY_FRACTION = 0.92
# JAX reads the fraction from either of these variables, and refuses to start if both are set.
MEMORY_FRACTION = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

# JAX's CUDA plugin (extra aot) prints a traceback on a machine without a driver, and JAX 0.11 then cannot compile for
# GPUs that are not there. With this environment variable, the plugin does not look for a driver.
NO_DRIVER = ("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

INSTALL = "run 'bash setup.sh' to install JAX for the GPU (scripts.doctor shows what JAX finds)"
# Peak bf16 FLOP/s of one device, without sparsity, from the vendors' data sheets. MFU is reported only for these
# devices.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "GB200": 2500e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip

# Memory bandwidth of one device in bytes/s, from the vendors' data sheets.
PEAK_BANDWIDTH = {
    "H100 PCIe": 2.0e12, "H100 NVL": 3.9e12, "H100": 3.35e12, "H200": 4.8e12, "GH200": 4.0e12, "B200": 8e12,
    "GB200": 8e12, "A100-SXM4-80GB": 2.039e12, "A100 80GB": 1.935e12, "A100": 1.555e12, "L40S": 864e9, "L4": 300e9,
    "RTX 4090": 1.008e12, "RTX 3090": 936e9,
}  # fmt: skip


def start(device_type: str = "", coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Chooses the platform, turns on the compilation cache, and joins the other processes of a run (`processes.join`).

    Afterwards, only process 0 prints. Call this before anything else uses JAX. Raises UserError if there is no device
    of type `device_type`. Also raises UserError if no type is given, and JAX would use the CPU although the machine has
    an NVIDIA GPU.
    """
    platforms = {"": None, "cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}
    assert device_type in platforms, f"device type {device_type!r}, expected one of {', '.join(platforms)}"
    import jax

    if platforms[device_type]:
        jax.config.update("jax_platforms", platforms[device_type])
    may_use_cpu = platforms[device_type] in (None, "cpu")  # the host of a TPU is included: it does no harm there
    if may_use_gpus(device_type) and gpu_node.count():
        may_use_cpu = False
        set_gpu_defaults()
    else:
        os.environ.setdefault(*NO_DRIVER)
    # If the environment variable JAX_COMPILATION_CACHE_DIR is set, it takes precedence. The ignore comments for ty are
    # necessary, because type checkers do not know JAX's options.
    if not jax.config.jax_compilation_cache_dir:  # ty: ignore[missing-attribute]
        jax.config.update("jax_compilation_cache_dir", str(base_dir() / "compile_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    processes.join(coordinator, num_processes, process_id)
    try:
        with host_memory.freed_memory_kept() if may_use_cpu else contextlib.nullcontext():
            jax.devices()  # starts JAX's threads
    except (RuntimeError, AssertionError) as error:  # an AssertionError means that this build of JAX lacks the platform
        reason = first_line(error) if str(error) else "this build of JAX finds no such device"
        if device_type:
            raise UserError(f"--device_type={device_type}: {reason}: leave the flag out, or {INSTALL}") from None
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"JAX_PLATFORMS={platforms}: {reason}: {INSTALL}, or use the CPU with JAX_PLATFORMS=cpu"
        ) from None
    # On a machine with a GPU, using the CPU is an error unless --device_type or JAX_PLATFORMS asks for the CPU.
    if not jax.config.jax_platforms and jax.default_backend() == "cpu" and (gpus := gpu_node.count()):  # ty: ignore[missing-attribute]
        raise UserError(
            f"this machine has {count_of(gpus, 'NVIDIA GPU')}, but JAX sees none: {INSTALL}; or use the CPU with "
            "--device_type=cpu"
        )
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)


def set_gpu_defaults() -> None:
    """Sets the environment variables that XLA and JAX read when they start to use GPUs. The user's values win."""
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in XLA_GPU_FLAGS if flag.partition("=")[0] not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()
    if not set(MEMORY_FRACTION) & os.environ.keys():
        os.environ[MEMORY_FRACTION[0]] = str(GPU_MEMORY_FRACTION)


def memory_fraction() -> float:
    """Returns the fraction of each GPU's memory that JAX may allocate."""
    given = next((os.environ[name] for name in MEMORY_FRACTION if name in os.environ), "")
    try:
        return float(given or GPU_MEMORY_FRACTION)
    except ValueError:
        return GPU_MEMORY_FRACTION


def may_use_gpus(device_type: str) -> bool:
    """Whether --device_type and JAX_PLATFORMS allow JAX to use NVIDIA GPUs."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return device_type in ("gpu", "cuda") if device_type else not platforms or "cuda" in platforms or "gpu" in platforms


@contextlib.contextmanager
def out_of_memory_explained(what: str, advice: str) -> Generator[None]:
    """Turns JAX's out-of-memory error into a one-line UserError with advice.

    Example: what="a step" and advice="try --remat=full" give "out of memory for a step: try --remat=full".
    """
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"out of memory for {what}: {advice}") from error


def describe() -> str:
    """Returns a description of the run's devices, such as "8 x NVIDIA H100 80GB HBM3 (gpu), jax 0.10.2"."""
    import jax

    devices = jax.devices()
    count = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){count}, jax {jax.__version__}"


def described_by_child() -> str:
    """Describes the devices without starting JAX in this process, where it would hold GPU memory that training needs.

    Returns the result of `describe` in a child process, or "unknown" with the reason.
    """
    program = f"from {__name__} import describe; print(describe())"
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({first_line(error)})"
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return done.stdout.strip() or f"unknown ({reason})"


def choose_precision(
    compute_dtype: str, attention: str = "", model_cfg: GPTConfig | None = None, *, may_be_slow: bool = False
) -> "DTypeLike":
    """Chooses the dtype of matmul operands and, if `model_cfg` is given, the kernel of `causal_attention`.

    Prints each choice with its reason, and returns the dtype. Leave out `model_cfg` for decoding, which does not use
    `causal_attention`. For `may_be_slow`, see `choose_kernel`.
    """
    import jax
    import jax.numpy as jnp

    from nanochat_jax.model import attention as kernels
    from nanochat_jax.model.precision import choose_dtype

    dtype, dtype_reason = choose_dtype(compute_dtype)
    if dtype == jnp.float32 and jax.default_backend() != "cpu":
        # By default, JAX rounds float32 matmul operands to fewer bits on GPUs (TF32) and TPUs (bf16).
        jax.config.update("jax_default_matmul_precision", "highest")
    line = f"devices: {describe()}; matmuls in {jnp.dtype(dtype).name} ({dtype_reason})"
    if model_cfg is not None:
        kernel, kernel_reason = kernels.choose_kernel(attention, dtype, model_cfg, may_be_slow=may_be_slow)
        cudnn_everywhere = processes.all_min(int(kernel == "cudnn"))
        if kernel == "cudnn" and not cudnn_everywhere:  # all processes must compile the same program
            kernel, _ = kernels.choose_kernel("xla", dtype, model_cfg)
            kernel_reason = "cuDNN failed in another process"
        line += f", attention by {kernel} ({kernel_reason})"
    print(line)
    return dtype


def peak_flops() -> float | None:
    """Returns the total peak bf16 FLOP/s of all devices, or None if the peak is unknown."""
    import jax

    one_device = _for_this_device(PEAK_FLOPS)
    return None if one_device is None else one_device * jax.device_count()


def expected_seconds(flops: float) -> float | None:
    """Returns how many seconds `flops` operations take at half the peak FLOP/s, or None if the peak is unknown."""
    peak = peak_flops()
    return None if peak is None else flops / (0.5 * peak)


def peak_bandwidth() -> float | None:
    """Returns the peak memory bandwidth of one device in bytes/s, or None if it is unknown."""
    return _for_this_device(PEAK_BANDWIDTH)


def _for_this_device(figures: dict[str, float]) -> float | None:
    """Returns the value of the longest key in `figures` that the device's name contains, or None if it contains none.

    Only whole words match, so that an L40 is not taken for an L4.
    """
    import jax

    kind = jax.devices()[0].device_kind
    names = [name for name in figures if re.search(rf"\b{name}\b", kind)]
    return figures[max(names, key=len)] if names else None
