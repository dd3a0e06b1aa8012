"""Bits per byte: a validation loss that does not depend on the tokenizer.

The sum of the losses of all targets, in bits, over the number of bytes those targets stand for. Special tokens stand
for no bytes and count in neither sum.
"""

import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.config import GPTConfig
from nanochat_jax.evals.batching import put_local
from nanochat_jax.model import gpt
from nanochat_jax.model.loss import num_chunks, token_losses


def bits_per_byte(
    params: gpt.Params,
    model_cfg: GPTConfig,
    batches: Iterable[dict[str, np.ndarray]],
    token_bytes: np.ndarray,
    dtype: jnp.dtype = jnp.float32,
) -> float:
    """Bits per byte over batches {inputs, targets} int32 [b,t]; targets below 0 are not counted. No bytes: inf.

    token_bytes [v]: raw bytes of each token, 0 for special ones. With several processes each brings its own rows, and
    all get the result over all of them.
    """
    token_bytes = np.asarray(token_bytes, np.int32)  # of the host: every process has it
    sums = []
    for batch in batches:
        inputs, targets = (put_local(params, batch[name]) for name in ("inputs", "targets"))
        sums.append(_sums(params, model_cfg, inputs, targets, token_bytes, dtype))
        if len(sums) > 2:  # waits for the batch before the last: the device stays busy, the queue stays short
            jax.block_until_ready(sums[-3])
    # Added up on the host: millions of nats are beyond what float32 adds exactly.
    nats = sum(float(n) for n, _ in sums)
    size = sum(int(s) for _, s in sums)
    return nats / (math.log(2) * size) if size else math.inf


@functools.partial(jax.jit, static_argnames=("model_cfg", "dtype"))
def _sums(params, model_cfg, inputs, targets, token_bytes, dtype) -> tuple[jax.Array, jax.Array]:
    """Nats and bytes of one batch."""
    x = gpt.hidden(params, model_cfg, inputs, dtype)
    size = jnp.where(targets >= 0, token_bytes[jnp.maximum(targets, 0)], 0)
    counted = jnp.where(size > 0, targets, -1)
    losses = token_losses(
        x, params["lm_head"][: model_cfg.vocab_size], counted, model_cfg.softcap, num_chunks(*inputs.shape)
    )
    return losses.sum(), size.sum()
