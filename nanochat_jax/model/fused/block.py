"""A transformer block with its backward pass written out.

It computes what the block in gpt.py computes, except for rounding. Writing both passes by hand decides what is kept for
the backward pass (10 arrays of the size of x per block, where autodiff keeps 18), and puts each elementwise operation
into the kernel next to it.

The residual stream travels as a pair (x, y), whose sum it is, so that the sum can be computed where it is normalised.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nanochat_jax.config import GPTConfig
from nanochat_jax.model.attention import causal_attention
from nanochat_jax.model.fused import matmul, rows
from nanochat_jax.model.gpt import Weights, input_gradient, weight_gradient
from nanochat_jax.model.gpt import matmul as plain_matmul

PerDevice = Callable[[Callable, tuple[jax.Array, ...], tuple[jax.Array, ...]], Any]
Pair = tuple[jax.Array, jax.Array]


def can_compute(model_cfg: GPTConfig, tokens: int) -> bool:
    """Whether the kernels can compute the model's blocks for this many tokens on each device."""
    k = model_cfg.head_dim
    return k & (k - 1) == 0 and matmul.fits(tokens, model_cfg.n_embd, 4 * model_cfg.n_embd)


def apply_blocks(
    per_device: PerDevice, x: jax.Array, weights: list[Weights], angles: Pair, model_cfg: GPTConfig
) -> jax.Array | None:
    """Applies all blocks to whole sequences: x [b,t,d] -> [b,t,d]. Returns None if the kernels cannot compute them.

    `angles` are those of `gpt.rotary` [b,t,1,k/2], and the same in all rows. per_device(f, (a, b), (c,)) returns
    f(a, b, c) for the rows of a and b that each device has, and all of c.
    """
    if not can_compute(model_cfg, x.shape[0] * x.shape[1]):
        return None
    y, table = jnp.zeros_like(x), (angles[0][0, :, 0], angles[1][0, :, 0])
    for i, (w, window) in enumerate(zip(weights, model_cfg.windows, strict=True)):
        with jax.named_scope(f"block{i}"):
            x, y = block(model_cfg, window, per_device, x, y, w, table)
    return x + y


def _either(kernel: Callable, reference: Callable) -> Callable:
    """Returns a function that runs the kernel on NVIDIA GPUs, and its reference implementation elsewhere."""

    def compute(*arrays: jax.Array, **settings: float) -> Any:
        return jax.lax.platform_dependent(
            *arrays, cuda=functools.partial(kernel, **settings), default=functools.partial(reference, **settings)
        )

    return compute


add_norm = _either(rows.add_norm, rows.reference_add_norm)
add_norm_backward = _either(rows.add_norm_backward, rows.reference_add_norm_backward)
rotate_norm = _either(rows.rotate_norm, rows.reference_rotate_norm)
rotate_norm_backward = _either(rows.rotate_norm_backward, rows.reference_rotate_norm_backward)
relu2 = _either(matmul.relu2, matmul.reference_relu2)
relu2_backward = _either(matmul.relu2_backward, matmul.reference_relu2_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def block(
    model_cfg: GPTConfig,
    window: int,
    per_device: PerDevice,
    x: jax.Array,  # [b,t,d]
    y: jax.Array,  # [b,t,d]
    w: dict[str, jax.Array],  # the weights of one block
    angles: Pair,  # cosines and sines [t,k/2]
) -> Pair:
    """Applies one block to the residual stream x + y. Returns the new stream as a pair."""
    return _forward(model_cfg, window, per_device, x, y, w, angles)[0]


def _forward(
    model_cfg: GPTConfig, window: int, per_device: PerDevice, x: jax.Array, y: jax.Array, w: dict, angles: Pair
) -> tuple[Pair, tuple]:
    """Returns the new stream, and what the backward pass needs."""
    b, t, _ = x.shape
    w = {name: a.astype(x.dtype) for name, a in w.items()}
    eps = model_cfg.norm_eps
    with jax.named_scope("qkv"):
        with jax.named_scope("norm"):
            x, n1, r1 = per_device(functools.partial(add_norm, eps=eps), (x, y), ())
        q, k, v = (plain_matmul(n1, w[name]).reshape(b, t, -1, model_cfg.head_dim) for name in ("wq", "wk", "wv"))
    with jax.named_scope("rope"):
        q, rq = per_device(functools.partial(rotate_norm, eps=eps), (q,), angles)
        k, rk = per_device(functools.partial(rotate_norm, eps=eps), (k,), angles)
    with jax.named_scope("attention"):
        o, attention_backward = jax.vjp(functools.partial(causal_attention, window=window), q, k, v)
        o = o.reshape(x.shape)
        y = plain_matmul(o, w["wo"])
    with jax.named_scope("mlp"):
        with jax.named_scope("norm"):
            x, n2, r2 = per_device(functools.partial(add_norm, eps=eps), (x, y), ())
        a = per_device(relu2, (n2,), (w["w_in"],))
        y = plain_matmul(a, w["w_out"])
    return (x, y), (n1, r1, q, rq, k, rk, attention_backward, o, n2, r2, a, w, angles)


def _backward(model_cfg: GPTConfig, window: int, per_device: PerDevice, saved: tuple, gradients: Pair) -> tuple:
    """Returns the gradients of x, of y (the same), of the weights (float32), and None for the angles."""
    n1, r1, q, rq, k, rk, attention_backward, o, n2, r2, a, w, angles = saved
    (dx, dy), dw = gradients, {}
    with jax.named_scope("mlp"):
        dh = per_device(relu2_backward, (dy, a), (w["w_out"],))
        dw["w_out"], dw["w_in"] = weight_gradient(a, dy), weight_gradient(n2, dh)
        dn = input_gradient(dh, w["w_in"])
        with jax.named_scope("norm"):
            dx = per_device(add_norm_backward, (dx, n2, r2, dn), ())
    with jax.named_scope("attention"):
        do = input_gradient(dx, w["wo"])
        dw["wo"] = weight_gradient(o, dx)
        dq, dk, dv = attention_backward(do.reshape(q.shape))
    with jax.named_scope("rope"):
        dq = per_device(rotate_norm_backward, (dq, q, rq), angles)
        dk = per_device(rotate_norm_backward, (dk, k, rk), angles)
    with jax.named_scope("qkv"):
        gs = {"wq": dq.reshape(dx.shape), "wk": dk.reshape(*dx.shape[:2], -1), "wv": dv.reshape(*dx.shape[:2], -1)}
        dw |= {name: weight_gradient(n1, g) for name, g in gs.items()}
        dns = [input_gradient(g, w[name]) for name, g in gs.items()]
        with jax.named_scope("norm"):
            dx = per_device(add_norm_backward, (dx, n1, r1, *dns), ())
    return dx, dx, dw, None


block.defvjp(_forward, _backward)
