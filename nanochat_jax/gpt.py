"""The model: a decoder-only transformer, its initialisation, and the functions that apply it.

Rotary embeddings, QK-norm, grouped-query attention, ReLU^2 MLP, RMSNorm without gains, no biases, untied head, logits
capped softly at 15. Flax NNX defines the modules; everything outside this file sees a plain nested dict of arrays (the
parameters) and pure functions of it, so that `jax.jit`, `jax.grad` and optax need to know nothing of NNX.

Axis letters, here and everywhere: b batch, t query time, s key time, d model, h query head, n kv head, k head dim,
f ffn, v vocab, l layer. Layer weights are stacked [l, in, out]: one leaf a kind, so that the optimizer orthogonalises
them as one batch and a checkpoint has eight leaves.

Precision: float32 master weights. Matmuls take operands in the compute dtype and accumulate in float32; norm
statistics, softmax and logits are float32. The rotary table and rotation stay in float32, unlike in the specification,
whose bf16 tables cost 1e-3 in the logits.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from nanochat_jax.attention import cached_attention, causal_attention
from nanochat_jax.config import GPTConfig

Params = dict  # nested dict of arrays, as `init` makes it


# -----------------------------------------------------------------------------
# Pieces


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(x: jax.Array, w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x [b,t,i] @ w [i,o] -> [b,t,o] in `dtype`, accumulated in float32.

    With its own VJP because plain autodiff would hand float32 cotangents to the two matmuls of the backward pass,
    which then miss the fast bf16 kernels on GPUs and CPUs alike. The weight gradient is float32.
    """
    y = jnp.einsum("bti,io->bto", x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)
    return y.astype(dtype)


def _dense_forward(x, w, dtype):
    return dense(x, w, dtype), (x, w)


