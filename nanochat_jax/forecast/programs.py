"""The programs of training and of generating text, compiled for a mesh of GPUs that are not there (`compiled.py`)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nanochat_jax.config import GPTConfig, Train
from nanochat_jax.engine import cache as kv
from nanochat_jax.engine import programs, sampler
from nanochat_jax.engine.programs import Fixed
from nanochat_jax.engine.request import MAX_STOP_IDS
from nanochat_jax.forecast.compiled import Compiled, compile_for, shapes
from nanochat_jax.model import gpt
from nanochat_jax.parallel import sharding
from nanochat_jax.parallel.sharding import Layout
from nanochat_jax.training import optim
from nanochat_jax.training.run import batch_shapes, optimizer_of, state_shapes
from nanochat_jax.training.step import execution, make_step

BF16 = jnp.dtype(jnp.bfloat16)
CHUNK = 32  # tokens that decoding computes in one call


def training_step(
    cfg: Train,
    model_cfg: GPTConfig,
    mesh: Mesh,
    grad_accum_steps: int,
    rows: int,
    momentum: optax.Schedule | float = optim.momentum_warmup,
    weighted: bool = False,
    fused: bool = True,
) -> Compiled:
    """Compiles the training step of a stage, with `rows` rows on each replica at once.

    `momentum` is 0.95 in sft and rl. In rl, the targets have weights (`weighted`). The kernels of model/fused compute
    the blocks if `fused` is set and the settings allow it, as if they had passed their trial (`fused.trial`).
    """
    layout = Layout(mesh, cfg.shard)
    optimizer = optimizer_of(cfg, model_cfg, momentum, BF16, layout)
    batch, lr_mult = batch_shapes(mesh, grad_accum_steps, rows, model_cfg.sequence_len)
    if weighted:
        ids = batch["inputs"]
        batch["weights"] = jax.ShapeDtypeStruct(ids.shape, jnp.float32, sharding=ids.sharding)
    if mesh.shape["node"] > 1:  # nodes run in processes of their own, which must stop together
        flags = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.AXES))
        batch["stop"] = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=flags)
    step = make_step(model_cfg, optimizer, BF16, cfg.grad_clip, layout, execution(cfg, layout if fused else None))
    return compile_for(step, state_shapes(model_cfg, optimizer, layout), batch, lr_mult)


def generation_weights(model_cfg: GPTConfig, mesh: Mesh) -> programs.DecodeParams:
    params = jax.eval_shape(lambda: programs.lay_out(gpt.cast(gpt.init(model_cfg), BF16)))
    return shapes(params, sharding.replicated(mesh))


def cache_of(model_cfg: GPTConfig, rows: int, size: int, where: jax.sharding.Sharding) -> kv.KV:
    return shapes(jax.eval_shape(lambda: kv.allocate(model_cfg, rows, size, BF16)), where)


def decode(model_cfg: GPTConfig, mesh: Mesh, slots: int, size: int, plan: sampler.Plan) -> Compiled:
    """Compiles a chunk of CHUNK tokens for `slots` slots of `size` positions, divided over the mesh."""
    divided = mesh if mesh.size > 1 else None
    where = sharding.batch_sharding(divided) or sharding.replicated(mesh)

    def ints(*shape: int) -> Any:  # stands for an array
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    flags: Any = jax.ShapeDtypeStruct((slots,), bool)
    inputs = programs.DecodeInputs(
        ints(slots), ints(slots), ints(slots), flags, flags, ints(slots, MAX_STOP_IDS), ints(slots, CHUNK), ints(slots)
    )
    settings = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), sampler.settings([None] * slots, model_cfg.vocab_size)
    )
    fixed = Fixed(model_cfg, BF16, model_cfg.vocab_size - 6, divided)
    cache = cache_of(model_cfg, slots, size, where)
    weights = generation_weights(model_cfg, mesh)
    return compile_for(programs.decode, weights, cache, inputs, settings, fixed=fixed, plan=plan, top=0)


def prefill(model_cfg: GPTConfig, mesh: Mesh, rows: int, size: int) -> Compiled:
    """Compiles the prefill of `rows` prompts, padded to `size` tokens."""
    ids, length = jax.ShapeDtypeStruct((rows, size), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    weights = generation_weights(model_cfg, mesh)
    return compile_for(programs.prefill, weights, ids, length, model_cfg=model_cfg, dtype=BF16)
