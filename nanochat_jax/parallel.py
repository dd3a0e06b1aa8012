"""Devices and the precision they are good at; the processes of a run on several hosts, and how they end together."""

import atexit
import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from nanochat_jax.config import UserError, base_dir

if TYPE_CHECKING:
    import jax.numpy as jnp

T = TypeVar("T")
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost; given by a thread of JAX's own
PATIENCE = 10  # seconds that a process with an error waits for the others to end as well
GRACE = 3  # seconds in which one that hears of it may end with an error of its own
ENDED = "nanochat_jax/ended/"  # where it tells them, among the keys that JAX's processes share

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
    """Chooses the platform, switches the compile cache on, and joins the other processes of a run on several hosts.

    Those find each other through `coordinator` (host:port of process 0), or through what Slurm or Kubernetes tell their
    tasks. All but process 0 fall silent. Call it before anything else touches JAX.
    """
    platforms = {"": None, "cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}
    if device_type not in platforms:
        raise UserError(f"--device_type={device_type}: must be cpu, gpu or tpu")
    import jax

    if platforms[device_type]:
        jax.config.update("jax_platforms", platforms[device_type])
    if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR
        jax.config.update("jax_compilation_cache_dir", str(base_dir() / "compile_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    _join(coordinator, num_processes, process_id)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where JAX's build knows no such platform
        reason = str(error).splitlines()[0] if str(error) else "this build of JAX finds no such device"
        raise UserError(f"--device_type={device_type}: {reason}") from None
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)


def _join(coordinator: str, num_processes: int, process_id: int) -> None:
    import jax

    if jax.distributed.is_initialized():
        return
    if coordinator:
        if not re.fullmatch(r".+:\d+", coordinator):
            raise UserError(f"--coordinator={coordinator}: must be host:port of process 0, like 10.0.0.1:1234")
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(
                f"--coordinator={coordinator} needs --num_processes=N and --process_id=0 to N-1, got "
                f"{num_processes} and {process_id}"
            )
        where = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    elif num_processes > 1:
        raise UserError("--num_processes needs --coordinator=host:port, the address of process 0")
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or "JOB_COMPLETION_INDEX" in os.environ:
        where = {}  # JAX reads the addresses off Slurm's or Kubernetes' environment
    else:
        return
    try:
        jax.distributed.initialize(**where, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        hint = "" if where else ": try --coordinator=host:port --num_processes=N --process_id=I"
        raise UserError(f"could not join the other processes: {str(error).splitlines()[0]}{hint}") from None


def first(decide: Callable[[], T]) -> T:
    """What `decide` returns on process 0 (anything JSON can hold), told to all. An error it raises there ends all of
    them, or the others would wait for ever: a UserError as such, any other as what it is on process 0 alone."""
    import jax

    if jax.process_count() == 1:
        return decide()
    answer, failed = {}, None
    if jax.process_index() == 0:
        try:
            answer = {"value": decide()}
        except Exception as error:
            answer, failed = {"error": str(error), "mendable": isinstance(error, UserError)}, error
    answer = json.loads(_told(json.dumps(answer).encode()))
    if failed is not None:
        raise failed
    if "error" in answer:
        raise (UserError if answer["mendable"] else RuntimeError)(f"process 0: {answer['error']}")
    return answer["value"]


def _told(text: bytes) -> bytes:
    """The text of process 0, on all: its length first, since the others must have as much room."""
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    mine = np.frombuffer(text.ljust(size)[:size], np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8))


def gather(number: int) -> list[int]:
    """The number of each process, told to all, which must ask at the same point."""
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.int32(number)).tolist()


def leave() -> None:
    """Takes leave of the other processes, once all of them do. What still waits for one of them gets an error."""
    import jax

    jax.distributed.shutdown()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Within it an error of one process alone ends the others too, with a line that says whose it was: without, it
    would wait five minutes for them to exit, and they for its part of the next step. One that is killed is missed after
    HEARTBEAT seconds; what JAX then tells the others is a page long."""
    import jax

    if jax.process_count() == 1:
        yield
        return
    ended = threading.Event()
    threading.Thread(target=_listen, args=(ended,), daemon=True).start()
    try:
        yield
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        ended.set()
        _tell(error)
        _leave_with_the_others()
        raise
    finally:
        ended.set()


def _shared():
    """The keys and values that the processes share; None after `leave`. Orbax takes them from there as well: JAX has no
    public way to them."""
    from jax._src import distributed

    return distributed.global_state.client


def _tell(error: BaseException) -> None:
    import jax

    said = str(error).strip().splitlines()[:1]
    reason = ": ".join(said if isinstance(error, UserError) else [type(error).__name__, *said])
    with contextlib.suppress(Exception):  # who has taken leave has nobody to tell
        _shared().key_value_set(f"{ENDED}{jax.process_index()}", f"process {jax.process_index()} has ended: {reason}")


def _listen(ended: threading.Event) -> None:
    """Ends this process soon after another one has told of its error: it may be waiting for its part of a step."""
    while not ended.wait(1) and (shared := _shared()):
        try:
            told = shared.key_value_dir_get(ENDED)
        except Exception:  # taken leave just now, or process 0 is lost: JAX says so
            return
        if told and not ended.wait(GRACE):
            print(f"error: {told[0][1]}", file=sys.stderr)
            _leave_with_the_others()
            _exit_now()


def _leave_with_the_others() -> None:
    """Takes leave of the other processes if they do so too within a few seconds, as with an error they all have. Else
    this process will exit without: its connections close, and what waits at their other ends gets an error."""

    def try_to_leave() -> None:
        with contextlib.suppress(Exception):
            leave()

    leaving = threading.Thread(target=try_to_leave, daemon=True)
    leaving.start()
    leaving.join(PATIENCE)
    if leaving.is_alive():
        atexit.register(_exit_now)  # goes before JAX's own handler


def _exit_now() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


@contextlib.contextmanager
def out_of_memory_explained(rows: int) -> Iterator[None]:
    """Turns the runtime's out-of-memory error into one line that names the flag to lower. `rows` is how many a device
    takes at once, 0 before there are any."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if not rows:
            reason = "out of memory for the weights and the optimizer's state"
            raise UserError(f"{reason}: try --shard=full on several devices, or a smaller model") from error
        less = f"lower --device_batch_size (now {rows}), or " if rows > 1 else ""
        raise UserError(f"out of memory: {less}try --remat=full or --shard=full") from error


def describe() -> str:
    import jax

    devices = jax.devices()
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){processes}, jax {jax.__version__}"


def precision(compute_dtype: str, attention: str = "", head_dim: int = 128) -> "jnp.dtype":
    """Chooses the dtype of matmul operands and the attention kernel, and prints the choice with its reasons."""
    from nanochat_jax import attention as kernels

    dtype, why = choose_dtype(compute_dtype)
    kernel, because = kernels.choose(attention, dtype, head_dim)
    print(f"devices: {describe()}; matmuls in {dtype.__name__} ({why}), attention by {kernel} ({because})")
    return dtype


def choose_dtype(asked: str):
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

    one = _of_device(PEAK_FLOPS)
    return one and one * jax.device_count()


def peak_bandwidth() -> float | None:
    """Peak bytes/s of one device's memory, None where unknown."""
    return _of_device(PEAK_BANDWIDTH)


def _of_device(figures: dict[str, float]) -> float | None:
    import jax

    kind = jax.devices()[0].device_kind
    names = sorted((n for n in figures if re.search(rf"\b{n}\b", kind)), key=len)  # an L40 is no L4
    return figures[names[-1]] if names else None
