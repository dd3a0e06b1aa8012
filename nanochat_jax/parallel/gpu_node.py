"""Describes the GPUs of this machine, and refuses GPUs that a run should not start on. Asks nvidia-smi, not JAX."""

import contextlib
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nanochat_jax.config import UserError

CUDA_LIBRARIES = ("libcudnn*.so*", "libcublas*.so*", "libnccl.so*")


class Gpu(NamedTuple):
    """A GPU as the driver sees it."""

    index: int
    uuid: str
    name: str
    driver: str
    used: int  # MiB
    total: int  # MiB


def count() -> int:
    """Returns how many NVIDIA GPUs the driver lists, or 0 if CUDA_VISIBLE_DEVICES hides all of them.

    If nvidia-smi cannot be run, this function counts the device files /dev/nvidia0, /dev/nvidia1 and so on. It does not
    read /proc/driver/nvidia, because that folder also exists in containers that may not use the GPUs.
    """
    if _all_hidden():
        return 0
    listed = _nvidia_smi("--list-gpus")
    if listed is None:
        return len(list(Path("/dev").glob("nvidia[0-9]*")))
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def visible() -> list[Gpu]:
    """Returns the GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES does not hide. Without nvidia-smi, returns []."""
    fields = "index,uuid,name,driver_version,memory.used,memory.total"
    table = _nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits") or ""
    gpus = []
    for row in table.splitlines():
        cells = [cell.strip() for cell in row.split(",")]
        if len(cells) == 6 and cells[0].isdigit():
            used, total = (int(cell) if cell.isdigit() else 0 for cell in cells[4:])
            gpus.append(Gpu(int(cells[0]), *cells[1:4], used, total))
    if _all_hidden():
        return []
    if chosen := [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]:
        gpus = [gpu for gpu in gpus if any(_names(name, gpu) for name in chosen)]
    return gpus


def _all_hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles")


def _names(name: str, gpu: Gpu) -> bool:
    """Whether an entry of CUDA_VISIBLE_DEVICES names this GPU, by its index or by the beginning of its UUID."""
    return name == str(gpu.index) or (name.startswith("GPU-") and gpu.uuid.startswith(name))


def describe(gpus: Sequence[Gpu]) -> str:
    """Returns text such as "8 x NVIDIA H100 80GB HBM3, driver 580.65.06, 79.6 GiB each"."""
    first = gpus[0]
    return f"{len(gpus)} x {first.name}, driver {first.driver}, {first.total / 1024:.1f} GiB each"


def check(gpus: Sequence[Gpu], memory_fraction: float) -> None:
    """Raises UserError if the GPUs are of several kinds, or if JAX cannot allocate `memory_fraction` of each GPU."""
    kinds: dict[str, list[Gpu]] = {}
    for gpu in gpus:
        kinds.setdefault(gpu.name, []).append(gpu)
    if len(kinds) > 1:
        which = "; ".join(f"{name}: {', '.join(str(gpu.index) for gpu in same)}" for name, same in kinds.items())
        raise UserError(
            f"the GPUs are of {len(kinds)} kinds ({which}), and a step takes as long as the slowest: "
            f"use one kind with {_choose(max(kinds.values(), key=len))}"
        )
    if busy := [gpu for gpu in gpus if gpu.used > (1 - memory_fraction) * gpu.total]:
        which = ", ".join(f"{gpu.index} ({gpu.used / 1024:.1f} of {gpu.total / 1024:.1f} GiB)" for gpu in busy)
        free = [gpu for gpu in gpus if gpu not in busy]
        leave_out = f"leave it out with {_choose(free)}" if free else "lower XLA_CLIENT_MEM_FRACTION"
        raise UserError(
            f"another process uses memory of GPU {which}, and JAX would take {memory_fraction:.0%}: end that process "
            f"(nvidia-smi shows it), or {leave_out}"
        )


def _choose(gpus: Sequence[Gpu]) -> str:
    """Returns the variables that choose these GPUs. Without the first, CUDA may number GPUs in another order."""
    return f"CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES={','.join(str(gpu.index) for gpu in gpus)}"


def nvlink(gpus: Sequence[Gpu]) -> str:
    """Says whether all pairs of GPUs are connected by NVLink, from the matrix of `nvidia-smi topo -m`."""
    if len(gpus) < 2:
        return "one GPU, so none is needed"
    rows = {}
    for row in (_nvidia_smi("topo", "-m") or "").splitlines():
        cells = re.sub(r"\x1b\[[0-9;]*m", "", row).split()  # some versions underline the header
        if cells and re.fullmatch(r"GPU\d+", cells[0]) and "X" in cells:
            rows[int(cells[0][3:])] = cells[1:]
    pairs = [(a.index, b.index) for a in gpus for b in gpus if a.index < b.index]
    if any(gpu.index not in rows for gpu in gpus):
        return "unknown: nvidia-smi topo -m does not show all GPUs"
    links = {(a, b): rows[a][b] for a, b in pairs}
    others = {pair: link for pair, link in links.items() if not link.startswith("NV")}
    if not others:
        return f"between all {len(gpus)} GPUs ({', '.join(sorted(set(links.values())))})"
    (a, b), link = next(iter(others.items()))
    return (
        f"MISSING between {len(others)} of {len(links)} pairs, such as {a} and {b} ({link}): "
        "reducing gradients will take much longer"
    )


def power(gpus: Sequence[Gpu]) -> str:
    """Says how much power the GPUs may draw, and which of them may draw less than their default.

    A GPU with a lower limit lowers its clock under load, and all others wait for it in every step.
    """
    limits = {}
    table = _nvidia_smi("--query-gpu=index,power.limit,power.default_limit", "--format=csv,noheader,nounits") or ""
    for row in table.splitlines():
        with contextlib.suppress(ValueError):  # not all GPUs report their limits
            index, limit, default = row.split(",")
            limits[int(index)] = float(limit), float(default)
    if any(gpu.index not in limits for gpu in gpus):
        return "unknown: nvidia-smi does not report it"
    lowered = [gpu.index for gpu in gpus if limits[gpu.index][0] < limits[gpu.index][1]]
    if not lowered:
        return f"{limits[gpus[0].index][0]:.0f} W, the default"
    limit, default = limits[lowered[0]]
    return (
        f"LOWERED on GPU {', '.join(map(str, lowered))} (to {limit:.0f} of {default:.0f} W): a step takes longer; "
        f"raise it with sudo nvidia-smi -pl {default:.0f}"
    )


def second_libraries() -> list[Path]:
    """Returns CUDA libraries in the folders of LD_LIBRARY_PATH. They would be loaded instead of those in .venv."""
    folders = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    return sorted({path for folder in folders for name in CUDA_LIBRARIES for path in folder.glob(name)})


def _nvidia_smi(*arguments: str) -> str | None:
    """Returns the output of nvidia-smi, or None if it cannot be run."""
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
