"""Kernels that read each row of activations once: sums with RMSNorm, rotary embeddings with RMSNorm, their gradients.

A norm returns its result n and the factor r of each row, with n = r * x. Its gradient needs nothing else: if g is the
gradient of n, then r * (g - n * mean(g * n)) is the gradient of x. So x itself is not kept for the backward pass.

Axis letters as in gpt.py. Statistics are float32, and every result is rounded once.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

f32 = jnp.float32
Ref = Any  # a block in memory that a kernel reads or writes
ROWS = 4  # how many rows of [b,t,d] one program instance computes
POSITIONS = 32  # how many positions of one head it computes


# -----------------------------------------------------------------------------
# Reference implementations


def reference_add_norm(x: jax.Array, y: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the sum s = x + y [b,t,d], its norm n [b,t,d], and the factors r, float32 [b,t]."""
    s = (x.astype(f32) + y.astype(f32)).astype(x.dtype)
    r = _factor(s.astype(f32), eps)
    return s, (s.astype(f32) * r[..., None]).astype(x.dtype), r


def reference_add_norm_backward(ds: jax.Array, n: jax.Array, r: jax.Array, *gs: jax.Array) -> jax.Array:
    """Returns the gradient of s [b,t,d]: `ds`, plus what the norm adds if the gradient of n is the sum of `gs`."""
    g = functools.reduce(jnp.add, [g.astype(f32) for g in gs])
    through_norm = _norm_backward(n.astype(f32), r[..., None], g)
    return (ds.astype(f32) + through_norm).astype(ds.dtype)


def reference_rotate_norm(x: jax.Array, cos: jax.Array, sin: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
    """Rotates x [b,t,h,k] as `gpt.rotate` does, for cos and sin [t,k/2]. Returns its norm n, and r [b,t,h]."""
    r = _factor(x.astype(f32), eps)  # a rotation does not change it
    x1, x2 = jnp.split(x.astype(f32) * r[..., None], 2, axis=-1)
    return jnp.concatenate(_rotated(x1, x2, cos[None, :, None], sin[None, :, None]), axis=-1).astype(x.dtype), r


def reference_rotate_norm_backward(
    g: jax.Array, n: jax.Array, r: jax.Array, cos: jax.Array, sin: jax.Array
) -> jax.Array:
    """Returns the gradient of x [b,t,h,k] if the gradient of n is g."""
    u1, u2 = jnp.split(_norm_backward(n.astype(f32), r[..., None], g.astype(f32)), 2, axis=-1)
    return jnp.concatenate(_rotated(u1, u2, cos[None, :, None], -sin[None, :, None]), axis=-1).astype(g.dtype)


def _factor(x: jax.Array, eps: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1) + eps)


def _norm_backward(n: jax.Array, r: jax.Array, g: jax.Array) -> jax.Array:
    return r * (g - n * jnp.mean(g * n, axis=-1, keepdims=True))


