"""Checks the GPUs of this machine before a run spends time on them. Asks nvidia-smi and the file system, not JAX."""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nanochat_jax.config import UserError

IDLE = 2048  # MiB; the driver itself takes some hundred MiB of each GPU
CUDA_LIBRARIES = ("libcudnn*.so*", "libcublas*.so*", "libnccl.so*")


class Gpu(NamedTuple):
    """A GPU as the driver sees it."""

    index: int
    name: str
    driver: str
    used: int  # MiB
    total: int  # MiB


def visible() -> list[Gpu]:
    """Returns the GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES does not hide. Without nvidia-smi, returns []."""
    fields = "index,name,driver_version,memory.used,memory.total"
    table = _nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    gpus = []
    for row in table.splitlines():
        cells = [cell.strip() for cell in row.split(",")]
        if len(cells) == 5 and cells[0].isdigit():
            used, total = (int(cell) if cell.isdigit() else 0 for cell in cells[3:])
            gpus.append(Gpu(int(cells[0]), cells[1], cells[2], used, total))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    if re.fullmatch(r"[0-9]+( *, *[0-9]+)*", chosen):  # else it holds ids like GPU-3f2a, or hides nothing
        gpus = [gpu for gpu in gpus if gpu.index in map(int, chosen.split(","))]
    return gpus


def describe(gpus: Sequence[Gpu]) -> str:
    """Returns text such as "8 x NVIDIA H100 80GB HBM3, driver 580.65.06, 79.6 GiB each"."""
    first = gpus[0]
    return f"{len(gpus)} x {first.name}, driver {first.driver}, {first.total / 1024:.1f} GiB each"


def check(gpus: Sequence[Gpu]) -> None:
    """Raises UserError if the GPUs are of several kinds, or if one of them is in use."""
    kinds: dict[str, list[str]] = {}
    for gpu in gpus:
        kinds.setdefault(gpu.name, []).append(str(gpu.index))
    if len(kinds) > 1:
        most = max(kinds.values(), key=len)
        which = "; ".join(f"{name}: {', '.join(indices)}" for name, indices in kinds.items())
        raise UserError(
            f"the GPUs are of {len(kinds)} kinds ({which}), and a step takes as long as the slowest: "
            f"use one kind with CUDA_VISIBLE_DEVICES={','.join(most)}"
        )
    if busy := [gpu for gpu in gpus if gpu.used > IDLE]:
        free = ",".join(str(gpu.index) for gpu in gpus if gpu not in busy)
        which = ", ".join(f"{gpu.index} ({gpu.used / 1024:.1f} of {gpu.total / 1024:.1f} GiB)" for gpu in busy)
        leave_out = f", or leave it out with CUDA_VISIBLE_DEVICES={free} and a --mesh that fits" if free else ""
        raise UserError(f"in use by another process: GPU {which}: end that process (nvidia-smi shows it){leave_out}")


def nvlink(gpus: Sequence[Gpu]) -> str:
    """Says whether all pairs of GPUs are connected by NVLink, from the matrix of `nvidia-smi topo -m`."""
    if len(gpus) < 2:
        return "one GPU, so none is needed"
    rows = {}
    for row in _nvidia_smi("topo", "-m").splitlines():
        cells = re.sub(r"\x1b\[[0-9;]*m", "", row).split()  # some versions underline the header
        if cells and re.fullmatch(r"GPU\d+", cells[0]) and "X" in cells:
            rows[int(cells[0][3:])] = cells[1:]
    if not rows:
        return "unknown: nvidia-smi topo -m shows no matrix"
    indices = [gpu.index for gpu in gpus]
    links = {(a, b): rows[a][b] for a in indices for b in indices if a < b and a in rows and b < len(rows[a])}
    others = {pair: link for pair, link in links.items() if not link.startswith("NV")}
    if not others:
        return f"between all {len(gpus)} GPUs ({', '.join(sorted(set(links.values())))})"
    (a, b), link = next(iter(others.items()))
    return (
        f"MISSING between {len(others)} of {len(links)} pairs, such as {a} and {b} ({link}): "
        "reducing gradients will take much longer"
    )


def second_libraries() -> list[Path]:
    """Returns CUDA libraries in the folders of LD_LIBRARY_PATH. They would be loaded instead of those in .venv."""
    folders = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    return sorted({path for folder in folders for name in CUDA_LIBRARIES for path in folder.glob(name)})


def _nvidia_smi(*arguments: str) -> str:
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
