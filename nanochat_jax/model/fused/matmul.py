"""A matmul kernel with ReLU^2, or its derivative, as epilogue, so that no other kernel reads the result for that.

Of a = relu(h)^2, only `a` is kept. The derivative of a is 2 * relu(h), which is 2 * sqrt(a). (The idea is from
modded-nanogpt, where a kernel like this one saved 1% to 2% of the time of a step.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

f32 = jnp.float32
# Each program instance computes a block [BLOCK_M, BLOCK_N] of the result. It reads BLOCK_K numbers of the inner axis at
# a time. Neighbouring instances share GROUP_M blocks of rows, which then stay in the L2 cache. These sizes are usual
# for Triton on an H100: three stages of them take 144 KiB of its 228 KiB of shared memory.
BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, NUM_STAGES, NUM_WARPS = 128, 256, 64, 8, 3, 8


def reference_relu2(x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns relu(x @ w)^2: [b,t,i] @ [i,o] -> [b,t,o]."""
    h = jnp.einsum("bti,io->bto", x, w, preferred_element_type=f32)
    return jnp.square(jnp.maximum(h, 0)).astype(x.dtype)


def reference_relu2_backward(g: jax.Array, a: jax.Array, w: jax.Array) -> jax.Array:
    """Returns the gradient of h [b,t,i], if a [b,t,i] is relu(h)^2 and g [b,t,o] is the gradient of a @ w, w [i,o]."""
    da = jnp.einsum("bto,io->bti", g, w, preferred_element_type=f32)
    return (da * (2 * jnp.sqrt(a.astype(f32)))).astype(g.dtype)


def relu2(x: jax.Array, w: jax.Array, *, interpret: bool = False) -> jax.Array:
    """The kernel of `reference_relu2`."""
    return _matmul(x, w, None, False, lambda h, _: jnp.square(jnp.maximum(h, 0)), interpret)


def relu2_backward(g: jax.Array, a: jax.Array, w: jax.Array, *, interpret: bool = False) -> jax.Array:
    """The kernel of `reference_relu2_backward`."""
    return _matmul(g, w, a, True, lambda da, a: da * (2 * jnp.sqrt(a)), interpret)


def fits(rows: int, inner: int, outer: int) -> bool:
    """Whether the kernel can multiply [rows, inner] by [inner, outer]: its blocks must divide these arrays."""
    return rows % BLOCK_M == 0 and inner % BLOCK_K == 0 and outer % BLOCK_N == 0


def _matmul(
    x: jax.Array, w: jax.Array, epilogue_input: jax.Array | None, transposed: bool, epilogue: Callable, interpret: bool
) -> jax.Array:
    """Returns epilogue(x @ w, epilogue_input) for x [b,t,i], w [i,o] and `epilogue_input` [b,t,o].

    If `transposed` is set, w is [o,i].
    """
    b, t, i = x.shape
    o = w.shape[0 if transposed else 1]
    assert fits(b * t, i, o), f"[{b * t}, {i}] @ [{i}, {o}] is not made of blocks of {BLOCK_M}, {BLOCK_K} and {BLOCK_N}"
    m_blocks, n_blocks = b * t // BLOCK_M, o // BLOCK_N
    group = next(g for g in (GROUP_M, 4, 2, 1) if m_blocks % g == 0)

    def place(
        p: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:  # the blocks of rows and columns of the p-th program instance
        return p // (group * n_blocks) * group + p % group, p % (group * n_blocks) // group

    def kernel(*refs):
        x_ref, w_ref, *epilogue_ref, out_ref = refs

        def add(step: jax.Array, total: jax.Array) -> jax.Array:
            part = pl.ds(step * BLOCK_K, BLOCK_K)
            return total + triton.dot(x_ref[:, part], w_ref[:, part] if transposed else w_ref[part], trans_b=transposed)

        total = jax.lax.fori_loop(0, i // BLOCK_K, add, jnp.zeros((BLOCK_M, BLOCK_N), f32))
        out_ref[...] = epilogue(total, epilogue_ref[0][...].astype(f32) if epilogue_ref else None).astype(out_ref.dtype)

    tile = pl.BlockSpec((BLOCK_M, BLOCK_N), place)
    weight = (
        pl.BlockSpec((BLOCK_N, i), lambda p: (place(p)[1], 0))
        if transposed
        else pl.BlockSpec((i, BLOCK_N), lambda p: (0, place(p)[1]))
    )
    result = pl.pallas_call(
        kernel,
        grid=(m_blocks * n_blocks,),
        in_specs=[
            pl.BlockSpec((BLOCK_M, i), lambda p: (place(p)[0], 0)),
            weight,
            *[tile] * (epilogue_input is not None),
        ],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct((b * t, o), x.dtype),
        compiler_params=triton.CompilerParams(num_warps=NUM_WARPS, num_stages=NUM_STAGES),
        interpret=interpret,
    )(x.reshape(b * t, i), w, *[] if epilogue_input is None else [epilogue_input.reshape(b * t, o)])
    return result.reshape(b, t, o)
