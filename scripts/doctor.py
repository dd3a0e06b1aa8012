"""Shows what this machine has, what is missing, and how long pretraining with a preset would take.

    python -m scripts.doctor
    python -m scripts.doctor --config=d20 --mesh=node=2,data=8
    python -m scripts.doctor --config=d20 --target=h100:8     # GPUs that are not here

The command takes up to a minute. It trains nothing. It uses GPU memory only to try the attention kernel, and to measure
how fast the GPUs sum an array.
"""

import contextlib
import os
from typing import TYPE_CHECKING

from nanochat_jax import commandline, config
from nanochat_jax.config import UserError

if TYPE_CHECKING:  # importing these at run time would slow down --help
    from jax.sharding import Mesh
    from jax.typing import DTypeLike

    from nanochat_jax.parallel.sharding import Layout

GIB = 2**30
REPEATS = 5  # of a measurement


def main(cfg: config.Doctor) -> None:
    if cfg.target:
        forecast(cfg)
        return
    if cfg.price_per_hour or cfg.json:
        raise UserError("--price_per_hour and --json need --target, such as --target=h100:8")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves the GPU memory to training runs
    from nanochat_jax import environment
    from nanochat_jax.parallel import devices

    for name, value in environment.describe(devices.described_by_child()).items():
        line(name, value)
    line("Free disk", free_disk())
    line("Rust tokenizer", rust_tokenizer())
    line("Hub", hub())
    if download := expected_download(cfg):
        line("Download", download)
    line("Limits", limits())

    if devices.may_use_gpus(cfg.device_type):
        check_gpus(devices.memory_fraction())
    devices.start(cfg.device_type, cfg.coordinator, cfg.num_processes, cfg.process_id)
    from nanochat_jax.parallel import sharding

    line("Device memory", device_memory())
    wanted = commandline.parse(config.TokTrain, [f"--config={cfg.preset_path}"] if cfg.preset_path else [])
    vocab_size, tokenizer = tokenizer_here(wanted.vocab_size)
    line("Tokenizer", tokenizer)
    model_cfg = cfg.gpt_config(vocab_size)
    dtype = devices.choose_precision(cfg.compute_dtype, cfg.attention, model_cfg)
    mesh = sharding.make_mesh(cfg.mesh)
    line("All-reduce", all_reduce(mesh))
    plan(cfg, model_cfg, sharding.Layout(mesh, cfg.shard), dtype)


def forecast(cfg: config.Doctor) -> None:
    """Compiles a run's programs for GPUs that are not here, and prints what they need and would at best reach."""
    import json
    import sys

    from nanochat_jax.forecast import card

    target = card.parse(cfg.target)  # a mistake is told before JAX is imported
    from nanochat_jax.forecast import compiled, plan, report

    compiled.check_compiler()
    compiled.without_driver()
    wanted = commandline.parse(config.TokTrain, [f"--config={cfg.preset_path}"] if cfg.preset_path else [])
    model_cfg = cfg.gpt_config(tokenizer_here(wanted.vocab_size)[0])
    out = sys.stderr if cfg.json == "-" else sys.stdout
    print(f"{'Target:':<18}{target}; {model_cfg.num_params:,} parameters, {model_cfg.describe()}", file=out, flush=True)
    with compiled.pretending(target, cfg.attention or "cudnn"):
        made = plan.make(cfg, target, model_cfg, lambda text: print(text, file=out, flush=True))
    found = report.facts(cfg, made)
    for name, value in report.lines(found):
        print(f"{name + ':':<26}{value}", file=out)
    print(report.BOUND, file=out)
    if cfg.json == "-":
        print(json.dumps(found))
    elif cfg.json:
        config.user_path(cfg.json).write_text(json.dumps(found, indent=1))


def line(name: str, value: str) -> None:
    print(f"{name + ':':<18}{value}", flush=True)


def free_disk() -> str:
    """Returns the free space on the disk that holds the base folder."""
    import shutil

    return f"{shutil.disk_usage(config.base_dir()).free / GIB:,.0f} GiB in {config.base_dir()}"


def rust_tokenizer() -> str:
    """Returns "built", or a message that says how to build the Rust tokenizer."""
    from nanochat_jax import tokenizer

    try:
        tokenizer.rust_crate()
    except UserError as error:
        return str(error)
    return "built"


