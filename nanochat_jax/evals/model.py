"""Defines `EvalModel`, which holds a model and its tokenizer for evaluation."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nanochat_jax.config import GPTConfig
from nanochat_jax.model import gpt
from nanochat_jax.parallel import devices, sharding
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.trained_model import TrainedModel

NOT_FINITE = "the model's losses are not finite: evaluate another checkpoint (--step), or try --compute_dtype=float32"


@dataclass(frozen=True)
class EvalModel:
    """A model to evaluate: either loaded from a checkpoint, or still in training."""

    params: gpt.Params  # on one device, replicated on several devices, or sharded as in training
    model_cfg: GPTConfig
    tokenizer: Tokenizer
    dtype: DTypeLike = jnp.float32  # the dtype of matmul operands


def on_all_devices(model: TrainedModel, compute_dtype: str) -> EvalModel:
    """Replicates a loaded model over the devices of this host."""
    dtype = devices.choose_precision(compute_dtype, model_cfg=model.model_cfg, may_be_slow=True)
    params = jax.device_put(model.params, sharding.replicated(sharding.make_mesh()))
    return EvalModel(params, model.model_cfg, model.tokenizer, dtype)
