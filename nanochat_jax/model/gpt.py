"""A decoder-only transformer: its modules, its initialisation and its forward pass.

The model has rotary embeddings, QK-norm, grouped-query attention, a ReLU^2 MLP, RMSNorm without gains, and an untied
head. It has no biases. The logits are soft-capped at 15. The modules are written in Flax NNX. Other files see only a
nested dict of parameter arrays, and pure functions that take this dict. `jax.jit`, `jax.grad` and optax can use the
dict directly.

Axis letters in all files: b = batch, t = query time, s = key time, d = model, h = query head, n = kv head, k = head
dim, f = ffn, v = vocab, l = layer. For each weight of a block, such as wq, one array [l, in, out] holds the matrices of
all layers. So the optimizer can orthogonalise these matrices as one batch, and the model has only eight parameter
arrays.

The example shapes are for a model of depth 20 with 32 rows per device: b = 32, t = 2048, d = 1280, h = n = 10, k = 128,
f = 5120, v = 65536, l = 20.

Precision: The master weights are float32. Matmul operands have the compute dtype, and their products are summed in
float32. Norm statistics, softmax and logits are float32. The rotary table and the rotation are float32. In the original
nanochat, the rotary table is bf16, which causes errors of 1e-3 in the logits.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.model.attention import cached_attention, causal_attention
from nanochat_jax.model.precision import accum_dtype

Params = dict[str, Any]  # a nested dict of arrays, as returned by `init`
Weights = dict[str, jax.Array]  # name -> weight: [l, in, out] for all blocks, or [in, out] for one block
Cache = dict[str, Any]  # {"k": list of l arrays [b,n,s,k], "v": like "k", "length": int32 [b]}


@dataclass(frozen=True)
class Execution:
    """Settings for forward passes without a cache. They affect speed and memory use, but not the results."""

    scan: bool = False  # whether jax.lax.scan loops over the layers: faster to compile, but slower to run
    remat_policy: Callable | None = None  # a jax.checkpoint policy; None keeps all activations for the backward pass
    gather: Callable[[str, jax.Array], jax.Array] = lambda name, w: w  # all-gathers a sharded weight just before use
    whole: Callable[[jax.Array], jax.Array] = lambda x: x  # keeps the residual stream unsharded over the model axis
    # Applies all blocks to x in another way, or returns None if it cannot: see `apply_blocks` in fused/block.py.
    fused: Callable[[jax.Array, list[Weights], tuple[jax.Array, jax.Array], GPTConfig], jax.Array | None] | None = None


PLAIN = Execution()


# -----------------------------------------------------------------------------
# Pieces


MATMUL = "matmul"  # jax.checkpoint policies refer to the results of `dense` by this name


def dense(x: jax.Array, w: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns x @ w in `dtype`: [b,t,i] @ [i,o] -> [b,t,o]."""
    return checkpoint_name(_dense(x, w, dtype), MATMUL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense(x: jax.Array, w: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns x @ w. All matmul operands are cast to `dtype`, in the backward pass as well.

    Plain autodiff would pass float32 cotangents to the two matmuls of the backward pass. Then these matmuls could not
    use the fast bf16 kernels of GPUs and CPUs.
    """
    return matmul(x.astype(dtype), w.astype(dtype))


def _dense_forward(x: jax.Array, w: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dense(x, w, dtype), (x, w)


def _dense_backward(dtype: DTypeLike, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    g = g.astype(dtype)
    return input_gradient(g, w.astype(dtype)).astype(x.dtype), weight_gradient(x.astype(dtype), g).astype(w.dtype)


_dense.defvjp(_dense_forward, _dense_backward)


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns x @ w, summed in float32 and rounded to x's dtype: [b,t,i] @ [i,o] -> [b,t,o]."""
    return jnp.einsum("bti,io->bto", x, w, preferred_element_type=accum_dtype(x.dtype)).astype(x.dtype)


def input_gradient(g: jax.Array, w: jax.Array) -> jax.Array:
    """Returns the gradient of x [b,t,i] in g's dtype, if g [b,t,o] is the gradient of x @ w, w [i,o]."""
    return jnp.einsum("bto,io->bti", g, w, preferred_element_type=accum_dtype(g.dtype)).astype(g.dtype)


def weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """Returns the gradient of w [i,o] in float32, if g [b,t,o] is the gradient of x @ w, x [b,t,i]."""

    def gradient(x: jax.Array, g: jax.Array) -> jax.Array:
        # If b and t were flattened before this contraction, XLA:CPU would not use its fast matmul.
        return jnp.einsum("bti,bto->io", x, g, preferred_element_type=accum_dtype(x.dtype))

    def on_cpu(x: jax.Array, g: jax.Array) -> jax.Array:
        # XLA:CPU transposes the first operand in memory, so the narrower one comes first. Without the barrier, XLA
        # would swap the operands back.
        return gradient(x, g) if x.shape[-1] <= g.shape[-1] else jax.lax.optimization_barrier(gradient(g, x)).T

    return jax.lax.platform_dependent(x, g, cpu=on_cpu, default=gradient)


@jax.named_scope("norm")
def norm(x: jax.Array, eps: float) -> jax.Array:
    """Applies RMSNorm over the last axis, without a gain. The statistics are float32."""
    y = x.astype(accum_dtype(x.dtype))
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def rotary(positions: jax.Array, model_cfg: GPTConfig) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and the sines of the rotary angles at integer positions [...], each float32 [..., 1, k/2]."""
    half = model_cfg.head_dim // 2
    frequency = model_cfg.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.multiply.outer(positions.astype(jnp.float32), frequency)[..., None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """In each head of x [b,t,h,k], rotates the pairs (j, j + k/2) by *minus* the angle.

    The checkpoints of the original nanochat expect this direction.
    """
    x1, x2 = jnp.split(x.astype(accum_dtype(x.dtype)), 2, axis=-1)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1).astype(x.dtype)


# -----------------------------------------------------------------------------
# The model


class Blocks(nnx.Module):
    """The weights of all transformer blocks, stacked over layers. The docstring of `init` lists them."""

    def __init__(self, model_cfg: GPTConfig, rngs: nnx.Rngs):
        l, d, q, kv = model_cfg.n_layer, model_cfg.n_embd, model_cfg.n_embd, model_cfg.n_kv_head * model_cfg.head_dim

        def uniform(*shape: int) -> nnx.Param:  # standard deviation 1/sqrt(d)
            bound = (3 / d) ** 0.5
            return nnx.Param(jax.random.uniform(rngs(), (l, *shape), jnp.float32, -bound, bound))

        self.wq, self.wk, self.wv = uniform(d, q), uniform(d, kv), uniform(d, kv)
        self.wo = nnx.Param(jnp.zeros((l, q, d)))
        self.w_in = uniform(d, 4 * d)
        self.w_out = nnx.Param(jnp.zeros((l, 4 * d, d)))


class GPT(nnx.Module):
    """The embedding, the blocks and the head. The docstring of `init` lists their weights."""

    def __init__(self, model_cfg: GPTConfig, rngs: nnx.Rngs):
        self.model_cfg = model_cfg
        self.wte = nnx.Param(jax.random.normal(rngs(), (model_cfg.padded_vocab, model_cfg.n_embd)))
        self.lm_head = nnx.Param(jax.random.normal(rngs(), (model_cfg.padded_vocab, model_cfg.n_embd)) * 0.001)
        self.blocks = Blocks(model_cfg, rngs)

    def __call__(
        self, ids: jax.Array, dtype: DTypeLike, cache: Cache | None = None, execution: Execution = PLAIN
    ) -> tuple[jax.Array, Cache | None]:
        """Returns the hidden states [b,t,d] after the final norm, and the cache extended by the new keys and values.

        Without a cache, the second value is None. Raises UserError if the rows of ids [b,t] do not fit in the context.
        """
        model_cfg, b, t = self.model_cfg, *ids.shape
        if t > model_cfg.sequence_len:
            raise UserError(f"a row has {t} tokens, but the context holds only {model_cfg.sequence_len}")
        start = jnp.zeros(b, jnp.int32) if cache is None else cache["length"]
        angles = rotary(start[:, None] + jnp.arange(t)[None], model_cfg)
        # The embeddings are cast after the lookup, so that the gradients of each embedding are summed in float32. The
        # embedding of a frequent token gets thousands of gradients.
        with jax.named_scope("embedding"):
            x = norm(execution.gather("wte", self.wte[...])[ids].astype(dtype), model_cfg.norm_eps)
        stacked = {name: getattr(self.blocks, name)[...] for name in BLOCK_WEIGHTS}
        if cache is None:
            x = _apply_blocks(x, stacked, angles, model_cfg, execution)
            with jax.named_scope("final_norm"):
                return norm(x, model_cfg.norm_eps), None
        keys, values = [], []
        weights = _unstack(stacked)
        for i, window in enumerate(model_cfg.windows):
            with jax.named_scope(f"block{i}"):
                q, k, v = _qkv(x, weights[i], angles, model_cfg)
                with jax.named_scope("attention"):
                    keys.append(_write(cache["k"][i], k, start))
                    values.append(_write(cache["v"][i], v, start))
                    y = cached_attention(q, keys[i], values[i], start, window)
                x = _rest_of_block(x, y, weights[i], model_cfg)
        return norm(x, model_cfg.norm_eps), {"k": keys, "v": values, "length": start + t}


BLOCK_WEIGHTS = ("wq", "wk", "wv", "wo", "w_in", "w_out")

# For each weight, the mesh axes over which its array axes are sharded. "model" shards the attention heads, the MLP's
# hidden width, the vocabulary of lm_head and the width of wte. This is tensor parallelism as in Megatron
# (arXiv:1909.08053). "data" shards the other axis of each matrix. Gradients and optimizer state are always sharded over
# "data", but weights are sharded over it only with --shard=full. An array axis is sharded only if its length is a
# multiple of the mesh axis's size (see sharding.py).
SHARDING = {
    "wte": P("data", "model"),  # [vocabulary, width]
    "lm_head": P("model", "data"),  # [vocabulary, width]
    "wq": P(None, "data", "model"),  # [layer, width, query heads]
    "wk": P(None, "data", "model"),  # [layer, width, kv heads]
    "wv": P(None, "data", "model"),  # [layer, width, kv heads]
    "wo": P(None, "model", "data"),  # [layer, query heads, width]
    "w_in": P(None, "data", "model"),  # [layer, width, hidden width]
    "w_out": P(None, "model", "data"),  # [layer, hidden width, width]
}


def _unstack(stacked: Weights) -> list[Weights]:
    """Splits stacked weights [l, in, out] by layer. Returns one dict of weights [in, out] per layer."""
    layers = {name: jnp.unstack(w) for name, w in stacked.items()}
    return [dict(zip(layers, ws, strict=True)) for ws in zip(*layers.values(), strict=True)]


def _qkv(
    x: jax.Array, w: Weights, angles: tuple[jax.Array, jax.Array], model_cfg: GPTConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns q [b,t,h,k], k [b,t,n,k] and v [b,t,n,k] for x [b,t,d]. Both q and k are rotated, and then normalised."""
    b, t, _ = x.shape
    with jax.named_scope("qkv"):
        y = norm(x, model_cfg.norm_eps)
        q = dense(y, w["wq"], x.dtype).reshape(b, t, model_cfg.n_head, model_cfg.head_dim)
        k = dense(y, w["wk"], x.dtype).reshape(b, t, model_cfg.n_kv_head, model_cfg.head_dim)
        v = dense(y, w["wv"], x.dtype).reshape(b, t, model_cfg.n_kv_head, model_cfg.head_dim)
    with jax.named_scope("rope"):
        return norm(rotate(q, *angles), model_cfg.norm_eps), norm(rotate(k, *angles), model_cfg.norm_eps), v


def _rest_of_block(x: jax.Array, y: jax.Array, w: Weights, model_cfg: GPTConfig) -> jax.Array:
    """Projects the attention output y [b,t,h,k] and adds it to the residual stream x [b,t,d]. Then applies the MLP."""
    with jax.named_scope("attention"):
        x = x + dense(y.reshape(x.shape), w["wo"], x.dtype)
    with jax.named_scope("mlp"):
        y = dense(norm(x, model_cfg.norm_eps), w["w_in"], x.dtype)
        return x + dense(jnp.square(jax.nn.relu(y)), w["w_out"], x.dtype)


def _apply_blocks(
    x: jax.Array, stacked: Weights, angles: tuple[jax.Array, jax.Array], model_cfg: GPTConfig, execution: Execution
) -> jax.Array:
    """Applies all blocks to whole sequences: x [b,t,d] -> [b,t,d]."""

    if execution.fused is not None:
        fused = execution.fused(x, _unstack(stacked), angles, model_cfg)
        if fused is not None:
            return fused

    def compute(x: jax.Array, w: Weights, window: int) -> jax.Array:
        x, w = execution.whole(x), {name: execution.gather(name, layer) for name, layer in w.items()}
        q, k, v = _qkv(x, w, angles, model_cfg)
        with jax.named_scope("attention"):
            y = causal_attention(q, k, v, window)
        return _rest_of_block(x, y, w, model_cfg)

    block = compute
    if execution.remat_policy is not None:
        block = jax.checkpoint(compute, policy=execution.remat_policy, static_argnums=2)
    if not execution.scan:
        # A Python loop runs faster than a scan. A scan would copy each layer's weights out of a stacked array, and
        # would copy each layer's gradients into another stacked array.
        for i, (w, window) in enumerate(zip(_unstack(stacked), model_cfg.windows, strict=True)):
            with jax.named_scope(f"block{i}"):
                x = block(x, w, window)
        return x
    # The attention kernel needs its window as a compile-time constant, but the windows differ between layers. So each
    # scan iteration applies `period` blocks, after which the pattern of windows repeats.
    l, windows = model_cfg.n_layer, model_cfg.windows
    period = next(p for p in range(1, l + 1) if l % p == 0 and windows == windows[:p] * (l // p))

    def blocks(x: jax.Array, ws: Weights) -> tuple[jax.Array, None]:
        for i in range(period):
            x = block(x, {name: w[i] for name, w in ws.items()}, model_cfg.windows[i])
        return x, None

    periods = {name: w.reshape(-1, period, *w.shape[1:]) for name, w in stacked.items()}
    return jax.lax.scan(blocks, x, periods)[0]


def _write(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Writes `new` [b,t,n,k] into `cache` [b,n,s,k]. In row i, the t new entries begin at position start[i]."""
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
    return jax.vmap(put)(cache, jnp.swapaxes(new, 1, 2).astype(cache.dtype), start)


# -----------------------------------------------------------------------------
# Pure functions of the parameters


def init(model_cfg: GPTConfig, seed: int = 42) -> Params:
    """Returns new float32 parameters: {wte, lm_head, blocks: {wq, wk, wv, wo, w_in, w_out}}.

    weight   shape [l, in, out]   depth 20              distribution
    wte      [v, d]               [65536, 1280]         normal, standard deviation 1
    lm_head  [v, d]               [65536, 1280]         normal, standard deviation 0.001
    wq       [l, d, h*k]          [20, 1280, 1280]      uniform, standard deviation 1/sqrt(d)
    wk, wv   [l, d, n*k]          [20, 1280, 1280]      uniform, standard deviation 1/sqrt(d)
    wo       [l, h*k, d]          [20, 1280, 1280]      zeros: every block starts as the identity
    w_in     [l, d, f]            [20, 1280, 5120]      uniform, standard deviation 1/sqrt(d)
    w_out    [l, f, d]            [20, 5120, 1280]      zeros: every block starts as the identity

    f is 4d, and v is the vocabulary size padded to a multiple of 64.
    """
    return nnx.to_pure_dict(nnx.state(GPT(model_cfg, nnx.Rngs(seed)), nnx.Param))


@functools.cache
def _definition(model_cfg: GPTConfig) -> tuple[Any, ...]:
    """Returns the model without weights, as (graph definition, abstract parameters, other state)."""
    return nnx.split(nnx.eval_shape(lambda: GPT(model_cfg, nnx.Rngs(0))), nnx.Param, ...)


def bind(params: Params, model_cfg: GPTConfig) -> GPT:
    """Returns the module with `params` as its weights."""
    graphdef, abstract, rest = _definition(model_cfg)
    state = jax.tree.map(lambda leaf: leaf, abstract)  # copied, since the tree cached by `_definition` must not change
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state, rest)


def hidden(
    params: Params,
    model_cfg: GPTConfig,
    ids: jax.Array,  # int [b,t], e.g. [32, 2048]
    dtype: DTypeLike = jnp.float32,
    execution: Execution = PLAIN,
) -> jax.Array:
    """Returns the hidden states after the final norm: [b,t,d] in `dtype`, such as [32, 2048, 1280]."""
    return bind(params, model_cfg)(ids, dtype, execution=execution)[0]


def decode(
    params: Params,
    model_cfg: GPTConfig,
    ids: jax.Array,  # int [b,t], such as [64, 1] for the next token of 64 sequences
    cache: Cache,  # keys and values [b,n,s,k] of every layer, such as [64, 10, 2048, 128]
    dtype: DTypeLike = jnp.float32,
) -> tuple[jax.Array, Cache]:
    """Runs the model on `ids`, and appends their keys and values to the rows of `cache`.

    Returns the hidden states [b,t,d], such as [64, 1, 1280], and the new cache.

    The caller must ensure that cache["length"] + t <= s.
    """
    x, longer = bind(params, model_cfg)(ids, dtype, cache)
    assert longer is not None, "the model returns a cache whenever it gets one"
    return x, longer


def head(
    params: Params,
    model_cfg: GPTConfig,
    x: jax.Array,  # [..., d], e.g. [64, 1280]
) -> jax.Array:
    """Returns the soft-capped logits of hidden states x: float32 [..., vocab_size], such as [64, 65536]."""
    w = params["lm_head"].astype(x.dtype)
    return soft_capped(jnp.einsum("...d,vd->...v", x, w, preferred_element_type=accum_dtype(x.dtype)), model_cfg)


def soft_capped(z: jax.Array, model_cfg: GPTConfig) -> jax.Array:
    """Removes the vocabulary padding from z [..., v] and soft-caps the logits. Returns [..., vocab_size]."""
    return model_cfg.softcap * jnp.tanh(z[..., : model_cfg.vocab_size] / model_cfg.softcap)


def forward(
    params: Params,
    model_cfg: GPTConfig,
    ids: jax.Array,  # int [b,t], e.g. [1, 2048]
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Returns the logits of all positions: float32 [b,t,vocab_size], such as [1, 2048, 65536]."""
    return head(params, model_cfg, hidden(params, model_cfg, ids, dtype))


def cast(params: Params, dtype: DTypeLike) -> Params:
    """Returns the parameters in `dtype`, for inference."""
    return jax.tree.map(lambda p: p.astype(dtype), params)
