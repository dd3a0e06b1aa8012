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

PerDevice = Callable[[Callable, tuple[jax.Array, ...], tuple[jax.Array, ...]], Any]
Pair = tuple[jax.Array, jax.Array]


def can_compute(model_cfg: GPTConfig, tokens: int) -> bool:
    """Whether the kernels can compute the model's blocks for this many tokens on each device."""
    k = model_cfg.head_dim
    return k & (k - 1) == 0 and matmul.fits(tokens, model_cfg.n_embd, 4 * model_cfg.n_embd)


def _either(kernel: Callable, twin: Callable) -> Callable:
    """Returns a function that is the kernel in programs for NVIDIA GPUs, and its plain twin in all others."""

    def compute(*arrays: jax.Array, **settings: float) -> Any:
        return jax.lax.platform_dependent(
            *arrays, cuda=functools.partial(kernel, **settings), default=functools.partial(twin, **settings)
        )

    return compute


add_norm = _either(rows.add_norm, rows.plain_add_norm)
add_norm_backward = _either(rows.add_norm_backward, rows.plain_add_norm_backward)
rotate_norm = _either(rows.rotate_norm, rows.plain_rotate_norm)
rotate_norm_backward = _either(rows.rotate_norm_backward, rows.plain_rotate_norm_backward)
relu2 = _either(matmul.relu2, matmul.plain_relu2)
relu2_backward = _either(matmul.relu2_backward, matmul.plain_relu2_backward)


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
    """Applies one block to the residual stream x + y. Returns the new stream as a pair.

    per_device(f, (a, b), (c,)) returns f(a, b, c) for the rows of a and b that each device has, and all of c.
    """
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
        q, k, v = (_product(n1, w[name]).reshape(b, t, -1, model_cfg.head_dim) for name in ("wq", "wk", "wv"))
    with jax.named_scope("rope"):
        q, rq = per_device(functools.partial(rotate_norm, eps=eps), (q,), angles)
        k, rk = per_device(functools.partial(rotate_norm, eps=eps), (k,), angles)
    with jax.named_scope("attention"):
        o, attention_backward = jax.vjp(functools.partial(causal_attention, window=window), q, k, v)
        o = o.reshape(x.shape)
        y = _product(o, w["wo"])
    with jax.named_scope("mlp"):
        with jax.named_scope("norm"):
            x, n2, r2 = per_device(functools.partial(add_norm, eps=eps), (x, y), ())
        a = per_device(relu2, (n2,), (w["w_in"],))
        y = _product(a, w["w_out"])
    return (x, y), (n1, r1, q, rq, k, rk, attention_backward, o, n2, r2, a, w, angles)


def _backward(model_cfg: GPTConfig, window: int, per_device: PerDevice, saved: tuple, gradients: Pair) -> tuple:
    """Returns the gradients of x, of y (the same), of the weights (float32), and None for the angles."""
    n1, r1, q, rq, k, rk, attention_backward, o, n2, r2, a, w, angles = saved
    (dx, dy), dw = gradients, {}
    with jax.named_scope("mlp"):
        dh = per_device(relu2_backward, (dy, a), (w["w_out"],))
        dw["w_out"], dw["w_in"] = _weight_gradient(a, dy), _weight_gradient(n2, dh)
        dn = _product_backward(dh, w["w_in"])
        with jax.named_scope("norm"):
            dx = per_device(add_norm_backward, (dx, n2, r2, dn), ())
    with jax.named_scope("attention"):
        do = _product_backward(dx, w["wo"])
        dw["wo"] = _weight_gradient(o, dx)
        dq, dk, dv = attention_backward(do.reshape(q.shape))
    with jax.named_scope("rope"):
        dq = per_device(rotate_norm_backward, (dq, q, rq), angles)
        dk = per_device(rotate_norm_backward, (dk, k, rk), angles)
    with jax.named_scope("qkv"):
        gs = {"wq": dq.reshape(dx.shape), "wk": dk.reshape(*dx.shape[:2], -1), "wv": dv.reshape(*dx.shape[:2], -1)}
        dw |= {name: _weight_gradient(n1, g) for name, g in gs.items()}
        dns = [_product_backward(g, w[name]) for name, g in gs.items()]
        with jax.named_scope("norm"):
            dx = per_device(add_norm_backward, (dx, n1, r1, *dns), ())
    return dx, dx, dw, None


block.defvjp(_forward, _backward)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("bti,io->bto", x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def _product_backward(g: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("bto,io->bti", g, w, preferred_element_type=jnp.float32).astype(g.dtype)


def _weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.einsum("bti,bto->io", x, g, preferred_element_type=jnp.float32)
