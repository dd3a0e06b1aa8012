"""Bits per byte: a validation loss that does not depend on the tokenizer.

Used by scripts.base_loss, and by training every --eval_every steps.

Bits per byte is the total loss of all target tokens, in bits, divided by the number of bytes of their text. Special
tokens have no bytes, and their losses are not counted.
"""

import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nanochat_jax.config import GPTConfig
from nanochat_jax.evals.batching import put_local
from nanochat_jax.evals.model import EvalModel
from nanochat_jax.model import gpt
from nanochat_jax.model.loss import num_chunks, token_losses


def bits_per_byte(model: EvalModel, batches: Iterable[dict[str, np.ndarray]]) -> float:
    """Returns the bits per byte over all `batches`.

    A batch holds the int32 arrays `inputs` and `targets` [b,t]. Negative targets are not counted. The result is inf if
    the targets have no bytes. Each process passes its own rows, and gets the result for the rows of all processes.
    """
    token_bytes = np.asarray(model.tokenizer.token_bytes(), np.int32)  # jit replicates NumPy arrays over all devices
    sums = []
    for batch in batches:
        inputs, targets = (put_local(model.params, batch[name]) for name in ("inputs", "targets"))
        sums.append(_sums(model.params, model.model_cfg, inputs, targets, token_bytes, model.dtype))
        if len(sums) > 2:  # queues at most two batches, enough to keep the device busy
            jax.block_until_ready(sums[-3])
    # The host adds up the batches in float64, because float32 cannot add millions of nats exactly.
    nats = sum(float(n) for n, _ in sums)
    size = sum(int(s) for _, s in sums)
    return nats / (math.log(2) * size) if size else math.inf


@functools.partial(jax.jit, static_argnames=("model_cfg", "dtype"))
def _sums(
    params: gpt.Params,
    model_cfg: GPTConfig,
    inputs: jax.Array,
    targets: jax.Array,
    token_bytes: jax.Array | np.ndarray,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """Returns the total loss in nats and the number of bytes of one batch's targets.

    `token_bytes` [v] is 0 for special tokens.
    """
    x = gpt.hidden(params, model_cfg, inputs, dtype)
    size = jnp.where(targets >= 0, token_bytes[jnp.maximum(targets, 0)], 0)
    counted = jnp.where(size > 0, targets, -1)
    losses = token_losses(
        x, params["lm_head"][: model_cfg.vocab_size], counted, model_cfg.softcap, num_chunks(*inputs.shape)
    )
    return losses.sum(), size.sum()
