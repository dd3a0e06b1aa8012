"""Devices, the mesh over them, and the precision they are good at."""

import numpy as np

from nanochat_jax.config import UserError, base_dir

# Dense bf16 peaks of one device, FLOP/s, from the vendors' data sheets. Unknown devices have no MFU.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "GB200": 2500e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip


def start(device_type: str = "") -> None:
    """Chooses the platform and switches the compile cache on. Call it before anything else touches JAX."""
    platforms = {"": None, "cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}
    if device_type not in platforms:
        raise UserError(f"--device_type={device_type}: must be cpu, gpu or tpu")
    import jax

    if platforms[device_type]:
        jax.config.update("jax_platforms", platforms[device_type])
    jax.config.update("jax_compilation_cache_dir", str(base_dir() / "compile_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        jax.devices()
    except RuntimeError as error:
        raise UserError(f"--device_type={device_type}: {str(error).splitlines()[0]}") from None


def describe() -> str:
    import jax

    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), jax {jax.__version__}"


def compute_dtype(asked: str):
    """The dtype of matmul operands, and why it was chosen."""
    import jax
    import jax.numpy as jnp

    known = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
    if asked:
        if asked not in known:
            raise UserError(f"--compute_dtype={asked}: must be bfloat16 or float32")
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


def peak_flops() -> float | None:
    """Peak FLOP/s of all devices together in bf16, None where unknown."""
    import jax

    kind = jax.devices()[0].device_kind
    names = sorted((n for n in PEAK_FLOPS if n in kind), key=len)
    return PEAK_FLOPS[names[-1]] * jax.device_count() if names else None


def make_mesh():
    """All devices on one axis, "data": each takes its share of the batch, the parameters are on every one."""
    import jax
    from jax.sharding import AxisType

    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh):
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec())


def put_rows(mesh, batch: np.ndarray):
    """This process's rows [micro, rows, t] of a batch as a global array, its rows spread over the data axis."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(None, "data")), batch)


def mesh_of(params):
    """The mesh the parameters live on; None: they are on one device."""
    from jax.sharding import NamedSharding

    sharding = getattr(params["wte"], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def rows(mesh):
    """Arrays whose first axis is spread over the data axis. No mesh: None, JAX's word for one device."""
    from jax.sharding import NamedSharding, PartitionSpec

    return None if mesh is None else NamedSharding(mesh, PartitionSpec("data"))


def by_rows(function, mesh):
    """`function(shared, *rows) -> rows`, each device computing its share of the rows without a word to the others.

    The first axis of every array in `rows` and of what is returned is that of the rows. No mesh: `function` itself.
    """
    if mesh is None:
        return function
    import jax
    from jax.sharding import PartitionSpec

    def spread(shared, *arrays):
        own = PartitionSpec("data")
        specs = (PartitionSpec(), *[own] * len(arrays))
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=own)(shared, *arrays)

    return spread


def everywhere(arrays, mesh):
    """Within jit: the arrays whole on every device, so that every process can read them. No mesh: as they are."""
    import jax

    return arrays if mesh is None else jax.lax.with_sharding_constraint(arrays, replicated(mesh))
