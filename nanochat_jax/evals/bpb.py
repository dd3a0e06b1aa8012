"""Bits per byte: a validation loss that does not depend on the tokenizer.

Used by scripts.base_loss, and by training every --eval_every steps.

Bits per byte is the sum of the losses of all targets, in bits, divided by the number of bytes that these targets stand
for. Special tokens stand for no bytes, and their losses are not counted.
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
    """Bits per byte over batches {inputs, targets} of int32 [b,t]; targets below 0 are not counted.

    The result is inf if the targets stand for no bytes. With several processes, each passes its own rows, and all get
    the result over all rows.
    """
    token_bytes = np.asarray(model.tokenizer.token_bytes(), np.int32)  # numpy array; every process has a full copy
    sums = []
    for batch in batches:
        inputs, targets = (put_local(model.params, batch[name]) for name in ("inputs", "targets"))
        sums.append(_sums(model.params, model.model_cfg, inputs, targets, token_bytes, model.dtype))
        if len(sums) > 2:  # waiting for the batch two before this one keeps the device busy and the queue short
            jax.block_until_ready(sums[-3])
    # The sums are added up on the host, since float32 cannot add millions of nats exactly.
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
    """(loss in nats, bytes) of one batch of inputs and targets [b,t]; token_bytes [v] is 0 for special tokens."""
    x = gpt.hidden(params, model_cfg, inputs, dtype)
    size = jnp.where(targets >= 0, token_bytes[jnp.maximum(targets, 0)], 0)
    counted = jnp.where(size > 0, targets, -1)
    losses = token_losses(
        x, params["lm_head"][: model_cfg.vocab_size], counted, model_cfg.softcap, num_chunks(*inputs.shape)
    )
    return losses.sum(), size.sum()
