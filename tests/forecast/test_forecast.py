"""What is read from a compiled program's text, the bounds computed from it, and the mistakes that --target refuses."""

import dataclasses
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny

from nanochat_jax import config
from nanochat_jax.config import REPOSITORY, UserError
from nanochat_jax.forecast import card, compiled, hlo, plan, report
from nanochat_jax.forecast.card import Reachable, Target
from nanochat_jax.forecast.compiled import Compiled
from nanochat_jax.forecast.hlo import Program
from nanochat_jax.forecast.plan import Plan
from nanochat_jax.forecast.roofline import roofline, seconds_of
from nanochat_jax.parallel import devices, sharding
from nanochat_jax.training.batch_shape import BatchShape

# A program as XLA prints it, much shortened: a product, a loop of four iterations that updates one row of an array, a
# norm, cuDNN's attention, and a reduce-scatter that runs beside the norm.
TEXT = """\
HloModule jit_step, is_scheduled=true

%fused_product (a: bf16[1024,512], b: bf16[512,2048]) -> bf16[1024,2048] {
  %a = bf16[1024,512]{1,0} parameter(0)
  %b = bf16[512,2048]{1,0} parameter(1)
  %dot.1 = f32[1024,2048]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %convert.1 = bf16[1024,2048]{1,0} convert(%dot.1)
}

%fused_update (cache: f32[4,1000], row: f32[1,1000], i: s32[]) -> f32[4,1000] {
  %cache = f32[4,1000]{1,0} parameter(0)
  %row = f32[1,1000]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %put = f32[4,1000]{1,0} dynamic-update-slice(%cache, %row, %i, %zero)
}

%fused_norm (x: f32[1000000]) -> f32[1000000] {
  %x = f32[1000000]{0} parameter(0)
  ROOT %m = f32[1000000]{0} multiply(%x, %x), metadata={op_name="jit(step)/jvp(block0)/mlp/norm/mul"}
}

%body (state: (s32[], f32[4,1000], f32[1,1000])) -> (s32[], f32[4,1000], f32[1,1000]) {
  %state = (s32[], f32[4,1000]{1,0}, /*index=2*/f32[1,1000]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %kept = f32[4,1000]{1,0} get-tuple-element(%state), index=1
  %new = f32[1,1000]{1,0} get-tuple-element(%state), index=2
  %update = f32[4,1000]{1,0} fusion(%kept, %new, %n), kind=kLoop, calls=%fused_update
  ROOT %next = (s32[], f32[4,1000]{1,0}, f32[1,1000]{1,0}) tuple(%n, %update, %new)
}

%cond (state: (s32[], f32[4,1000], f32[1,1000])) -> pred[] {
  %state.1 = (s32[], f32[4,1000]{1,0}, f32[1,1000]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (p0: bf16[1024,512], p1: bf16[512,2048], p2: f32[1000000], p3: (s32[], f32[4,1000], f32[1,1000])) -> f32[] {
  %p0 = bf16[1024,512]{1,0} parameter(0)
  %p1 = bf16[512,2048]{1,0} parameter(1)
  %p2 = f32[1000000]{0} parameter(2)
  %p3 = (s32[], f32[4,1000]{1,0}, f32[1,1000]{1,0}) parameter(3)
  %product = bf16[1024,2048]{1,0} fusion(%p0, %p1), kind=kCustom, calls=%fused_product, metadata={op_name="jit(step)/jvp(block0)/mlp/dot_general"}
  %scatter = ((f32[1000000]{0}), f32[125000]{0}) reduce-scatter-start(%p2), channel_id=1, replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, dimensions={0}, metadata={op_name="jit(step)/reduce_scatter"}
  %normed = f32[1000000]{0} fusion(%p2), kind=kLoop, calls=%fused_norm
  %scattered = f32[125000]{0} reduce-scatter-done(%scatter)
  %loop = (s32[], f32[4,1000]{1,0}, f32[1,1000]{1,0}) while(%p3), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  ROOT %attend = (bf16[2,10,2048,128]{3,1,2,0}, u8[0]{0}) custom-call(%p0, %p1), custom_call_target="__cudnn$fmhaSoftmax", operand_layout_constraints={bf16[2,2048,10,128]{3,2,1,0}, bf16[2,2048,10,128]{3,2,1,0}}, backend_config={"mask_type": "CAUSAL", "sliding_window_length": 0}
}
"""  # noqa: E501

H100 = card.read(card.CARDS / "h100.toml")


@pytest.fixture(scope="module")
def program():
    return Program(TEXT, 8)