def _dense_backward(dtype, saved, g):
    x, w = saved
    g = g.astype(dtype)
    dx = jnp.einsum("bto,io->bti", g, w.astype(dtype), preferred_element_type=jnp.float32)
    # Contracted over (b, t) unflattened: flattening first takes XLA:CPU off its fast path.
    dw = jnp.einsum("bti,bto->io", x.astype(dtype), g, preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dw.astype(w.dtype)


dense.defvjp(_dense_forward, _dense_backward)


def norm(x: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, without gain; statistics in float32, result in x's dtype."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def rotary(positions: jax.Array, cfg: GPTConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, float32 [..., 1, k/2] for integer positions [...]."""
    half = cfg.head_dim // 2
    frequency = cfg.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.multiply.outer(positions.astype(jnp.float32), frequency)[..., None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [b,t,h,k] in the planes (j, j + k/2), by *minus* the angle, as nanochat's checkpoints expect."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1).astype(x.dtype)


# -----------------------------------------------------------------------------
# The model


class Blocks(nnx.Module):
    """The weights of all transformer blocks, stacked over layers."""

    def __init__(self, cfg: GPTConfig, rngs: nnx.Rngs):
        l, d, q, kv = cfg.n_layer, cfg.n_embd, cfg.n_embd, cfg.n_kv_head * cfg.head_dim

        def uniform(*shape):  # standard deviation 1/sqrt(d)
            bound = (3 / d) ** 0.5
            return nnx.Param(jax.random.uniform(rngs(), (l, *shape), jnp.float32, -bound, bound))

        self.wq, self.wk, self.wv = uniform(d, q), uniform(d, kv), uniform(d, kv)
        self.wo = nnx.Param(jnp.zeros((l, q, d)))  # zero: every block starts as the identity
        self.w_in = uniform(d, 4 * d)
        self.w_out = nnx.Param(jnp.zeros((l, 4 * d, d)))


class GPT(nnx.Module):
    """wte and lm_head are [v, d], v padded to a multiple of 64."""

    def __init__(self, cfg: GPTConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.wte = nnx.Param(jax.random.normal(rngs(), (cfg.padded_vocab, cfg.n_embd)))
        self.lm_head = nnx.Param(jax.random.normal(rngs(), (cfg.padded_vocab, cfg.n_embd)) * 0.001)
        self.blocks = Blocks(cfg, rngs)

    def __call__(self, ids: jax.Array, dtype: jnp.dtype, cache: dict | None = None) -> tuple[jax.Array, dict | None]:
        """ids [b,t] -> hidden states [b,t,d] after the final norm, and the cache with these tokens in it."""
        cfg, b, t = self.cfg, *ids.shape
        start = jnp.zeros(b, jnp.int32) if cache is None else cache["length"]
        cos, sin = rotary(start[:, None] + jnp.arange(t)[None], cfg)
        # Gathered before it is cast: the gradient of a frequent token is a sum of thousands, formed in float32.
        x = norm(self.wte[...][ids].astype(dtype), cfg.norm_eps)
        keys, values = [], []
        # Unrolled over layers: a scan would copy each layer's weights out of the stack and its gradients into it.
        weights = {name: jnp.unstack(getattr(self.blocks, name)[...]) for name in BLOCK_WEIGHTS}
        for i in range(cfg.n_layer):
            w = {name: layers[i] for name, layers in weights.items()}
            with jax.named_scope(f"block{i}"):
                y = norm(x, cfg.norm_eps)
                q = dense(y, w["wq"], dtype).reshape(b, t, cfg.n_head, cfg.head_dim)
                k = dense(y, w["wk"], dtype).reshape(b, t, cfg.n_kv_head, cfg.head_dim)
                v = dense(y, w["wv"], dtype).reshape(b, t, cfg.n_kv_head, cfg.head_dim)
                q = norm(rotate(q, cos, sin), cfg.norm_eps)
                k = norm(rotate(k, cos, sin), cfg.norm_eps)
                if cache is None:
                    y = causal_attention(q, k, v)
                else:
                    k = _write(cache["k"][i], k, start)
                    v = _write(cache["v"][i], v, start)
                    y = cached_attention(q, k, v, start)
                    keys.append(k)
                    values.append(v)
                x = x + dense(y.reshape(b, t, cfg.n_embd), w["wo"], dtype)
                y = dense(norm(x, cfg.norm_eps), w["w_in"], dtype)
                x = x + dense(jnp.square(jax.nn.relu(y)), w["w_out"], dtype)
        if cache is not None:
            cache = {"k": keys, "v": values, "length": start + t}
        return norm(x, cfg.norm_eps), cache


BLOCK_WEIGHTS = ("wq", "wk", "wv", "wo", "w_in", "w_out")


def _write(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """cache [b,s,n,k] with new [b,t,n,k] at positions start [b] .. start + t of each row."""
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    return jax.vmap(put)(cache, new.astype(cache.dtype), start)


# -----------------------------------------------------------------------------
# Pure functions of the parameters


def init(cfg: GPTConfig, seed: int = 42) -> Params:
    """Fresh float32 parameters: {wte, lm_head, blocks: {wq, wk, wv, wo, w_in, w_out}}."""
    return nnx.to_pure_dict(nnx.state(GPT(cfg, nnx.Rngs(seed)), nnx.Param))


@functools.cache
def _definition(cfg: GPTConfig):
    """The model without its weights: built abstractly, once a shape."""
    return nnx.split(nnx.eval_shape(lambda: GPT(cfg, nnx.Rngs(0))), nnx.Param, ...)


def bind(params: Params, cfg: GPTConfig) -> GPT:
    """The module with `params` as its weights."""
    graphdef, abstract, rest = _definition(cfg)
    state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: the cached one stays abstract
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state, rest)


def hidden(params: Params, cfg: GPTConfig, ids: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """ids [b,t] -> hidden states [b,t,d] after the final norm, in `dtype`."""
    return bind(params, cfg)(ids, dtype)[0]


def decode(params: Params, cfg: GPTConfig, ids: jax.Array, cache: dict, dtype: jnp.dtype = jnp.float32):
    """Appends ids [b,t] to the rows of `cache` -> (hidden states [b,t,d], the longer cache).

    cache = {"k": [l arrays [b,s,n,k]], "v": the same, "length": int32 [b]}. The caller keeps length + t <= s.
    """
    return bind(params, cfg)(ids, dtype, cache)


def head(params: Params, cfg: GPTConfig, x: jax.Array) -> jax.Array:
    """Hidden states [..., d] -> soft-capped logits [..., vocab_size] in float32, the padding cut off."""
    w = params["lm_head"].astype(x.dtype)
    z = jnp.einsum("...d,vd->...v", x, w, preferred_element_type=jnp.float32)[..., : cfg.vocab_size]
    return cfg.softcap * jnp.tanh(z / cfg.softcap)


def forward(params: Params, cfg: GPTConfig, ids: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """ids [b,t] -> logits [b,t,vocab_size] in float32."""
    return head(params, cfg, hidden(params, cfg, ids, dtype))


def cast(params: Params, dtype: jnp.dtype) -> Params:
    """Parameters in `dtype`, for inference."""
    return jax.tree.map(lambda p: p.astype(dtype), params)
