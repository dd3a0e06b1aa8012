"""Every program of the pipeline compiles for H100s that are not there, fits in their memory, and wastes nothing.

bash setup.sh dev cuda13 && bash tests/run.sh -m aot
"""

import dataclasses
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if not importlib.util.find_spec("jax_cuda13_plugin"):
    pytest.skip("no compiler for GPUs: bash setup.sh dev cuda13", allow_module_level=True)

import absent_gpus
from absent_gpus import compile_for, mesh_of_h100s, shapes

from nanochat_jax import commandline, config
from nanochat_jax.config import GPTConfig
from nanochat_jax.engine import cache as kv
from nanochat_jax.engine import programs, sampler
from nanochat_jax.engine.programs import Fixed
from nanochat_jax.engine.request import MAX_STOP_IDS
from nanochat_jax.evals import chat, core
from nanochat_jax.model import attention, gpt
from nanochat_jax.parallel import sharding
from nanochat_jax.parallel.sharding import Layout
from nanochat_jax.training import optim
from nanochat_jax.training.run import execution
from nanochat_jax.training.step import TrainState, make_step

pytestmark = pytest.mark.aot

VOCAB = 65_536
LARGEST = 76.0  # GiB of the 80 GB card that a program may use; the rest is for cuDNN, NCCL and fragmentation
BF16 = jnp.dtype(jnp.bfloat16)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    absent_gpus.pretend_hopper(monkeypatch)
    monkeypatch.setattr(attention, "_chosen", "cudnn")
    monkeypatch.setattr(kv, "dtype_for", jnp.dtype)  # as on a GPU


def model_of(depth: int, context: int = 2048) -> GPTConfig:
    return dataclasses.replace(config.Base(depth=depth).gpt_config(VOCAB), sequence_len=context)


def step_of(cfg: config.Base, model_cfg: GPTConfig, mesh: jax.sharding.Mesh, accum: int, rows: int, fused: bool = True):
    """Compiles the training step with `rows` rows on each device, and with the fused block if the settings allow it."""
    layout = Layout(mesh, cfg.shard)
    optimizer = optim.make_optimizer(
        model_cfg.n_embd, embedding_lr=cfg.embedding_lr, unembedding_lr=cfg.unembedding_lr, matrix_lr=cfg.matrix_lr,
        momentum=optim.momentum_warmup, dtype=BF16, layout=layout,
    )  # fmt: skip
    params = jax.eval_shape(lambda: gpt.init(model_cfg))
    opt_state = jax.eval_shape(optimizer.init, params)
    state = TrainState(
        shapes(params, layout.shardings(layout.param_specs(params))),
        shapes(opt_state, layout.shardings(layout.shard_specs(opt_state))),
    )
    ids = jax.ShapeDtypeStruct(
        (accum, rows * sharding.replicas(mesh), model_cfg.sequence_len), jnp.int32,
        sharding=sharding.micro_batch_sharding(mesh),
    )  # fmt: skip
    lr = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    step = make_step(model_cfg, optimizer, BF16, cfg.grad_clip, layout, execution(cfg, layout if fused else None))
    return compile_for(step, state, {"inputs": ids, "targets": ids}, lr)


