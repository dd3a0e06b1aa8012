"""Stop signals in a storm of output, and what goes wrong during an evaluation: training saves first, in one line."""

import contextlib
import functools
import itertools
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time

import disturbed
import killable
import pytest
import tiny

from nanochat_jax import checkpoint, run_log
from nanochat_jax.config import REPOSITORY, STAGES

pytestmark = pytest.mark.usefixtures("in_world")

STORM = {"num_iterations": 100_000, "save_every": -1, "keep_last": 1}
BPB, ENGINE = "nanochat_jax.evals.bpb:_sums", "nanochat_jax.engine.engine:Engine:step"
METRICS = {"eval_metrics_every": 4, "eval_metrics_tasks": "sums", "eval_metrics_max_problems": 4}
# An evaluation: its stage, the function in which a test stops it, and the flags with which it runs.
BASE_VAL, BASE_SAMPLE = ("base", BPB, {"eval_every": 4}), ("base", ENGINE, {"sample_every": 4})
MID_VAL, SFT_METRICS = ("mid", BPB, {"eval_every": 4}), ("sft", ENGINE, METRICS)
RL = ("rl", "nanochat_jax.training.rl:evaluate", {"eval_every": 2, "eval_examples": 2, "eval_samples": 2})


@pytest.fixture(scope="module")
def parent(world):
    """parent(stage, tag) makes the run of the stage before, with this tag, for a run of the same tag to start from."""
    made = set()

    def make(stage, tag):
        before = STAGES[: STAGES.index(stage)]
        for each in before:
            if each in made:
                continue
            made.add(each)
            output = world / f"{each}.txt"
            assert killable.run(each, world, output, model_tag="parent", num_iterations=2) == 0, output.read_text()
        if before:
            folder = checkpoint.run_dir(before[-1], tag)
            shutil.copytree(folder.with_name("parent"), folder, dirs_exist_ok=True)

    return make


def steps_logged(folder) -> int:
    return max((r["step"] for r in run_log.read(folder) if r["kind"] == "train"), default=0)


def evaluated(folder) -> set[int]:
    return {r["step"] for r in run_log.read(folder) if r["kind"] == "val"}


def storm(pid: int, alive, signals, pause: float, seconds: float = 120.0) -> None:
    """Sends signals in turn until the process has ended."""
    deadline = time.monotonic() + seconds
    for signum in itertools.cycle(signals):
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            return
        if not alive():
            return
        time.sleep(pause)
        assert time.monotonic() < deadline, "the process does not end"


def text_of(output) -> str:
    return re.sub(r"x{200}\n?", "", output.read_text())


def assert_saved_and_resumable(folder, code, codes, text):
    assert code in codes, text
    assert "Traceback" not in text and "reentrant" not in text, text
    assert text.count("stopping after this step") == 1
    (saved,) = checkpoint.steps(folder)
    assert f"saved at step {saved}: run the same command again to resume" in text
    assert saved == steps_logged(folder) > 0, "not a step is lost"