def tokenizer_here(wanted: int) -> tuple[int, str]:
    """Returns the vocabulary size of the tokenizer that pretraining will use, and a description of this tokenizer.

    `wanted` is the vocabulary size of the tokenizer that tok_train would train with the same preset. If there is no
    tokenizer yet, `wanted` is returned.
    """
    from nanochat_jax.files import read_json

    folder = config.base_dir() / "tokenizer"
    train = f"python -m scripts.tok_train trains one of {wanted:,} tokens"
    if not folder.exists():
        return wanted, f"none yet in {folder}: {train}"
    about, source = read_json(folder / "nanochat.json"), read_json(folder / "source.json")
    size = about.get("vocab_size")
    if not isinstance(size, int):
        return wanted, f"damaged, in {folder}: {train}"
    text = f"{size:,} tokens, trained on {source.get('source') or 'an unknown text'}, in {folder}"
    # Compare the sizes that were asked for, because a tokenizer has fewer tokens if its text ran out of pairs to merge.
    asked = source.get("vocab_size", size)
    return size, text if asked == wanted else f"{text}; NOT what these settings would train: {train}"


def hub() -> str:
    """Says whether the Hugging Face hub answers within three seconds."""
    import http.client
    import time
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return f"{constants.ENDPOINT}, not contacted: HF_HUB_OFFLINE is set"
    start = time.monotonic()
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=3) as response:
            date = response.headers["Date"]
    except urllib.error.HTTPError as error:
        return f"{constants.ENDPOINT} answers with an error ({error.code} {error.reason})"
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError means that ENDPOINT is not a URL
        return f"{constants.ENDPOINT} does not answer ({getattr(error, 'reason', error)}): use local text and tasks"
    return f"{constants.ENDPOINT} answers in {1000 * (time.monotonic() - start):.0f} ms{wrong_clock(date)}"


def wrong_clock(date: str | None) -> str:
    """Says how far this machine's clock is from a server's date (an HTTP date), if that is more than a minute.

    A wrong clock makes secure connections fail, and makes files of several machines appear older than they are.
    """
    import email.utils
    import time

    from nanochat_jax.progress import clock

    try:
        ahead = time.time() - email.utils.parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return ""
    if abs(ahead) < 60:
        return ""
    return f"; THIS MACHINE'S CLOCK IS {clock(abs(ahead))} {'AHEAD OF' if ahead > 0 else 'BEHIND'} THE HUB'S: set it"


def expected_download(cfg: config.Doctor) -> str:
    """Says how much text must still be downloaded before pretraining, and how long this takes. Returns "" if none."""
    from huggingface_hub import constants

    from nanochat_jax.data import download_estimate, hub

    wanted = commandline.parse(config.Dataset, [f"--config={cfg.preset_path}"] if cfg.preset_path else [])
    if cfg.data_dir or cfg.data not in hub.SOURCES or constants.HF_HUB_OFFLINE:
        return ""
    return download_estimate.estimate(cfg.data, wanted.num_files, wanted.num_workers)


def limits() -> str:
    """Returns how much shared memory is free, which NCCL uses, and how many files a process may have open."""
    import shutil

    found = []
    with contextlib.suppress(OSError):
        free = shutil.disk_usage("/dev/shm").free
        few = "" if free >= GIB else " (TOO LITTLE for several GPUs: start the container with --shm-size=16g)"
        found.append(f"{free / GIB:.1f} GiB of shared memory free{few}")
    with contextlib.suppress(ImportError):  # not a POSIX system
        import resource

        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        few = "" if files >= 1024 or files < 0 else " (TOO FEW: run ulimit -n 65536)"
        found.append(f"{'any number of' if files < 0 else f'{files:,}'} open files{few}")
    return ", ".join(found) or "unknown"


def check_gpus(memory_fraction: float) -> None:
    """Prints what nvidia-smi says about the GPUs. Raises UserError if a run should not start on them."""
    from nanochat_jax.parallel import gpu_node

    if not (gpus := gpu_node.visible()):
        return
    line("GPUs", gpu_node.describe(gpus))
    line("NVLink", gpu_node.nvlink(gpus))
    line("Power limit", gpu_node.power(gpus))
    if found := gpu_node.second_libraries():
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        line(
            "CUDA libraries", f"TWICE: {found[0]}{more} may be loaded instead of those in .venv: unset LD_LIBRARY_PATH"
        )
    else:
        line("CUDA libraries", "only those in .venv (LD_LIBRARY_PATH names no others)")
    gpu_node.check(gpus, memory_fraction)


