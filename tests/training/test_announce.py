"""What a run says before its first step and at its end, --dry_run, and how Python's garbage collector is held off."""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import killable
import pytest
import tiny

from nanochat_jax import checkpoint, commandline, config, run_log
from nanochat_jax.config import REPOSITORY, STAGES
from nanochat_jax.training import loop, rl
from nanochat_jax.training import run as run_module
from nanochat_jax.training.garbage import HeldOffGarbage

pytestmark = pytest.mark.usefixtures("in_world")


@pytest.fixture(scope="module")
def printed(world):
    """What each stage prints, trained in one process after the other."""
    texts = {}
    short = world / "short.jsonl"  # sft would skip a conversation whose answer does not fit in a row
    talk = [{"role": "user", "content": "cat?"}, {"role": "assistant", "content": "A small dog near a red tree."}]
    short.write_text(f"{json.dumps(talk)}\n" * 12)
    for stage in STAGES:
        output = world / f"{stage}.txt"
        flags = {"num_iterations": 14 if stage == "base" else 3, "model_tag": "plan", "save_every": -1}
        if stage in ("mid", "sft"):
            flags["num_iterations"] = -1  # as long as the data last
            flags["mixture"] = "sums=8,identity=4" if stage == "mid" else f"customjson:{short}=0"
        assert killable.run(stage, world, output, **flags) == 0, output.read_text()
        texts[stage] = output.read_text()
    return texts


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_announces_steps_flops_and_time(stage, printed):
    text = printed[stage]
    facts = dict(re.findall(r"^  ([\w ]+): (.+)$", text, re.M))
    assert {"model", "parameters", "FLOPs per token", "batch", "mesh", "steps", "total FLOPs", "expected time"} <= {
        *facts
    }
    assert "the peak FLOP/s of this device are not known" in facts["expected time"]
    number = float(facts["total FLOPs"].split()[-1])
    per_token = float(facts["FLOPs per token"])
    if stage == "base":
        assert facts["steps"] == "14 (3,584 tokens)" and number == pytest.approx(3584 * per_token, rel=1e-3)
    elif stage == "rl":
        assert facts["steps"] == "3" and facts["total FLOPs"].startswith("at most ")
        assert 3 * 2 * 4 * 8 * per_token < number < 3 * 2 * 4 * 64.1 * per_token, "3 steps, 8 answers of 8 tokens"
        assert float(facts["epochs"].removeprefix("about ")) < 1
        assert "4 answers each" in facts["task"] and "sampling the answers takes longer" in facts["expected time"]
    else:
        about = int(re.match(r"about (\d+) \(one pass over the data\)$", facts["steps"])[1])
        taken = int(re.search(rf"^{stage}: done, (\d+) step", text, re.M)[1])
        assert facts["epochs"] == "1"
        assert abs(about - taken) <= 1 + 0.3 * taken and facts["total FLOPs"].startswith("about ")


def test_the_training_time_leaves_out_the_first_ten_steps(printed, world):
    folder = checkpoint.run_dir("base", "plan")
    steps = {r["step"]: r["dt"] for r in run_log.read(folder) if r["kind"] == "train"}
    total = checkpoint.read_meta(folder, 14)["totals"]["seconds"]
    assert total == pytest.approx(sum(steps[i] for i in range(11, 15))) and steps[1] is None
    assert re.search(r"^base: done, 14 steps in \d+s \(without the first 10\)$", printed["base"], re.M)
    assert re.search(r"^rl: done, 3 steps$", printed["rl"], re.M)
    line = re.search(r"^step 14/14 .*$", printed["base"], re.M)[0]
    assert f"| total {total / 60:.2f}m |" in line


