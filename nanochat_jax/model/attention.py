"""Causal attention, over a whole sequence (for training) or over cached keys (for decoding).

Axis letters: b = batch, t = query time, s = key time, h = query head, n = key/value head, k = head dim.

A query at position p sees the keys at positions p - `window` to p, as in FlashAttention. If `window` is 0, the query
sees the keys at positions 0 to p.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nanochat_jax.config import GPTConfig, UserError, first_line
from nanochat_jax.model.precision import accum_dtype

KERNELS = ("cudnn", "xla")
HOPPER = 9.0  # compute capability
CUDNN_LIMIT = 2**31  # if the queries on one device have this many elements, cuDNN 9.27 returns wrong gradients
_chosen = "xla"  # the kernel that `causal_attention` uses; set by `choose_kernel`


def choose_kernel(
    requested: str, dtype: DTypeLike, model_cfg: GPTConfig, *, may_be_slow: bool = False
) -> tuple[str, str]:
    """Chooses the kernel that `causal_attention` will use. Returns the kernel's name and the reason for the choice.

    `requested` is the value of --attention. An empty value means cuDNN if it works, and XLA otherwise. Whether cuDNN
    works depends on its version, the GPU, the driver, and the model's heads and attention windows. Therefore this
    function tries cuDNN on a small input, with the heads and windows of `model_cfg`. Without this trial, compiling the
    training step could fail with an obscure error.

    Raises UserError if the requested kernel does not work. If no kernel is requested, and cuDNN does not work on a GPU
    of the Hopper generation or newer, also raises UserError unless `may_be_slow` is set: a long training run should not
    be slow by mistake.
    """
    global _chosen
    assert requested in ("", *KERNELS), f"kernel {requested!r}, expected one of {', '.join(KERNELS)}"
    if requested == "xla" or (not requested and jax.default_backend() != "gpu"):
        _chosen, reason = "xla", "as asked" if requested else "no NVIDIA GPU"
    elif dtype != jnp.bfloat16:
        if requested:
            raise UserError(f"--attention=cudnn needs --compute_dtype=bfloat16, not {jnp.dtype(dtype).name}")
        _chosen, reason = "xla", "cuDNN has no float32 kernel"
    else:
        failure = _try_cudnn(dtype, model_cfg)
        if failure and requested:
            raise UserError(f"--attention=cudnn does not work here: {failure}")
        if failure and not may_be_slow and float(getattr(jax.devices()[0], "compute_capability", 0)) >= HOPPER:
            raise UserError(
                f"cuDNN's attention failed its trial run ({failure}): run python -m scripts.doctor to find the cause, "
                "or train more slowly without cuDNN (--attention=xla)"
            )
        _chosen, reason = ("xla", f"cuDNN failed: {failure}") if failure else ("cudnn", "it passed a trial run")
    return _chosen, reason


def most_rows(model_cfg: GPTConfig) -> int | None:
    """Returns how many rows the chosen kernel can compute on one device, or None if there is no limit.

    cuDNN's gradients are wrong if the queries on one device have CUDNN_LIMIT elements or more. `causal_attention`
    cannot check this, because under jit it sees the rows of all devices.
    """
    per_row = model_cfg.sequence_len * model_cfg.n_head * model_cfg.head_dim
    return (CUDNN_LIMIT - 1) // per_row if _chosen == "cudnn" else None


def check_rows(rows: int, model_cfg: GPTConfig) -> None:
    """Raises UserError if the chosen kernel would be wrong for `rows` rows on one device."""
    most = most_rows(model_cfg)
    if most is not None and rows > most:
        raise UserError(
            f"{rows} rows of {model_cfg.sequence_len} tokens are too many for cuDNN's attention on one device: use a "
            f"batch size of at most {most}"
        )


def _try_cudnn(dtype: DTypeLike, model_cfg: GPTConfig) -> str:
    """Runs cuDNN's forward and backward passes. Returns the first line of the error, or "" if both passes work."""

    @functools.partial(jax.jit, static_argnums=3)
    def gradients(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> tuple[jax.Array, ...]:
        return jax.grad(lambda *qkv: _cudnn(*qkv, window).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    try:
        q = jnp.ones((1, 128, model_cfg.n_head, model_cfg.head_dim), dtype)
        kv = jnp.ones((1, 128, model_cfg.n_kv_head, model_cfg.head_dim), dtype)
        for window in sorted(set(model_cfg.windows)):
            jax.block_until_ready(gradients(q, kv, kv, window))
    except Exception as error:  # any error means that cuDNN cannot be used
        return first_line(error)
    return ""


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, window: int = 0) -> jax.Array:
    """Computes causal attention of queries q [b,t,h,k] over keys k and values v [b,t,n,k]. Returns [b,t,h,k].

    Query head i uses key/value head i // (h/n). The scores are scaled by 1/sqrt(head dim), and the softmax is computed
    in float32.
    """
    return (_cudnn if _chosen == "cudnn" else _xla)(q, k, v, window)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> jax.Array:
    """Uses cuDNN's flash attention. Causality and the window are passed as options: a mask array would be slower."""
    local = (window, 0) if window else None
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation="cudnn")


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> jax.Array:
    # The queries are split into four blocks. For each block, the keys that none of its queries sees are left out. If
    # there is no window, this saves 3/8 of the scores. On a CPU, for t = 256, the forward and backward passes would
    # take about 1.5 times as long without the split.
    b, t, h, d = q.shape
    n = k.shape[2]
    q = jnp.moveaxis(q.reshape(b, t, n, h // n, d), 1, 3)  # [b,n,g,t,k], where g is h // n
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [b,n,s,k]
    block = t // 4 if t % 4 == 0 and t >= 128 else t
    out = []
    for start in range(0, t, block):
        end = start + block
        first_key = max(0, start - window) if window else 0
        queries, keys = q[..., start:end, :], slice(first_key, end)
        scores = jnp.einsum("bngtk,bnsk->bngts", queries, k[:, :, keys], preferred_element_type=accum_dtype(q.dtype))
        scores *= d**-0.5
        visible = _visible(jnp.arange(start, end), jnp.arange(first_key, end), window)
        weights = jax.nn.softmax(jnp.where(visible[None, None, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
        out.append(jnp.einsum("bngts,bnsk->bngtk", weights, v[:, :, keys], preferred_element_type=accum_dtype(q.dtype)))
    return jnp.moveaxis(jnp.concatenate(out, axis=3), 3, 1).reshape(b, t, h, d).astype(v.dtype)


def _visible(queries: jax.Array, keys: jax.Array, window: int) -> jax.Array:
    """Returns a mask [..., t, s] that is True where a query sees a key.

    `queries` [..., t] and `keys` [s] hold the positions of the queries and the keys.
    """
    distance = queries[..., :, None] - jnp.expand_dims(keys, range(queries.ndim))
    return (distance >= 0) & (distance <= window) if window else distance >= 0


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, window: int = 0) -> jax.Array:
    """Computes causal attention of queries q [b,t,h,k] over cached keys k and values v [b,n,s,k]. Returns [b,t,h,k].

    `start` [b] holds the position of each row's first query. A query at position p sees cache positions 0 to p. With a
    window, the query sees only positions p - `window` to p. The matmul operands have the cache's dtype, and the result
    has q's dtype.
    """
    b, t, h, d = q.shape
    n, dtype = k.shape[1], q.dtype
    # q gets the axes [b,n,g,t,k], as in `_xla`, because some CPUs have no bf16 matmul for other axis orders.
    q = jnp.moveaxis(q.reshape(b, t, n, h // n, d), 1, 3).astype(k.dtype)
    scores = jnp.einsum("bngtk,bnsk->bngts", q, k, preferred_element_type=accum_dtype(q.dtype)) * d**-0.5
    visible = _visible(start[:, None] + jnp.arange(t)[None], jnp.arange(k.shape[2]), window)  # [b,t,s]
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bngts,bnsk->bngtk", weights, v, preferred_element_type=accum_dtype(q.dtype))
    return jnp.moveaxis(out, 3, 1).reshape(b, t, h, d).astype(dtype)
