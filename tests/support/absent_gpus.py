"""H100s that are not there: XLA compiles for them, so tests can read the programs that they would run.

This needs the packages of the extra cuda13 (`bash setup.sh dev cuda13`), but no GPU and no driver. Some things cannot
be seen this way: XLA does not measure which kernel is fastest, cuDNN does not check whether it supports a shape, and
the buffers of NCCL are not counted.
"""

import functools
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # JAX 0.11 refuses to load its plugin without a driver

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from nanochat_jax.parallel import devices, sharding

GIB = 2**30
# The kind of GPU that XLA compiles for, as a GpuTargetConfigProto.
H100 = Path(__file__).with_name("h100.txtpb")
CAPABILITY, CUDNN_VERSION = "9.0", 92801


@functools.cache
def h100s(count: int) -> list[Any]:
    """Descriptions of `count` H100s in one host."""
    topology = topologies.get_topology_desc("h100", "cuda", target_config=H100.read_text(), topology=f"1x1x{count}")
    return list(topology.devices)


def mesh_of_h100s(node: int = 1, data: int = 1, model: int = 1) -> Mesh:
    shape = (node, data, model)
    places = np.array(h100s(math.prod(shape))).reshape(shape)
    return Mesh(places, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def pretend_hopper(monkeypatch) -> None:
    """Tells JAX's cuDNN attention which GPU and which cuDNN it is lowered for. Otherwise, it would ask the driver."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: CUDNN_VERSION)
    monkeypatch.setattr(fused, "check_compute_capability", lambda wanted: float(wanted) <= float(CAPABILITY))
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda wanted: wanted == CAPABILITY)


@dataclass(frozen=True)
class Compiled:
    """A program for one or more H100s."""

    text: str  # the scheduled HLO
    arguments: float  # GiB on each device
    temporaries: float  # GiB on each device
    peak: float  # GiB on each device: arguments, results and temporaries

    def lines(self, pattern: str) -> list[str]:
        return [line.strip() for line in self.text.splitlines() if re.search(pattern, line)]

    def sorts(self, width: int) -> list[str]:
        """Sorts of rows that have at least `width` entries."""
        return [line for line in self.lines(r"\bsort\(") if max(_dims(line), default=0) >= width]

    def products(self, dtype: str, elements: int) -> list[str]:
        """Matrix products with an operand of this dtype that has at least `elements` elements."""
        found = []
        for line in self.lines(r"\b(dot|custom-call)\("):
            if " dot(" not in line and "gemm" not in line and "matmul" not in line:
                continue
            operands = re.findall(rf"\b{dtype}\[([0-9,]*)\]", line.split("(", 1)[1])
            found += [line for dims in operands if math.prod(map(int, filter(None, dims.split(",")))) >= elements]
        return found

    def loop_bodies(self) -> str:
        """The text of all computations that are the body of a loop."""
        bodies = set(re.findall(r"body=(%?[\w.-]+)", self.text))
        parts = re.split(r"\n(?=%|ENTRY)", self.text)
        return "\n".join(part for part in parts if part.split(" ", 1)[0] in bodies)

    def collectives(self, kind: str) -> list[str]:
        return self.lines(rf"\b{kind}(-start)?\(")


def _dims(line: str) -> list[int]:
    return [int(n) for dims in re.findall(r"\w+\[([0-9,]+)\]", line) for n in dims.split(",")]


def compile_for(function: Any, *args: Any, **static: Any) -> Compiled:
    """Compiles a jitted function for the H100s on which its arguments' shardings lie."""
    lowered = function.trace(*args, **static).lower(lowering_platforms=("cuda",))
    compiled = lowered.compile(compiler_options=compiler_options())
    used = compiled.memory_analysis()
    peak = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes + used.temp_size_in_bytes
    return Compiled(compiled.as_text(), used.argument_size_in_bytes / GIB, used.temp_size_in_bytes / GIB, peak / GIB)


def compiler_options() -> dict[str, str]:
    """The flags that a run on GPUs sets (see `devices.set_gpu_defaults`)."""
    return dict(flag.removeprefix("--").split("=") for flag in devices.XLA_GPU_FLAGS)


def shapes(tree: Any, shardings: Any) -> Any:
    """The shapes of `tree`, with one sharding for all arrays or one for each."""
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings), tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