def test_the_training_time_of_a_resumed_run_adds_up(world):
    output, flags = world / "parts.txt", {"model_tag": "parts", "num_iterations": 24, "save_every": -1}
    folder = checkpoint.run_dir("base", "parts")
    process = killable.start("base", world, output, **flags | {"save_every": 13})
    killable.until(lambda: 13 in checkpoint.steps(folder), process)
    killable.kill(process)
    first = checkpoint.read_meta(folder, 13)["totals"]["seconds"]
    assert killable.run("base", world, output, **flags) == 0, output.read_text()
    steps = {r["step"]: r["dt"] for r in run_log.read(folder) if r["kind"] == "train"}
    assert steps[14] is None, "the first step of a process is compiled"
    total = checkpoint.read_meta(folder, 24)["totals"]["seconds"]
    assert total == pytest.approx(first + sum(steps[i] for i in range(15, 25)))
    shown = re.findall(r"^step 24/24 .* total ([\d.]+)m", output.read_text(), re.M)
    assert shown == [f"{total / 60:.2f}"]


# -----------------------------------------------------------------------------
# --dry_run


def contents(base: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(base.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_says_what_a_run_would_do_and_writes_nothing(stage, printed, world):
    before = contents(world)
    output = world.parent / f"{world.name}-dry-{stage}.txt"
    flags = {"model_tag": "plan", "resume": "never", "dry_run": 1, "num_iterations": 14 if stage == "base" else 3}
    assert killable.run(stage, world, output, **flags) == 0, output.read_text()
    assert contents(world) == before
    text = output.read_text()
    assert text.endswith("dry run: nothing was trained, and no run was written\n") and "\nstep 1" not in text

    def plan(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("  ")]

    if stage in ("base", "rl"):
        assert plan(text) == plan(printed[stage])
    assert f"/{stage}_checkpoints/plan" in text and "total FLOPs: " in text


def test_a_dry_run_of_a_large_model_needs_no_memory(world):
    """d20 would need 7 GB for its weights and its optimizer's state."""
    flags = ["--stage=base", "--depth=20", "--dry_run", "--model_tag=huge", "--num_iterations=5", "--max_epochs=100"]
    command = [sys.executable, "tests/support/peak_memory.py", "scripts.train", *flags]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=tiny.environment(world), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and "20 layers, width 1280" in done.stdout, done.stderr
    assert int(re.search(r"Peak: (\d+) MiB", done.stdout)[1]) < 1500
    assert not checkpoint.run_dir("base", "huge").exists()


# -----------------------------------------------------------------------------
# The garbage collector


def test_garbage_is_collected_after_the_first_step_and_then_seldom():
    collected = []
    gc.callbacks.append(count := lambda phase, info: collected.append(info) if phase == "start" else None)
    try:
        with HeldOffGarbage(every=100) as garbage:
            assert gc.isenabled()
            garbage.between_steps()  # before the first step
            garbage.between_steps()  # after it
            assert not gc.isenabled() and gc.get_freeze_count() > 1000
            collected.clear()
            for _ in range(250):
                garbage.between_steps()
                cycle = []
                cycle.append(cycle)
            assert len(collected) == 2
        assert gc.isenabled() and gc.get_freeze_count() == 0
    finally:
        gc.callbacks.remove(count)


def test_a_failing_run_turns_the_collector_on_again():
    with pytest.raises(ValueError, match="a step"), HeldOffGarbage() as garbage:
        garbage.between_steps()
        garbage.between_steps()
        raise ValueError("a step")
    assert gc.isenabled() and gc.get_freeze_count() == 0


def resident() -> int:
    """The memory of this process in KiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of the process from /proc")
@pytest.mark.parametrize("stage", ["base", pytest.param("rl", marks=pytest.mark.slow)])
def test_memory_does_not_grow_while_the_collector_is_held_off(stage, world, monkeypatch, request):
    """500 steps, without any collection between them."""
    memory = {}
    count_time = run_module.Run.count_time

    def measured(self, step, seconds):
        memory[step] = resident()
        assert not gc.isenabled()
        count_time(self, step, seconds)

    monkeypatch.setattr(run_module.Run, "count_time", measured)
    if stage == "base":
        loop.train(tiny.base_config(model_tag="memory", num_iterations=550, save_every=-1))
    else:
        request.getfixturevalue("printed")
        flags = {"model_tag": "plan", "resume": "never", "num_iterations": 550, "save_every": -1, "eval_every": -1}
        rl.train(commandline.parse(config.Rl, tiny.command("rl", **flags)[4:]))
    assert memory[540] - memory[40] < 20_000, f"{memory[40]} KiB at step 40, {memory[540]} at step 540"
