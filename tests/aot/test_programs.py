"""Every program of the pipeline compiles for H100s that are not there, fits in their memory, and wastes nothing.

bash setup.sh dev aot && bash tests/run.sh -m aot
"""

import dataclasses
import importlib.util
import math
import re

import absent_gpus
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent_gpus import collectives, mesh_of_h100s

from nanochat_jax import commandline, config
from nanochat_jax.config import GPTConfig
from nanochat_jax.engine import cache as kv
from nanochat_jax.engine import sampler
from nanochat_jax.evals import chat, core
from nanochat_jax.forecast import compiled, programs
from nanochat_jax.forecast.card import Target
from nanochat_jax.forecast.compiled import GIB, Compiled, compile_for, shapes
from nanochat_jax.forecast.programs import BF16, cache_of, decode, prefill, training_step
from nanochat_jax.model import gpt
from nanochat_jax.parallel import sharding
from nanochat_jax.parallel.sharding import Layout
from nanochat_jax.training.rl import SLOTS

if not any(importlib.util.find_spec(name) for name in compiled.PLUGINS):
    pytest.skip("no compiler for GPUs: bash setup.sh dev aot", allow_module_level=True)

pytestmark = pytest.mark.aot

VOCAB = 65_536
LARGEST = 76  # GiB of the 80 GB card that a program may use; the rest is for cuDNN, NCCL and fragmentation


@pytest.fixture(autouse=True, scope="module")
def hopper():
    compiled.without_driver()
    with compiled.pretending(Target(absent_gpus.H100, 1)):
        yield


def model_of(depth: int, context: int = 2048) -> GPTConfig:
    return dataclasses.replace(config.Base(depth=depth).gpt_config(VOCAB), sequence_len=context)