def test_kernels_bytes_and_flops(program):
    kernels = {kernel.name: kernel for kernel in program.kernels if not kernel.done}
    assert list(kernels) == ["product", "scatter", "normed", "update", "attend"] and program.count() == 8
    assert program.loops() == [(4, 1)]
    assert kernels["product"].flops == 2 * 1024 * 512 * 2048 and kernels["product"].dtype == "bf16"
    assert kernels["product"].bytes == 2 * (1024 * 512 + 512 * 2048 + 1024 * 2048)
    assert kernels["update"].times == 4
    assert kernels["update"].bytes == 4 * 1000 + 4 * 1000 + 4, "the row is read and written; the array is not copied"
    assert kernels["normed"].source.endswith("norm"), "a fusion without a name belongs where its operations do"
    pairs = 2048 * 2049 / 2
    assert kernels["attend"].flops == 2 * 2 * 10 * 128 * pairs * 2, "two products of all visible pairs"
    assert kernels["scatter"].group == tuple(range(8)) and kernels["scatter"].sent == 4e6 * 7 / 8


def test_the_bound_counts_each_kernel_at_its_peak(program):
    line = roofline(program, Target(H100, 8))
    product, attention = 2 * 1024 * 512 * 2048 / 989e12, 2 * 10 * 128 * 2048 * 2049 * 2 / 989e12
    update, norm, scatter = 4 * 8004 / 3.35e12, 8e6 / 3.35e12, 3.5e6 / 450e9
    # 3.5 MB at 450 GB/s take longer than the norm beside it, so the rest of the time is waited for.
    assert norm < scatter
    np.testing.assert_allclose(line.parts["communication"].seconds, scatter - norm)
    np.testing.assert_allclose(line.hidden, norm)
    np.testing.assert_allclose(line.parts["norms"].seconds, norm)
    np.testing.assert_allclose(line.parts["other"].seconds, update)
    memory = 2 * (1024 * 512 + 512 * 2048 + 1024 * 2048) / 3.35e12
    np.testing.assert_allclose(line.parts["matmuls"].seconds, max(product, memory))
    assert line.parts["attention"].seconds >= attention
    np.testing.assert_allclose(line.seconds, sum(part.seconds for part in line.parts.values()))
    slower = roofline(program, Target(H100, 8), Reachable(0.5, 0.5, 0.5))
    assert slower.seconds > line.seconds


def test_bytes_between_nodes_are_counted_at_the_adapters_speed():
    scatter = next(kernel for kernel in Program(TEXT, 8).kernels if kernel.is_collective)
    both = dataclasses.replace(scatter, group=tuple(range(16)))
    within = seconds_of(scatter, Target(H100, 16))
    across = seconds_of(both, Target(H100, 16))
    np.testing.assert_allclose(within, 3.5e6 / 450e9)
    np.testing.assert_allclose(across, max(3.5e6 / 450e9, 4e6 / 2 / 8 / 50e9))
    reduced = dataclasses.replace(both, op="all-reduce", group=(0, 8))
    np.testing.assert_allclose(seconds_of(reduced, Target(H100, 16)), 4e6 / 50e9)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [("{{0,2},{1,3}}", (0, 2)), ("[2,2]<=[4]", (0, 1)), ("[2,2]<=[2,2]T(1,0)", (0, 2)),
     ("mesh['a'=2,'b'=2] {'a'}", (0, 2)), ("{}", (0, 1, 2, 3))],
)  # fmt: skip
def test_the_groups_of_a_collective(groups, expected):
    assert hlo._group(f"channel_id=1, replica_groups={groups}, dimensions={{0}}", 4) == expected


def test_the_report(program):
    model_cfg = config.Base(depth=2).gpt_config(512)
    mesh = sharding.make_mesh()
    shape = BatchShape(1, 4, 1, model_cfg.sequence_len)
    step = Compiled(TEXT, 8, 10, 20, 3 * 2**30, 1.5)
    made = Plan(Target(H100, 8), mesh, model_cfg, shape, 69 * 2**30, 2**30, 2**30, step, None, None, 4)
    cfg = config.Doctor(depth=2, num_iterations=1000, price_per_hour=24.0)
    found = report.facts(cfg, made)
    seconds = found["step"]["bound"]["seconds"]
    assert found["step"]["bound"]["price"] == round(1000 * seconds / 3600 * 24, 2)
    np.testing.assert_allclose(
        found["step"]["bound"]["mfu"], shape.tokens * model_cfg.flops_per_token / seconds / (8 * 989e12)
    )
    assert found["collectives"] == {"reduce-scatter f32": {"count": 1, "bytes": 3.5e6}}
    text = dict(report.lines(found))
    assert "3.0 GiB" in text["Peak memory"] and "1 reduce-scatter f32 (4 MB)" in text["Collectives"]
    assert found["what"] == report.BOUND


