"""Decides whether training uses the fused block. It does where a trial shows that it is right, and faster.

Whether the kernels compile and how fast they are depends on the GPU, the driver and the versions of JAX and XLA.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nanochat_jax.config import GPTConfig, first_line
from nanochat_jax.model import gpt
from nanochat_jax.model.fused.block import apply_blocks, can_compute

CAPABILITY = "9.0"  # of the H100 and the H200, for which the sizes of the kernels' blocks were chosen
# The largest relative error of a gradient. On a CPU, bf16 rounding makes up to 0.012, with the kernels and without them
# (two blocks of width 256).
LARGEST_ERROR = 0.04
FASTER = 1.02  # a smaller gain may be chance
ROWS, LAYERS = 8, 2  # of the trial


def choose(model_cfg: GPTConfig, dtype: DTypeLike, *, must_be_faster: bool = True) -> tuple[bool, str]:
    """Returns whether to use the fused block, and why. Call `attention.choose_kernel` first.

    The trial computes the gradients of two blocks with the model's width, once with the kernels and once without them.
    The block must be right and, if `must_be_faster` is set, faster.
    """
    if jax.default_backend() != "gpu":
        return False, "no NVIDIA GPU"
    if (capability := str(getattr(jax.local_devices()[0], "compute_capability", ""))) != CAPABILITY:
        return False, f"the kernels are for compute capability {CAPABILITY}, not {capability}"
    if dtype != jnp.bfloat16:
        return False, "the kernels are for bfloat16"
    if not can_compute(model_cfg, model_cfg.sequence_len):
        sizes = "a context divisible by 128, a width divisible by 64, and a head size that is a power of two"
        return False, f"the kernels need {sizes}"
    try:
        error, speed = _compare(model_cfg, dtype)
    except Exception as failure:  # any error means that the kernels cannot be used
        return False, f"the kernels failed: {first_line(failure)}"
    if not error <= LARGEST_ERROR:
        return False, f"in a trial, the kernels' gradients were wrong by {error:.2g}"
    return speed > FASTER or not must_be_faster, f"{speed:.2f} times as fast in a trial"


def alone(function: Callable, own: tuple[jax.Array, ...], shared: tuple[jax.Array, ...]) -> Any:
    """Computes function(*own, *shared) on a single device, which has all rows."""
    return function(*own, *shared)


def _compare(model_cfg: GPTConfig, dtype: DTypeLike) -> tuple[float, float]:
    """Returns the largest relative error of the fused block's gradients, and how many times as fast it is."""
    small = dataclasses.replace(model_cfg, n_layer=LAYERS, vocab_size=64)
    ids = jax.random.randint(jax.random.key(0), (ROWS, small.sequence_len), 0, small.vocab_size)
    direction = jax.random.normal(jax.random.key(1), (*ids.shape, small.n_embd))
    params = gpt.init(small)
    for i, name in enumerate(("wo", "w_out")):  # these begin as zeros, with which no gradient would reach other weights
        w = params["blocks"][name]
        params["blocks"][name] = jax.random.normal(jax.random.key(2 + i), w.shape) / w.shape[1] ** 0.5

    @functools.partial(jax.jit, static_argnums=2)
    def gradients(params: gpt.Params, ids: jax.Array, execution: gpt.Execution) -> gpt.Params:
        def loss(params: gpt.Params) -> jax.Array:
            return (gpt.hidden(params, small, ids, dtype, execution).astype(jnp.float32) * direction).sum()

        return jax.grad(loss)(params)

    results, seconds = [], []
    for execution in (gpt.PLAIN, gpt.Execution(fused=functools.partial(apply_blocks, alone))):
        results.append(jax.block_until_ready(gradients(params, ids, execution))["blocks"])
        times = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(gradients(params, ids, execution))
            times.append(time.perf_counter() - start)
        seconds.append(np.median(times))
    errors = jax.tree.map(lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)), *results)
    return max(jax.tree.leaves(errors)), seconds[0] / seconds[1]
