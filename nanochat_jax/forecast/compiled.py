"""Compiles jitted functions for GPUs that are not there.

This needs XLA's compiler for NVIDIA GPUs (the extra aot or cuda13), but no GPU and no driver. Some things cannot be
seen this way: XLA does not measure which kernel is fastest, cuDNN does not check whether it supports a shape, and the
buffers of cuDNN and NCCL are not counted.
"""

import contextlib
import importlib.util
import os
import time
from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from nanochat_jax.config import UserError, first_line
from nanochat_jax.engine import cache as kv
from nanochat_jax.forecast.card import Target
from nanochat_jax.forecast.hlo import Program
from nanochat_jax.model import attention
from nanochat_jax.parallel import devices, sharding
from nanochat_jax.training.run import peak_memory

GIB = 2**30
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
INSTALL = "bash setup.sh aot"


@dataclass(frozen=True)
class Compiled:
    """A program for one or more GPUs. Sizes are bytes on each of them."""

    text: str  # the scheduled HLO
    devices: int
    arguments: int
    temporaries: int
    peak: int  # arguments, results and temporaries
    seconds: float  # that lowering and compiling took

    @cached_property
    def program(self) -> Program:
        return Program(self.text, self.devices)


def check_compiler() -> None:
    """Raises UserError if XLA's compiler for NVIDIA GPUs is not installed."""
    if not any(importlib.util.find_spec(name) for name in PLUGINS):
        raise UserError(f"--target needs XLA's compiler for GPUs, but neither a GPU nor a driver: run '{INSTALL}'")


def without_driver() -> None:
    """Sets environment variables so that JAX uses the CPU, and loads its CUDA plugin on a machine without a driver.

    Call this before JAX is used.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault(*devices.NO_DRIVER)


@contextlib.contextmanager
def pretending(target: Target, kernel: str = "cudnn") -> Generator[None]:
    """Within this context, functions are traced as they would be on the target's GPUs.

    JAX's cuDNN attention would ask the driver for the GPU and for the version of cuDNN, `attention` would try cuDNN,
    and the cache's dtype would be the CPU's. `kernel` is the attention kernel, "cudnn" or "xla".
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    capability = target.card.capability
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (fused, "check_cudnn_version", lambda: target.card.cudnn),
            (fused, "check_compute_capability", lambda wanted: float(wanted) <= float(capability)),
            (fused, "is_cuda_compute_capability_equal", lambda wanted: wanted == capability),
            (attention, "_chosen", kernel),
            (kv, "dtype_for", jnp.dtype),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def mesh_of(target: Target, spec: str = "") -> Mesh:
    """Arranges the target's GPUs in a mesh. `spec` is the value of --mesh.

    Raises UserError if XLA cannot read its description of the card, or if `spec` does not fit the number of GPUs.
    """
    per_node = target.count // target.nodes
    try:
        topology = topologies.get_topology_desc(
            "target", "cuda", target_config=target.card.xla, topology=f"1x{target.nodes}x{per_node}"
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--target: XLA cannot read the description of {target.card.name}: {first_line(error)}"
        ) from None
    return sharding.make_mesh(spec, np.array(topology.devices))


def compile_for(function: Any, *args: Any, **static: Any) -> Compiled:
    """Compiles a jitted function for the GPUs on which its arguments' shardings lie."""
    start = time.perf_counter()
    lowered = function.trace(*args, **static).lower(lowering_platforms=("cuda",))
    compiled = lowered.compile(compiler_options=compiler_options())
    used = compiled.memory_analysis()
    meshes = [x.sharding.mesh.size for x in jax.tree.leaves(args) if hasattr(getattr(x, "sharding", None), "mesh")]
    return Compiled(
        compiled.as_text(), max(meshes, default=1), used.argument_size_in_bytes, used.temp_size_in_bytes,
        peak_memory(compiled), time.perf_counter() - start,
    )  # fmt: skip


def compiler_options() -> dict[str, str]:
    """The flags that a run on GPUs sets (see `devices.set_gpu_defaults`)."""
    parts = [flag.removeprefix("--").partition("=") for flag in devices.XLA_GPU_FLAGS]
    return {name: value for name, _, value in parts}


def shapes(tree: Any, shardings: Any) -> Any:
    """The shapes of `tree`, with one sharding for all arrays or one for each."""
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings), tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