@pytest.mark.parametrize(
    ("mesh", "shard", "accum", "expected"),
    [({"data": 8}, "optimizer", 4, 2 * 7 / 8), ({"data": 8}, "full", 2, 5 * 7 / 8),
     ({"node": 2, "data": 8}, "optimizer", 1, 2 * 7 / 8 + 2 / 8 / 2)],
)  # fmt: skip
def test_the_least_bytes_of_a_sharding(mesh, shard, accum, expected):
    model_cfg = config.Base(depth=2).gpt_config(512)
    axes = {"node": 1, "data": 1, "model": 1} | mesh
    made = Plan(None, type("Mesh", (), {"shape": axes})(), model_cfg, BatchShape(accum, 1, 8, 128), *[None] * 6, 4)  # ty: ignore
    sent = report.least_sent(config.Base(depth=2, shard=shard), model_cfg, made)
    np.testing.assert_allclose(sent, 2 * model_cfg.num_params * expected)


# -----------------------------------------------------------------------------
# Cards and mistakes


@pytest.mark.parametrize("name", card.known())
def test_cards(name):
    known = card.read(card.CARDS / f"{name}.toml")
    ours = (devices.PEAK_FLOPS, known.bf16_tflops * 1e12), (devices.PEAK_BANDWIDTH, known.memory_gb_per_s * 1e9)
    for figures, peak in ours:
        key = max((key for key in figures if re.search(rf"\b{key}\b", known.name)), key=len)
        np.testing.assert_allclose(peak, figures[key], rtol=1e-3, err_msg=f"{name}: not what a run would use")
    assert known.memory > 20 * 2**30
    assert known.capability == {"a100": "8.0", "b200": "10.0", "rtx4090": "8.9"}.get(name, "9.0")
    assert known.cudnn == 92801
    assert plan.usable_memory(Target(known, 1)) < 0.9 * known.memory


@pytest.mark.parametrize(
    ("text", "words"),
    [("h10:8", ["'h10'", "did you mean h100?"]), ("h100:0", ["'0'", "1 to 64"]), ("h100:65", ["'65'"]),
     ("h100:eight", ["'eight'", "--target=h100:8"]), ("h100:12", ["8 GPUs", "--target=h100:8"]),
     ("nowhere.toml:8", ["nowhere.toml"]), ("", ["''", "h100"])],
)  # fmt: skip
def test_an_unknown_target_is_refused(text, words):
    with pytest.raises(UserError) as error:
        card.parse(text)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_numbers_of_gpus():
    assert card.parse("h100").count == 1 and card.parse("h100:8").nodes == 1
    assert card.parse("h100:16").nodes == 2 and str(card.parse("h100:16")).endswith("2 nodes of 8")


@pytest.mark.parametrize(
    ("change", "words"),
    [(("bf16_tflops = 989", ""), ["bf16_tflops is missing"]), (("bf16_tflops", "bf16_tflop"), ["missing"]),
     (("name = ", "colour = 1\nname = "), ["unknown figure colour"]), (("3350", "-1"), ["memory_gb_per_s", "positive"]),
     (("3350", '"fast"'), ["memory_gb_per_s", "'fast'"]), (("node = 8", "node = 0"), ["whole number"]),
     (("matmuls = 0.81", "matmuls = 81"), ["reachable.matmuls", "share"]),
     (("[reachable]", "[reach]"), ["reachable"]),
     (("= 989", "= = 989"), ["not TOML"])],
)  # fmt: skip
def test_a_mistake_in_a_file_of_figures_is_one_line(tmp_path, change, words):
    for suffix in ("toml", "txtpb"):
        shutil.copy(card.CARDS / f"h100.{suffix}", tmp_path / f"mine.{suffix}")
    file = tmp_path / "mine.toml"
    assert card.parse(f"{file}:8").card == H100
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(UserError) as error:
        card.parse(f"{file}:8")
    assert all(word in str(error.value) for word in [*words, "mine.toml"]) and "\n" not in str(error.value)


def test_a_mistake_in_xlas_description_is_one_line(tmp_path):
    shutil.copy(card.CARDS / "h100.toml", tmp_path / "mine.toml")
    text = (card.CARDS / "h100.txtpb").read_text()
    (tmp_path / "mine.txtpb").write_text(text.replace("device_memory_size: 84942979072", ""))
    with pytest.raises(UserError, match=r"mine\.txtpb: 'device_memory_size' is missing"):
        card.parse(str(tmp_path / "mine.toml"))


def test_the_doctor_refuses_mistakes_in_one_line(own_base_dir):
    def doctor(*flags):
        environment = tiny.environment(own_base_dir, 1)
        command = [sys.executable, "-m", "scripts.doctor", "--config=d20", *flags]
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)

    for flags, words in (
        (["--target=h999:8"], "--target=h999:8: unknown GPU"),
        (["--price_per_hour=20"], "need --target"),
    ):
        done = doctor(*flags)
        assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ") and words in done.stderr


def test_without_the_compiler_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compiled, "PLUGINS", ("no_such_plugin",))
    with pytest.raises(UserError, match=r"bash setup\.sh aot"):
        compiled.check_compiler()
