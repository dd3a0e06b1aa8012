"""Bits per byte: a validation loss that does not depend on the tokenizer.

Used by scripts.base_loss, and by training every --eval_every steps.

Bits per byte is the total loss of all target tokens, in bits, divided by the number of bytes of their text. Special
tokens have no bytes, and their losses are not counted.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nanochat_jax.config import GPTConfig
from nanochat_jax.evals.batching import fetch, put_local
from nanochat_jax.evals.model import EvalModel
from nanochat_jax.evals.score import with_error
from nanochat_jax.model import gpt
from nanochat_jax.model.loss import num_chunks, token_losses
from nanochat_jax.progress import count_of


class BitsPerByte(NamedTuple):
    """A model's bits per byte on a text.

    The tokens of a row depend on each other, so the standard error is computed over rows and not over tokens. It is
    None if there are fewer than two rows.
    """

    bpb: float  # inf if the targets have no bytes
    stderr: float | None
    tokens: int  # the number of targets
    rows: int  # the number of rows whose targets have bytes

    def __str__(self) -> str:
        return with_error(self.bpb, self.stderr, f"n={self.tokens:,} tokens, {count_of(self.rows, 'row')}", digits=6)


def bits_per_byte(model: EvalModel, batches: Iterable[dict[str, np.ndarray]]) -> BitsPerByte:
    """Returns the bits per byte over all `batches`.

    A batch holds the int32 arrays `inputs` and `targets` [b,t]. Negative targets are not counted. Each process passes
    its own rows, and gets the result for the rows of all processes.
    """
    token_bytes = np.asarray(model.tokenizer.token_bytes(), np.int32)  # jit replicates NumPy arrays over all devices
    sums = []
    for batch in batches:
        inputs, targets = (put_local(model.params, batch[name]) for name in ("inputs", "targets"))
        sums.append(_sums(model.params, model.model_cfg, inputs, targets, token_bytes, model.dtype))
        if len(sums) > 2:  # waits until at most two batches are queued, which is enough to keep the device busy
            jax.block_until_ready(sums[-3])
    # The host adds up the batches in float64, because float32 cannot add millions of nats exactly.
    nats = sum(float(s.nats) for s in sums)
    size = sum(int(s.size) for s in sums)
    tokens = sum(int(s.tokens) for s in sums)
    if not size:
        return BitsPerByte(math.inf, None, tokens, 0)
    row_nats = np.concatenate([fetch(s.row_nats) for s in sums]).astype(np.float64)
    row_sizes = np.concatenate([fetch(s.row_sizes) for s in sums]).astype(np.float64)
    rows = int((row_sizes > 0).sum())
    stderr = _ratio_stderr(row_nats, row_sizes, rows) / math.log(2) if rows > 1 else None
    return BitsPerByte(nats / (math.log(2) * size), stderr, tokens, rows)


def _ratio_stderr(nats: np.ndarray, sizes: np.ndarray, rows: int) -> float:
    """Returns the standard error of sum(nats) / sum(sizes). `rows` is the number of rows that have bytes.

    The numerator and the denominator both vary from row to row, so this is the standard error of a ratio estimator
    (delta method; Cochran, Sampling Techniques, 1977, section 6.4).
    """
    ratio = nats.sum() / sizes.sum()
    residuals = nats - ratio * sizes  # 0 for a row without bytes
    return math.sqrt((residuals**2).sum() * rows / (rows - 1)) / sizes.sum()


class _Sums(NamedTuple):
    """Sums over one batch, as arrays on the devices. All sums except `tokens` count only targets that have bytes."""

    nats: jax.Array  # float32: the total loss
    size: jax.Array  # int32: the number of bytes
    tokens: jax.Array  # int32: the number of all targets, including those without bytes
    row_nats: jax.Array  # float32 [b]: the loss of each row
    row_sizes: jax.Array  # int32 [b]: the number of bytes of each row


@functools.partial(jax.jit, static_argnames=("model_cfg", "dtype"))
def _sums(
    params: gpt.Params,
    model_cfg: GPTConfig,
    inputs: jax.Array,
    targets: jax.Array,
    token_bytes: jax.Array | np.ndarray,
    dtype: DTypeLike,
) -> _Sums:
    """Returns the sums of one batch. `token_bytes` [v] is 0 for special tokens."""
    x = gpt.hidden(params, model_cfg, inputs, dtype)
    size = jnp.where(targets >= 0, token_bytes[jnp.maximum(targets, 0)], 0)
    counted = jnp.where(size > 0, targets, -1)
    losses = token_losses(
        x, params["lm_head"][: model_cfg.vocab_size], counted, model_cfg.softcap, num_chunks(*inputs.shape)
    )
    return _Sums(losses.sum(), size.sum(), (targets >= 0).sum(), losses.sum(axis=1), size.sum(axis=1))