def all_reduce(mesh: "Mesh") -> str:
    """Measures how fast the devices sum an array, as they sum gradients."""
    import time

    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    if mesh.size == 1:
        return "one device, so none is needed"
    size = 2**28 if mesh.devices.flat[0].platform == "gpu" else 2**22  # bytes on each device
    rows = NamedSharding(mesh, P(mesh.axis_names))
    make = jax.jit(lambda: jnp.ones((mesh.size, size // 4), jnp.float32), out_shardings=rows)
    add = jax.jit(
        jax.shard_map(lambda x: jax.lax.psum(x, mesh.axis_names), mesh=mesh, in_specs=rows.spec, out_specs=P())
    )
    x = make()
    jax.block_until_ready(add(x))  # compiles, and connects the devices
    start = time.perf_counter()
    for _ in range(REPEATS):
        jax.block_until_ready(add(x))
    seconds = (time.perf_counter() - start) / REPEATS
    # The "bus bandwidth" of NVIDIA's nccl-tests: what each device sends, whatever their number.
    bandwidth = 2 * (mesh.size - 1) / mesh.size * size / seconds
    return f"{size / 2**20:.0f} MiB in {1000 * seconds:.1f} ms, {bandwidth / 1e9:.1f} GB/s of bus bandwidth"


def device_memory() -> str:
    """Returns the memory size of each device, and how much memory the first device uses now."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return "shared with the machine"
    return f"{stats['bytes_limit'] / GIB:.1f} GiB each, {stats.get('bytes_in_use', 0) / GIB:.1f} in use"


def plan(cfg: config.Doctor, model_cfg: config.GPTConfig, layout: "Layout", dtype: "DTypeLike") -> None:
    """Prints what pretraining would look like: the model, the batch, the memory per device, and the expected time."""

    from nanochat_jax.parallel import sharding
    from nanochat_jax.progress import count_of
    from nanochat_jax.training.announce import cost
    from nanochat_jax.training.batch_shape import estimated_memory, memory_limit, rows_that_fit, shape_for_tokens
    from nanochat_jax.training.passes import horizon
    from nanochat_jax.training.run import state_bytes

    layout.check(model_cfg)
    weights, state = (count / GIB for count in state_bytes(cfg, model_cfg, layout, dtype))

    def fit(rows: int) -> int:
        """Estimates how many rows fit in memory, ignoring what --shard and --remat save.

        Training does not estimate the memory, but measures it, and may take fewer rows if they are faster.
        """
        try:
            return rows_that_fit(model_cfg, rows, lambda steps, rows: estimated_memory(model_cfg, rows), memory_limit())
        except UserError as error:
            # Leave out the advice after the error's colon, because the user may already have followed it.
            line("Memory", f"rough estimate: {str(error).partition(':')[0]}, before the savings of --shard and --remat")
            return 1

    replicas = sharding.replicas(layout.mesh)
    shape = shape_for_tokens(cfg.total_batch_size, cfg.device_batch_size, model_cfg.sequence_len, replicas, fit)
    steps = horizon(cfg, model_cfg, shape.tokens)
    line("Preset", cfg.preset or "none, so the defaults (choose one with --config=NAME)")
    line("Model", f"{model_cfg.num_params:,} parameters, {model_cfg.describe()}")
    line("Mesh", f"{sharding.describe(layout.mesh)}, --shard={layout.shard}")
    line("On one device", f"{weights:.2f} GiB of weights, {state:.2f} of optimizer state; plus gradients, activations")
    line("Batch", f"{shape.tokens:,} tokens = {shape} x {shape.seq_len}")
    tokens = steps * shape.tokens
    expected = cost(model_cfg, tokens)
    line("Pretraining", f"{count_of(steps, 'step')}, {tokens:,} tokens, {expected['total FLOPs']} FLOPs")
    text(cfg, steps, shape.tokens)
    line("Expected time", expected["expected time"])


def text(cfg: config.Doctor, steps: int, tokens_per_step: int) -> None:
    """Prints which text pretraining would read, and how often. Downloads, builds and converts nothing.

    A text that is missing or too small is no error, because more text may be downloaded before training starts.
    """
    from nanochat_jax.data import sources, token_cache
    from nanochat_jax.tokenizer import Tokenizer
    from nanochat_jax.training.passes import Amount

    try:
        source = sources.open(cfg.data, cfg.data_dir, build=False)
    except UserError as error:
        line("Text", f"not ready: {error}")
        return
    line("Text", source.about.removeprefix("text: ").replace("\n", "\n" + " " * 18))
    try:
        tokenizer = Tokenizer.load(config.base_dir() / "tokenizer")
    except UserError as error:
        line("Passes", f"unknown: {error}")
        return
    amount = Amount.of(source, tokenizer, token_cache.folder_of(source, tokenizer))
    line("Passes", amount.describe(steps * tokens_per_step))
    try:
        amount.check(cfg.max_epochs, steps, tokens_per_step)
    except UserError as error:
        line("Passes", f"training will refuse this: {error}")


if __name__ == "__main__":
    commandline.run(main, config.Doctor)