def check(program: absent_gpus.Compiled, name: str) -> None:
    print(f"{name}: {program.peak:.1f} GiB, of these {program.temporaries:.1f} temporary")
    assert program.peak < LARGEST, name
    assert not program.products("f32", 2**20), f"{name}: matrix products in float32"
    assert not program.sorts(VOCAB // 4), f"{name}: whole rows of logits are sorted"


@pytest.mark.parametrize(
    ("depth", "rows", "mesh", "shard"),
    [(20, 32, {"data": 8}, "optimizer"), (20, 32, {}, "optimizer"), (20, 16, {"data": 8}, "full"),
     (26, 16, {"data": 8}, "optimizer"), (32, 8, {"data": 8}, "optimizer"),
     (20, 16, {"node": 2, "data": 4}, "optimizer"),
     (20, 16, {"data": 4, "model": 2}, "optimizer")],
)  # fmt: skip
def test_a_training_step(depth, rows, mesh, shard):
    cfg, model_cfg = config.Base(depth=depth, shard=shard), model_of(depth)
    program = step_of(cfg, model_cfg, mesh_of_h100s(**mesh), 1, rows)
    check(program, f"d{depth}, {rows} rows, {mesh or 'one GPU'}, {shard}")
    kernels = program.lines(r"__cudnn\$fmha")
    assert len(kernels) == 2 * depth, "one attention kernel forward and one backward in each layer"
    fused = program.lines(r"__gpu\$xla.gpu.triton")
    assert len(fused) == (10 * depth if shard == "optimizer" and "model" not in mesh else 0)
    if "model" in mesh:  # Megatron's two all-reduces a layer forward, and backward those of q, k, v and the MLP
        moved = program.lines(r"\b(all-reduce|all-gather|reduce-scatter|all-to-all)(-start)?\(.*block\d")
        assert len(moved) == 6 * depth and all("all-reduce" in line for line in moved)
    if shard == "optimizer" and "model" not in mesh:
        weights = 8  # reduced once, however many layers there are; Muon's matrices have two shapes
        assert len(program.collectives("all-to-all")) <= weights + 2 and len(program.collectives("all-gather")) <= 8
        sent = sum(map(bytes_sent, program.lines(r"\b(all-to-all|reduce-scatter|all-gather)(-start)?\(")))
        replicas = math.prod(mesh.values())
        least = 2 * 2 * model_cfg.num_params * (1 - 1 / replicas)  # bf16 gradients there, bf16 updates back
        print(f"  each GPU sends {sent / 1e6:.0f} MB, {sent / max(least, 1):.3f} of the least")
        if "node" not in mesh:
            assert sent <= 1.05 * least


def test_a_fused_block_has_no_other_kernel_and_keeps_ten_arrays():
    """Between matmuls, attention and its ten kernels, nothing reads or writes an array of the size of the stream."""
    cfg, rows = config.Base(), 32
    few, many = dataclasses.replace(model_of(20), n_layer=2), dataclasses.replace(model_of(20), n_layer=6)
    one, other = (step_of(cfg, m, mesh_of_h100s(), 1, rows) for m in (few, many))
    entry = other.text[other.text.index("\nENTRY") :]
    size = rows * 2048 * many.n_embd
    for line in entry.splitlines():
        if "gemm" not in line and re.search(r" (fusion|copy)\(.*block[1-4]\b", line):
            assert not large(line.split(", metadata")[0], size), line
    kept = (other.temporaries - one.temporaries) * 2**30 / 4 / (2 * size)
    plain = step_of(cfg, many, mesh_of_h100s(), 1, rows, fused=False).temporaries
    print(f"a block keeps {kept:.1f} arrays of the size of the stream; {other.temporaries:.1f} GiB, plain {plain:.1f}")
    assert kept < 10.8
    assert other.temporaries < plain - 4 * 2 * size / 2**30 * 4


def large(line: str, size: int) -> bool:
    """Whether an array in this line has at least `size` elements."""
    return any(math.prod(map(int, dims.split(","))) >= size for dims in re.findall(r"\w+\[([0-9,]+)\]", line))


def bytes_sent(line: str) -> float:
    """How many bytes a device sends to the others in this collective among 8 devices."""
    sizes = {"bf16": 2, "f32": 4}
    arrays = re.findall(r"\b(bf16|f32)\[([0-9,]+)\]", line.split("replica_groups")[0].split("-start(")[0])
    return max(sizes[d] * math.prod(map(int, dims.split(","))) for d, dims in arrays) * 7 / 8


def test_the_loss_reads_the_logits_twice():
    """Once for the log-sum-exp and once for the gradient. Nothing of their size is float32."""
    program = step_of(config.Base(), dataclasses.replace(model_of(20), n_layer=1), mesh_of_h100s(), 1, 32)
    logits = 8192 * VOCAB  # of one chunk
    lines = re.sub(r"/\*.*?\*/", "", program.loop_bodies()).splitlines()
    found = [re.match(r"\s*(?:ROOT )?%([\w.-]+) = (\w+)\[([0-9,]+)\]\S* (?:fusion|bitcast)\(", line) for line in lines]
    large = {m[1]: m[2] for m in found if m and math.prod(map(int, m[3].split(","))) == logits}
    assert large and set(large.values()) == {"bf16"}
    kernels = [line.split(", kind=")[0] for line in lines if " fusion(" in line and "gemm" not in line]
    passes = [line for line in kernels if large.keys() & set(re.findall(r"%([\w.-]+)", line.split(" fusion(")[1]))]
    assert len(passes) == 2, passes


def laid_out(model_cfg: GPTConfig, mesh: jax.sharding.Mesh):
    params = jax.eval_shape(lambda: programs.lay_out(gpt.cast(gpt.init(model_cfg), BF16)))
    return shapes(params, sharding.replicated(mesh))


def cache_of(model_cfg: GPTConfig, rows: int, size: int, where) -> kv.KV:
    return shapes(jax.eval_shape(lambda: kv.allocate(model_cfg, rows, size, BF16)), where)


def decode_of(model_cfg: GPTConfig, mesh: jax.sharding.Mesh, slots: int, size: int, plan: sampler.Plan):
    """Compiles a chunk of 32 tokens for `slots` slots, divided over the mesh."""
    divided = mesh if mesh.size > 1 else None
    where = sharding.batch_sharding(divided) or sharding.replicated(mesh)

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    flags = jax.ShapeDtypeStruct((slots,), bool)
    inputs = programs.DecodeInputs(
        ints(slots), ints(slots), ints(slots), flags, flags, ints(slots, MAX_STOP_IDS), ints(slots, 32), ints(slots)
    )
    settings = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), sampler.settings([None] * slots, model_cfg.vocab_size)
    )
    fixed = Fixed(model_cfg, BF16, VOCAB - 6, divided)
    cache = cache_of(model_cfg, slots, size, where)
    return compile_for(
        programs.decode, laid_out(model_cfg, mesh), cache, inputs, settings, fixed=fixed, plan=plan, top=0
    )