def _rotated(x1: jax.Array, x2: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x1 * cos + x2 * sin, x2 * cos - x1 * sin


# -----------------------------------------------------------------------------
# Kernels for rows of [b,t,d]. The sizes of Triton's blocks are powers of two, so a row is read as a list of blocks.


def add_norm(
    x: jax.Array, y: jax.Array, *, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The kernel of `reference_add_norm`."""

    def kernel(x_ref: Ref, y_ref: Ref, s_ref: Ref, n_ref: Ref, r_ref: Ref) -> None:
        s = [(x + y).astype(x_ref.dtype).astype(f32) for x, y in zip(_read(x_ref), _read(y_ref), strict=True)]
        r = jax.lax.rsqrt(_sum([c * c for c in s]) / x_ref.shape[1] + eps)
        _write(s_ref, s)
        _write(n_ref, [c * r for c in s])
        r_ref[...] = r[:, 0]

    row = (x.shape[-1:], x.dtype)
    s, n, r = _for_rows(kernel, [row, row, ((), f32)], interpret)(x, y)
    return s, n, r


def add_norm_backward(ds: jax.Array, n: jax.Array, r: jax.Array, *gs: jax.Array, interpret: bool = False) -> jax.Array:
    """The kernel of `reference_add_norm_backward`."""

    def kernel(ds_ref: Ref, n_ref: Ref, r_ref: Ref, *refs: Ref) -> None:
        *g_refs, out_ref = refs
        n, g = _read(n_ref), [sum(parts) for parts in zip(*map(_read, g_refs), strict=True)]
        mean = _sum([a * b for a, b in zip(g, n, strict=True)]) / n_ref.shape[1]
        r = r_ref[...][:, None]
        _write(out_ref, [c + r * (a - b * mean) for c, a, b in zip(_read(ds_ref), g, n, strict=True)])

    return _for_rows(kernel, [(ds.shape[-1:], ds.dtype)], interpret)(ds, n, r, *gs)[0]


def _for_rows(kernel: Callable, outs: list[tuple[tuple[int, ...], jnp.dtype]], interpret: bool) -> Callable:
    """Runs `kernel` on ROWS rows at a time. Its arguments are [b,t,...], and so are its results: (shape, dtype)."""

    def run(*arrays: jax.Array) -> list[jax.Array]:
        b, t = arrays[0].shape[:2]
        rows = _divisor(b * t, ROWS)

        def spec(shape: tuple[int, ...]) -> pl.BlockSpec:
            return pl.BlockSpec((rows, *shape), lambda i: (i, *[0] * len(shape)))

        results = pl.pallas_call(
            kernel,
            grid=(b * t // rows,),
            in_specs=[spec(a.shape[2:]) for a in arrays],
            out_specs=[spec(shape) for shape, _ in outs],
            out_shape=[jax.ShapeDtypeStruct((b * t, *shape), dtype) for shape, dtype in outs],
            compiler_params=triton.CompilerParams(num_warps=4),
            interpret=interpret,
        )(*[a.reshape(b * t, *a.shape[2:]) for a in arrays])
        return [x.reshape(b, t, *x.shape[1:]) for x in results]

    return run


def _divisor(n: int, most: int) -> int:
    """Returns the largest power of two that divides n and is at most `most`."""
    return min(n & -n, most)


def _read(ref: Ref) -> list[jax.Array]:
    width = _divisor(ref.shape[1], 2048)
    return [ref[:, pl.ds(i, width)].astype(f32) for i in range(0, ref.shape[1], width)]


def _write(ref: Ref, blocks: list[jax.Array]) -> None:
    width = blocks[0].shape[1]
    for i, block in enumerate(blocks):
        ref[:, pl.ds(i * width, width)] = block.astype(ref.dtype)


def _sum(blocks: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, [block.sum(axis=1, keepdims=True) for block in blocks])


# -----------------------------------------------------------------------------
# Kernels for heads of [b,t,h,k]


def rotate_norm(
    x: jax.Array, cos: jax.Array, sin: jax.Array, *, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The kernel of `reference_rotate_norm`."""

    def kernel(x_ref: Ref, cos_ref: Ref, sin_ref: Ref, n_ref: Ref, r_ref: Ref) -> None:
        x1, x2 = _halves(x_ref)
        r = jax.lax.rsqrt(((x1 * x1).sum(1) + (x2 * x2).sum(1)) / x_ref.shape[1] + eps)
        r_ref[...] = r
        _write(n_ref, list(_rotated(x1 * r[:, None], x2 * r[:, None], cos_ref[...], sin_ref[...])))

    n, r = _for_heads(kernel, [x], [cos, sin], [True, False], interpret)
    return n, r


def rotate_norm_backward(
    g: jax.Array, n: jax.Array, r: jax.Array, cos: jax.Array, sin: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """The kernel of `reference_rotate_norm_backward`."""

    def kernel(g_ref: Ref, n_ref: Ref, r_ref: Ref, cos_ref: Ref, sin_ref: Ref, out_ref: Ref) -> None:
        g1, g2 = _halves(g_ref)
        n1, n2 = _halves(n_ref)
        r, mean = r_ref[...][:, None], (((g1 * n1).sum(1) + (g2 * n2).sum(1)) / g_ref.shape[1])[:, None]
        u1, u2 = r * (g1 - n1 * mean), r * (g2 - n2 * mean)
        _write(out_ref, list(_rotated(u1, u2, cos_ref[...], -sin_ref[...])))

    return _for_heads(kernel, [g, n, r], [cos, sin], [True], interpret)[0]


def _halves(ref: Ref) -> tuple[jax.Array, jax.Array]:
    half = ref.shape[1] // 2
    return ref[:, pl.ds(0, half)].astype(f32), ref[:, pl.ds(half, half)].astype(f32)


def _for_heads(
    kernel: Callable, heads: list[jax.Array], tables: list[jax.Array], whole: list[bool], interpret: bool
) -> list[jax.Array]:
    """Runs `kernel` on POSITIONS positions of one head at a time.

    `heads` are [b,t,h,k] or [b,t,h], and `tables` [t,k/2]. A result is [b,t,h,k] in the dtype of the first array if its
    entry in `whole` is true, and float32 [b,t,h] otherwise.
    """
    b, t, h, k = heads[0].shape
    rows = _divisor(t, POSITIONS)

    def spec(x: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        return pl.BlockSpec((rows, None, *x.shape[2:]), lambda i, j: (i, j, *[0] * len(x.shape[2:])))

    table = pl.BlockSpec((rows, k // 2), lambda i, _: (i % (t // rows), 0))
    flat = [a.reshape(b * t, *a.shape[2:]) for a in heads]
    outs = [
        jax.ShapeDtypeStruct((b * t, h, k), flat[0].dtype) if full else jax.ShapeDtypeStruct((b * t, h), f32)
        for full in whole
    ]
    results = pl.pallas_call(
        kernel,
        grid=(b * t // rows, h),
        in_specs=[*map(spec, flat), *[table] * len(tables)],
        out_specs=list(map(spec, outs)),
        out_shape=outs,
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
    )(*flat, *tables)
    return [x.reshape(b, t, *x.shape[1:]) for x in results]