def check(program: Compiled, name: str) -> None:
    absent_gpus.record(program, name)
    assert program.peak < LARGEST * GIB, name
    assert not absent_gpus.products(program, "f32", 2**20), f"{name}: matmuls in float32"
    assert not absent_gpus.sorts(program, VOCAB // 4), f"{name}: whole rows of logits are sorted"


def check_step(program: Compiled, depth: int, mesh: dict, shard: str) -> None:
    kernels = absent_gpus.lines(program, r"__cudnn\$fmha")
    assert len(kernels) == 2 * depth, "one attention kernel forward and one backward in each layer"
    if shard == "optimizer" and "model" not in mesh:
        weights = 8  # reduced once, however many layers and micro-batches there are; Muon's matrices have two shapes
        assert len(collectives(program, "all-to-all")) <= weights + 2 and len(collectives(program, "all-gather")) <= 8


# Midtraining runs base's program: only the learning rates can differ, and these are constants in the program.
@pytest.mark.parametrize(
    ("depth", "rows", "mesh", "shard"),
    [(20, 32, {"data": 8}, "optimizer"), (20, 32, {}, "optimizer"), (20, 16, {"data": 8}, "full"),
     (26, 16, {"data": 8}, "optimizer"), (32, 8, {"data": 8}, "optimizer"),
     (20, 16, {"node": 2, "data": 4}, "optimizer"), (32, 8, {"node": 2, "data": 8}, "optimizer"),
     (20, 16, {"data": 4, "model": 2}, "optimizer")],
)  # fmt: skip
def test_a_training_step(depth, rows, mesh, shard):
    cfg = config.Base(depth=depth, shard=shard)
    program = training_step(cfg, model_of(depth), mesh_of_h100s(**mesh), 1, rows)
    check(program, f"base, d{depth}, {rows} rows, {described(mesh)}, `--shard={shard}`")
    check_step(program, depth, mesh, shard)
    fused = absent_gpus.lines(program, r"__gpu\$xla.gpu.triton")
    assert len(fused) == (10 * depth if shard == "optimizer" and "model" not in mesh else 0)
    if "model" in mesh:  # Megatron's two all-reduces a layer forward, and backward those of q, k, v and the MLP
        moved = absent_gpus.lines(program, r"\b(all-reduce|all-gather|reduce-scatter|all-to-all)(-start)?\(.*block\d")
        assert len(moved) == 6 * depth and all("all-reduce" in line for line in moved)
    elif shard == "optimizer" and mesh and "node" not in mesh:
        model_cfg, replicas = model_of(depth), math.prod(mesh.values())
        sent = sum(kernel.sent * kernel.times for kernel in program.program.kernels if kernel.op != "all-reduce")
        share = 2 * (1 - 1 / replicas)  # what a ring sends of each bf16 number
        least = share * 2 * model_cfg.num_params  # gradients there and updates back
        print(f"  each GPU sends {sent / 1e6:.0f} MB, {sent / least:.3f} of the least")
        # Muon exchanges its shards of the gradients for whole matrices. It pads the matrices of each shape to a
        # multiple of the replicas.
        count = [(n, math.ceil(n / replicas) * replicas) for n in (4 * depth, 2 * depth)]
        sizes = model_cfg.n_embd**2, 4 * model_cfg.n_embd**2
        padding, padded = (sum(size * n for size, n in zip(sizes, counts, strict=True)) for counts in
                           ([whole - n for n, whole in count], [whole for _, whole in count]))  # fmt: skip
        assert sent == pytest.approx(least + share * (padding + padded / replicas), rel=2e-3)
        assert sent <= 1.05 * least or depth > 20


def test_a_fused_block_has_no_other_kernel_and_keeps_ten_arrays():
    """Between matmuls, attention and its ten kernels, nothing reads or writes an array of the size of the stream."""
    cfg, rows = config.Base(), 32
    few, many = dataclasses.replace(model_of(20), n_layer=2), dataclasses.replace(model_of(20), n_layer=6)
    one, other = (training_step(cfg, m, mesh_of_h100s(), 1, rows) for m in (few, many))
    entry = other.text[other.text.index("\nENTRY") :]
    size = rows * 2048 * many.n_embd
    for line in entry.splitlines():
        if "gemm" not in line and re.search(r" (fusion|copy)\(.*block[1-4]\b", line):
            assert not large(line.split(", metadata")[0], size), line
    kept = (other.temporaries - one.temporaries) / 4 / (2 * size)
    plain = training_step(cfg, many, mesh_of_h100s(), 1, rows, fused=False).temporaries
    print(
        f"a block keeps {kept:.1f} arrays of the size of the stream; {other.temporaries / GIB:.1f} GiB, plain "
        f"{plain / GIB:.1f}"
    )
    assert kept < 10.8
    assert other.temporaries < plain - 4 * 2 * size * 4


def large(line: str, size: int) -> bool:
    """Whether an array in this line has at least `size` elements."""
    return any(math.prod(map(int, dims.split(","))) >= size for dims in re.findall(r"\w+\[([0-9,]+)\]", line))


def test_the_loss_reads_the_logits_twice():
    """Once for the log-sum-exp and once for the gradient. Nothing of their size is float32."""
    program = training_step(config.Base(), dataclasses.replace(model_of(20), n_layer=1), mesh_of_h100s(), 1, 32)
    logits = 8192 * VOCAB  # of one chunk
    lines = re.sub(r"/\*.*?\*/", "", absent_gpus.loop_bodies(program)).splitlines()
    found = [re.match(r"\s*(?:ROOT )?%([\w.-]+) = (\w+)\[([0-9,]+)\]\S* (?:fusion|bitcast)\(", line) for line in lines]
    large = {m[1]: m[2] for m in found if m and math.prod(map(int, m[3].split(","))) == logits}
    assert large and set(large.values()) == {"bf16"}
    kernels = [line.split(", kind=")[0] for line in lines if " fusion(" in line and "gemm" not in line]
    passes = [line for line in kernels if large.keys() & set(re.findall(r"%([\w.-]+)", line.split(" fusion(")[1]))]
    assert len(passes) == 2, passes


def described(mesh: dict) -> str:
    return ",".join(f"{name}={size}" for name, size in mesh.items()) or "one GPU"


# About 32 conversations fill 16 rows of 2,048 tokens.
@pytest.mark.parametrize(("rows", "mesh"), [(16, {}), (2, {"data": 8})])
def test_the_step_of_finetuning(rows, mesh):
    program = training_step(config.Sft(), model_of(20), mesh_of_h100s(**mesh), 1, rows, momentum=0.95)
    check(program, f"sft, d20, {rows} rows, {described(mesh)}")
    check_step(program, 20, mesh, "optimizer")


# An answer and its problem take 512 tokens at most, or 2,048 if a problem fills the context.
@pytest.mark.parametrize(("mesh", "length"), [({}, 512), ({"data": 8}, 512), ({"data": 8}, 2048)])
def test_the_step_of_reinforcement_learning(mesh, length):
    cfg = config.Rl()
    rows = cfg.device_batch_size
    accum = cfg.examples_per_step * cfg.num_samples // rows // max(1, mesh.get("data", 1))
    program = training_step(cfg, model_of(20, length), mesh_of_h100s(**mesh), accum, rows, momentum=0.95, weighted=True)
    check(program, f"rl, d20, {accum} x {rows} rows of {length}, {described(mesh)}")
    check_step(program, 20, mesh, "optimizer")
    # While the step runs, each device also holds the engine's weights and its cache of 64 slots.
    held = 2 * model_of(20).num_params + sum(
        2 * np.prod(x.shape)
        for x in jax.tree.leaves(jax.eval_shape(lambda: kv.allocate(model_of(20), SLOTS, 2048, BF16)))
    )
    assert program.peak + held < LARGEST * GIB, "the step does not fit beside the engine"


@pytest.mark.parametrize(
    ("depth", "slots", "size", "devices"),
    [(20, 2, 512, 1), (20, 32, 2048, 1), (32, 64, 2048, 1), (20, 256, 512, 8), (20, 512, 2048, 8)],
)
@pytest.mark.parametrize("plan", [sampler.Plan(0, False), sampler.Plan(64, False)], ids=["greedy", "top-k"])
def test_decoding(depth, slots, size, devices, plan):
    program = decode(model_of(depth), mesh_of_h100s(data=devices), slots, size, plan)
    sampling = f"top-{plan.width}" if plan.width else "greedy"
    check(program, f"decoding {programs.CHUNK} tokens, d{depth}, {slots} x {size} positions, {devices} GPU, {sampling}")
    logits = 4 * slots // devices * VOCAB / GIB
    assert program.temporaries < (0.2 + 6 * logits) * GIB, "the cache is copied"
    gathered = [line for line in collectives(program, "all-gather") if f",{VOCAB}]" in line]
    assert not gathered, "the logits are gathered"


def test_one_answer_reads_the_weights_once():
    """The engine decodes a single answer with two slots (see `min_slots`)."""
    model_cfg = model_of(20)
    program = decode(model_cfg, mesh_of_h100s(), 2, 512, sampler.Plan(64, False)).program
    (steps, kernels), *_ = program.loops()
    moved = sum(kernel.times * kernel.bytes for kernel in program.kernels) / steps
    weights = 2 * (model_cfg.num_params - VOCAB * model_cfg.n_embd)
    cache = 2 * 2 * model_cfg.n_layer * model_cfg.n_embd * 512 * 2
    print(f"a token: {kernels} kernels, {moved / 1e6:.0f} MB; weights {weights / 1e6:.0f}, cache {cache / 1e6:.0f} MB")
    assert moved < 1.1 * (weights + cache), "products are written to memory before they are summed"
    assert kernels <= 17 * model_cfg.n_layer


def test_all_kernels_of_a_token_are_launched_as_one_graph(tmp_path, monkeypatch):
    """By default, XLA records the body of the decoding loop as a CUDA graph ("command buffer")."""
    options = compiled.compiler_options() | {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": "True"}
    monkeypatch.setattr(compiled, "compiler_options", lambda: options)
    decode(model_of(4), mesh_of_h100s(), 2, 512, sampler.Plan(64, False))
    (file,) = tmp_path.glob("*thunk_sequence_after_thunk_passes.txt")
    # The lines of the loop's body are indented by four spaces, and what a command buffer holds is indented further.
    body = re.split(r"^\d", file.read_text().partition("body:")[2], maxsplit=1, flags=re.MULTILINE)[0]
    launched = re.findall(r"^    \d+: (\w+)", body, re.MULTILINE)
    assert launched == ["kCommandBuffer"], f"{len(launched)} launches a token: {launched[:5]}"


@pytest.mark.parametrize("devices", [1, 8])
def test_rows_of_the_cache_are_moved_and_nothing_else(devices):
    model_cfg, mesh = model_of(20), mesh_of_h100s(data=devices)
    divided, slots = mesh if devices > 1 else None, 64 * devices
    where = sharding.batch_sharding(divided) or sharding.replicated(mesh)
    cache, prefix = cache_of(model_cfg, slots, 2048, where), cache_of(model_cfg, 4, 512, sharding.replicated(mesh))
    row = cache_of(model_cfg, 1, 2048, sharding.replicated(mesh))
    size = sum(2 * np.prod(x.shape) for x in jax.tree.leaves(row))
    ints = jax.ShapeDtypeStruct((slots,), jnp.int32)
    one = jax.ShapeDtypeStruct((), jnp.int32)
    insert = compile_for(kv.insert_rows, cache, prefix, ints, ints, one, mesh=divided)
    waits = absent_gpus.lines(insert, r"\bwhile\(")
    assert insert.temporaries < 0.1 * GIB + size and not waits, "the host waits once a slot"
    assert not collectives(insert, "all-gather") and not collectives(insert, "all-reduce")
    copy = compile_for(kv.copy_row, cache, one, size=2048, mesh=divided)
    assert copy.temporaries < 0.1 * GIB + 2 * size, "the whole cache is gathered"


@pytest.mark.parametrize(("rows", "size"), [(1, 2048), (4, 512)])
def test_prefill(rows, size):
    check(prefill(model_of(20), mesh_of_h100s(), rows, size), f"prefill, d20, {rows} x {size} tokens, one GPU")


@pytest.mark.parametrize(
    ("depth", "mesh", "shard"),
    [(20, {}, "optimizer"), (20, {"data": 8}, "optimizer"), (20, {"data": 8}, "full"),
     (32, {"node": 2, "data": 8}, "optimizer")],
)  # fmt: skip
def test_core_casts_and_gathers_the_head_once(depth, mesh, shard):
    model_cfg, places = model_of(depth), mesh_of_h100s(**mesh)
    layout = Layout(places, shard)
    params = jax.eval_shape(lambda: gpt.init(model_cfg))
    params = shapes(params, layout.shardings(layout.param_specs(params)))
    rows = sharding.batch_sharding(places)
    ids = jax.ShapeDtypeStruct((32 * places.size, 2048), jnp.int32, sharding=rows)
    bounds = jax.ShapeDtypeStruct((32 * places.size, 2), jnp.int32, sharding=rows)
    program = compile_for(core._score, params, model_cfg, ids, bounds, BF16, places)
    check(program, f"CORE, d{depth}, 32 x 2048 tokens, {described(mesh)}, `--shard={shard}`")
    inside = absent_gpus.loop_bodies(program)
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
    check(program, f"multiple choice, d20, 8 x 512 tokens, {described({'data': devices} if devices > 1 else {})}")


def test_presets_are_those_that_are_compiled():
    """The cases above are the presets at their default settings."""
    for name, depth in (("d20", 20), ("d26", 26), ("d32", 32)):
        cfg = commandline.parse(config.Base, [f"--config={name}"])
        assert cfg.depth == depth and cfg.max_seq_len == 2048 and cfg.shard == "optimizer"