# -----------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize(
    ("stage", "signals"),
    [("base", [signal.SIGHUP, signal.SIGTERM]), ("rl", [signal.SIGTERM]), ("mid", [signal.SIGTERM]),
     pytest.param("sft", [signal.SIGTERM, signal.SIGHUP], marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_storm_of_signals_in_a_storm_of_output_saves_once(stage, signals, world, parent):
    tag, output = f"{stage}storm", world / f"{stage}storm.txt"
    parent(stage, tag)
    folder = checkpoint.run_dir(stage, tag)
    process = killable.start(stage, world, output, before=disturbed.print_a_lot, model_tag=tag, **STORM)
    assert killable.until(lambda: steps_logged(folder) >= 3, process), output.read_text()
    storm(process.pid, process.is_alive, signals, 0.001)
    process.join()
    assert_saved_and_resumable(folder, process.exitcode, {128 + s for s in signals}, text_of(output))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("moment", range(5))
def test_a_storm_at_any_moment_crashes_nothing(stage, moment, world, parent):
    """From the import of JAX to the end. Before the first step there is nothing to save."""
    tag, output = f"{stage}{moment}", world / f"{stage}{moment}.txt"
    parent(stage, tag)
    process = killable.start(stage, world, output, before=disturbed.print_a_lot, model_tag=tag, **STORM)
    time.sleep(0.7 * moment)
    storm(process.pid, process.is_alive, [signal.SIGTERM], 0.001)
    process.join()
    text = text_of(output) if output.exists() else ""
    assert process.exitcode in (143, -15) and "Traceback" not in text, text  # -15: before the command has begun
    folder = checkpoint.run_dir(stage, tag)
    assert "stopping after" not in text or checkpoint.steps(folder) == [steps_logged(folder)]


def test_to_the_very_end_of_the_process(world):
    """Python ends slowly, with JAX's exit handlers, and a signal may still come. A Ctrl-C that comes twice is one."""
    folder, output = checkpoint.run_dir("base", "end"), world / "end.txt"
    with open(output, "w") as file:
        process = subprocess.Popen(
            tiny.command("base", model_tag="end", **STORM), cwd=REPOSITORY, env=tiny.environment(world), stdout=file,
            stderr=file,
        )  # fmt: skip
    while steps_logged(folder) < 3:
        assert process.poll() is None, output.read_text()
        time.sleep(0.01)
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    storm(process.pid, lambda: process.poll() is None, [signal.SIGTERM], 0.001)
    assert_saved_and_resumable(folder, process.returncode, {130}, text_of(output))


def test_training_goes_on_when_nobody_reads_its_output(world):
    """As when the `tee` behind a pipe is killed, or the terminal is closed under nohup."""
    folder = checkpoint.run_dir("base", "unread")
    reading, writing = os.pipe()
    process = subprocess.Popen(
        tiny.command("base", model_tag="unread", num_iterations=60), cwd=REPOSITORY, env=tiny.environment(world),
        stdout=writing, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writing)
    with open(reading) as output:
        assert any("step 1/60" in line for line in output)
    _, errors = process.communicate(timeout=300)
    assert "Traceback" not in errors and steps_logged(folder) == 60 and checkpoint.steps(folder)[-1] == 60, errors


# -----------------------------------------------------------------------------
# In the middle of an evaluation


@pytest.fixture
def evaluating(world, parent):
    """Starts a run, and waits until it is in the middle of an evaluation after at least one step."""
    block = world / "block"

    def start(case, tag, **more):
        stage, function, flags = case
        parent(stage, tag)
        folder, output = checkpoint.run_dir(stage, tag), world / f"{tag}.txt"
        output.unlink(missing_ok=True)
        done = steps_logged(folder)
        before = functools.partial(disturbed.both, function, block)
        process = killable.start(stage, world, output, before=before, model_tag=tag, **STORM | flags | more)
        assert killable.until(lambda: steps_logged(folder) > done, process), output.read_text()
        block.with_name("blocked").unlink(missing_ok=True)
        block.touch()
        assert killable.until(block.with_name("blocked").exists, process), output.read_text()
        return process, folder, output

    yield start
    block.unlink(missing_ok=True)
    block.with_name("blocked").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "case",
    [BASE_VAL, *(pytest.param(case, marks=pytest.mark.slow) for case in (RL, BASE_SAMPLE, MID_VAL, SFT_METRICS))],
    ids=lambda case: f"{case[0]}-{case[1].split(':')[-1]}",
)
def test_a_signal_ends_an_evaluation_and_the_run_is_saved(case, evaluating, world):
    """A scheduler sends SIGKILL soon after SIGTERM, and CORE takes longer than that."""
    process, folder, output = evaluating(case, f"{case[0]}-{case[1].rpartition(':')[2]}")
    storm(process.pid, process.is_alive, [signal.SIGTERM], 0.01, seconds=60)
    process.join()
    assert_saved_and_resumable(folder, process.exitcode, {143}, text_of(output))
    if case != BASE_VAL:
        return
    (saved,) = checkpoint.steps(folder)
    assert saved not in evaluated(folder), "the evaluation was cut short"
    again = killable.start("base", world, output, model_tag=folder.name, **STORM | case[2])
    assert killable.until(lambda: saved in evaluated(folder), again), output.read_text()
    killable.kill(again)


@contextlib.contextmanager
def full(world, folder):
    log = folder / run_log.LOG
    kept = log.rename(log.with_suffix(".kept"))
    log.symlink_to("/dev/full")  # every write fails with ENOSPC
    yield "No space left on device.*: make room and run the same command again"
    log.unlink()
    kept.rename(log)


@contextlib.contextmanager
def vanished(pattern, says, world, folder):
    (path,) = world.glob(pattern)
    hidden = path.rename(path.with_name("hidden"))
    yield re.escape(str(path)) + ".*" + says
    hidden.rename(path)


CORE = ("base", "nanochat_jax.evals.core:evaluate", {"core_metric_every": 4})
SFT_VAL = ("sft", BPB, {"eval_every": 4})
NO_TEXT, NO_CORE = (
    functools.partial(vanished, *what)
    for what in (("data/*/val_*.parquet", ""), ("core", "expected the unpacked http"))
)
# What goes wrong in the evaluations of a stage, in one run that is resumed each time.
TROUBLES = {
    "base": [(BASE_VAL, NO_TEXT), (BASE_VAL, full), (CORE, NO_CORE), (CORE, full), (BASE_SAMPLE, full)],
    "mid": [(MID_VAL, full)],
    "sft": [(SFT_VAL, full), (SFT_METRICS, full)],
    "rl": [(RL, full)],
}


@pytest.fixture(scope="module")
def core_dir(world):
    """A CORE bundle with one task."""
    folder = world / "core"
    (folder / "eval_data").mkdir(parents=True)
    items = [json.dumps({"context": f"the cat sees {i}", "continuation": "the dog"}) for i in range(4)]
    (folder / "eval_data" / "one.jsonl").write_text("\n".join(items))
    task = {"label": "one", "dataset_uri": "one.jsonl", "num_fewshot": [1], "icl_task_type": "language_modeling"}
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": [task]}))
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\none,0\n")
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_trouble_in_an_evaluation_is_one_line_and_costs_nothing(stage, evaluating, world, core_dir):
    """A full disk, text or tasks that are gone, and at the end a signal: each time, the same command resumes."""
    tag, resumed_at = f"{stage}-trouble", 0
    for case, trouble in TROUBLES[stage]:
        process, folder, output = evaluating(case, tag, **({"core_dir": core_dir} if case == CORE else {}))
        assert f"resuming at step {resumed_at}" in text_of(output) or not resumed_at, text_of(output)
        with trouble(world, folder) as says:
            (world / "block").unlink()
            process.join(60)
        text = text_of(output)
        assert process.exitcode == 2 and "Traceback" not in text and "not saved" not in text, text
        last = text.strip().splitlines()[-1]
        assert re.match(f"error: .*{says}", last), last
        (step,) = checkpoint.steps(folder)
        assert step == steps_logged(folder) > resumed_at, "not a step is lost"
        assert trouble is not full or last.startswith(f"error: an evaluation at step {step} failed: "), last
        resumed_at = step
    process, folder, output = evaluating(case, tag)
    storm(process.pid, process.is_alive, [signal.SIGTERM], 0.01, seconds=60)
    process.join()
    assert f"resuming at step {resumed_at}" in text_of(output)
    assert_saved_and_resumable(folder, process.exitcode, {143}, text_of(output))


PRINTS_AFTER_HANGUP = """
import sys, time
from nanochat_jax.training.interruption import Interruption
with Interruption() as interruption:
    print("ready", flush=True)
    while interruption.received is None:
        time.sleep(0.01)
    for _ in range(100):
        print("still training", flush=True)
    with open(sys.argv[1], "w") as saved:
        saved.write(str(int(interruption.received)))
"""


def test_a_closed_terminal_does_not_end_what_is_being_saved(tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", PRINTS_AFTER_HANGUP, str(tmp_path / "saved")])
    try:
        assert b"ready" in os.read(terminal, 100)
    finally:
        os.close(terminal)  # the kernel hangs up: SIGHUP, and every write to the terminal fails
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "saved").read_text() == str(int(signal.SIGHUP))


# -----------------------------------------------------------------------------
# Where exceptions are lost

IN_A_CALLBACK = """
import gc, os, signal, sys, time
from nanochat_jax import commandline, config
from nanochat_jax.training.interruption import Interruption, StopRequested

name, where = sys.argv[1:]
sys.argv[1:] = ["generate"]

def _xla_gc_callback(phase, info):
    if phase == "start":
        gc.callbacks.remove(_xla_gc_callback)
        os.kill(os.getpid(), getattr(signal, name))

def collect():
    gc.callbacks.append(_xla_gc_callback)
    gc.collect()
    time.sleep(20)

class Deleted:
    def __del__(self):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.001)  # the handler runs here

def delete():
    Deleted()
    time.sleep(20)

def main(cfg):
    if where == "command":
        collect()
    with Interruption() as interruption:
        try:
            with interruption.raise_at_signal():
                delete() if where == "deletion" else collect()
        except StopRequested:
            print("stop requested", interruption.received, flush=True)
            os._exit(0)

commandline.run(main, config.Report)
"""


@pytest.mark.parametrize(
    ("name", "where", "status", "said"),
    [("SIGTERM", "command", 143, "stopped"), ("SIGINT", "command", 130, "stopped"),
     ("SIGTERM", "training", 0, "stop requested 15"), ("SIGTERM", "deletion", 0, "stop requested 15")],
)  # fmt: skip
def test_a_signal_during_garbage_collection_is_not_lost(own_base_dir, name, where, status, said):
    """Python ignores what __del__ and callbacks of the garbage collector raise, and JAX has such a callback.

    After a lost signal, the program would sleep for 20 seconds and end with another status.
    """
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CALLBACK, name, where], cwd=REPOSITORY, env=tiny.environment(own_base_dir),
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == status and said in done.stdout + done.stderr, done.stderr
    assert "ignored" not in done.stderr