@pytest.mark.parametrize(
    ("depth", "slots", "size", "devices"),
    [(20, 1, 512, 1), (20, 32, 2048, 1), (32, 64, 2048, 1), (20, 256, 512, 8), (20, 512, 2048, 8)],
)
@pytest.mark.parametrize("plan", [sampler.Plan(0, False), sampler.Plan(64, False)], ids=["greedy", "top-k"])
def test_decoding(depth, slots, size, devices, plan):
    program = decode_of(model_of(depth), mesh_of_h100s(data=devices), slots, size, plan)
    check(program, f"decoding, d{depth}, {slots} slots of {size} on {devices}, {plan}")
    logits = 4 * slots // devices * VOCAB / 2**30
    assert program.temporaries < 0.2 + 6 * logits, "the cache is copied"
    assert not [line for line in program.collectives("all-gather") if f",{VOCAB}]" in line], "the logits are gathered"


@pytest.mark.parametrize("devices", [1, 8])
def test_rows_of_the_cache_are_moved_and_nothing_else(devices):
    model_cfg, mesh = model_of(20), mesh_of_h100s(data=devices)
    divided, slots = mesh if devices > 1 else None, 64 * devices
    where = sharding.batch_sharding(divided) or sharding.replicated(mesh)
    cache, prefix = cache_of(model_cfg, slots, 2048, where), cache_of(model_cfg, 4, 512, sharding.replicated(mesh))
    row = cache_of(model_cfg, 1, 2048, sharding.replicated(mesh))
    gib = sum(2 * np.prod(x.shape) for x in jax.tree.leaves(row)) / 2**30
    ints = jax.ShapeDtypeStruct((slots,), jnp.int32)
    one = jax.ShapeDtypeStruct((), jnp.int32)
    insert = compile_for(kv.insert_rows, cache, prefix, ints, ints, one, mesh=divided)
    assert insert.temporaries < 0.1 + gib and not insert.lines(r"\bwhile\("), "the host waits once a slot"
    assert not insert.collectives("all-gather") and not insert.collectives("all-reduce")
    copy = compile_for(kv.copy_row, cache, one, size=2048, mesh=divided)
    assert copy.temporaries < 0.1 + 2 * gib, "the whole cache is gathered"


@pytest.mark.parametrize(("rows", "size"), [(1, 2048), (4, 512)])
def test_prefill(rows, size):
    model_cfg, mesh = model_of(20), mesh_of_h100s()
    ids, length = jax.ShapeDtypeStruct((rows, size), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    program = compile_for(programs.prefill, laid_out(model_cfg, mesh), ids, length, model_cfg=model_cfg, dtype=BF16)
    check(program, f"prefill, {rows} prompts of {size}")


@pytest.mark.parametrize(("devices", "shard"), [(1, "optimizer"), (8, "optimizer"), (8, "full")])
def test_core_casts_and_gathers_the_head_once(devices, shard):
    model_cfg, mesh = model_of(20), mesh_of_h100s(data=devices)
    layout = Layout(mesh, shard)
    params = jax.eval_shape(lambda: gpt.init(model_cfg))
    params = shapes(params, layout.shardings(layout.param_specs(params)))
    rows = sharding.batch_sharding(mesh)
    ids = jax.ShapeDtypeStruct((32 * devices, 2048), jnp.int32, sharding=rows)
    bounds = jax.ShapeDtypeStruct((32 * devices, 2), jnp.int32, sharding=rows)
    program = compile_for(core._score, params, model_cfg, ids, bounds, BF16, mesh)
    check(program, f"CORE, {devices} GPUs, {shard}")
    inside = program.loop_bodies()
    assert f"f32[{VOCAB},{model_cfg.n_embd}]" not in inside, "the head is cast in every slice"
    assert "all-gather" not in inside, "the head is gathered in every slice"


@pytest.mark.parametrize("devices", [1, 8])
def test_multiple_choice(devices):
    model_cfg, mesh = model_of(20), mesh_of_h100s(data=devices)
    params = shapes(jax.eval_shape(lambda: gpt.init(model_cfg)), sharding.replicated(mesh))

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh))

    n = 8 * devices
    program = compile_for(chat._choose_letter, params, model_cfg, ints(n, 512), ints(n), ints(n, 8), BF16)
    check(program, f"multiple choice, {devices} GPUs")


def test_presets_are_those_that_are_compiled():
    """The cases above are the presets at their default settings."""
    for name, depth in (("d20", 20), ("d26", 26), ("d32", 32)):
        cfg = commandline.parse(config.Base, [f"--config={name}"])
        assert cfg.depth == depth and cfg.max_seq_len == 2048 and cfg.shard == "optimizer"
