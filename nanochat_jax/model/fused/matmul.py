"""A matmul kernel that ends with ReLU^2, or with its derivative, so that no other kernel reads its result for that.

Of a = relu(h)^2, only `a` is kept. The derivative of a is 2 * relu(h), which is 2 * sqrt(a). (The idea is from
modded-nanogpt, where a kernel like this one saved 1% to 2% of the time of a step.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

f32 = jnp.float32
# A program computes [M, N] of the result, K numbers of the inner axis at a time. Neighbouring programs share GROUP
# blocks of rows, which then stay in the L2 cache. These sizes are usual for Triton on an H100: three stages of them
# take 144 KiB of its 228 KiB of shared memory.
M, N, K, GROUP, STAGES, WARPS = 128, 256, 64, 8, 3, 8


def plain_relu2(x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns relu(x @ w)^2: [b,t,i] @ [i,o] -> [b,t,o]."""
    h = jnp.einsum("bti,io->bto", x, w, preferred_element_type=f32)
    return jnp.square(jnp.maximum(h, 0)).astype(x.dtype)


def plain_relu2_backward(g: jax.Array, a: jax.Array, w: jax.Array) -> jax.Array:
    """Returns the gradient of h [b,t,i], if a [b,t,i] is relu(h)^2 and g [b,t,o] is the gradient of a @ w, w [i,o]."""
    da = jnp.einsum("bto,io->bti", g, w, preferred_element_type=f32)
    return (da * (2 * jnp.sqrt(a.astype(f32)))).astype(g.dtype)


def relu2(x: jax.Array, w: jax.Array, *, interpret: bool = False) -> jax.Array:
    """The kernel of `plain_relu2`."""
    return _matmul(x, w, None, False, lambda h, _: jnp.square(jnp.maximum(h, 0)), interpret)


def relu2_backward(g: jax.Array, a: jax.Array, w: jax.Array, *, interpret: bool = False) -> jax.Array:
    """The kernel of `plain_relu2_backward`."""
    return _matmul(g, w, a, True, lambda da, a: da * (2 * jnp.sqrt(a)), interpret)


def fits(rows: int, inner: int, outer: int) -> bool:
    """Whether the kernel can multiply [rows, inner] by [inner, outer]: its blocks must divide these arrays."""
    return rows % M == 0 and inner % K == 0 and outer % N == 0


def _matmul(
    x: jax.Array, w: jax.Array, extra: jax.Array | None, transposed: bool, end: Callable, interpret: bool
) -> jax.Array:
    """Returns end(x @ w, extra) for x [b,t,i], w [i,o] (or w [o,i], if `transposed`) and `extra` [b,t,o]."""
    b, t, i = x.shape
    o = w.shape[0 if transposed else 1]
    assert fits(b * t, i, o), f"[{b * t}, {i}] @ [{i}, {o}] is not made of blocks of {M}, {K} and {N}"
    m_blocks, n_blocks = b * t // M, o // N
    group = next(g for g in (GROUP, 4, 2, 1) if m_blocks % g == 0)

    def place(p: jax.Array) -> tuple[jax.Array, jax.Array]:  # the p-th program's block of rows and of columns
        return p // (group * n_blocks) * group + p % group, p % (group * n_blocks) // group

    def kernel(*refs):
        x_ref, w_ref, *extra_ref, out_ref = refs

        def add(step: jax.Array, total: jax.Array) -> jax.Array:
            part = pl.ds(step * K, K)
            return total + triton.dot(x_ref[:, part], w_ref[:, part] if transposed else w_ref[part], trans_b=transposed)

        total = jax.lax.fori_loop(0, i // K, add, jnp.zeros((M, N), f32))
        out_ref[...] = end(total, extra_ref[0][...].astype(f32) if extra_ref else None).astype(out_ref.dtype)

    tile = pl.BlockSpec((M, N), place)
    weight = (
        pl.BlockSpec((N, i), lambda p: (place(p)[1], 0))
        if transposed
        else pl.BlockSpec((i, N), lambda p: (0, place(p)[1]))
    )
    result = pl.pallas_call(
        kernel,
        grid=(m_blocks * n_blocks,),
        in_specs=[pl.BlockSpec((M, i), lambda p: (place(p)[0], 0)), weight, *[tile] * (extra is not None)],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct((b * t, o), x.dtype),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
    )(x.reshape(b * t, i), w, *[] if extra is None else [extra.reshape(b * t, o)])
    return result.reshape(b, t, o)
