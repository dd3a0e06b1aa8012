"""Stop signals in a storm of output: nothing crashes, training saves first, and the exit status names the signal."""

import itertools
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import killable
import pytest
import tiny

from nanochat_jax import checkpoint, run_log
from nanochat_jax.config import REPOSITORY, STAGES

# Runs a command whose every step prints 200 lines, so that most signals arrive in the middle of `print`.
NOISY = """
import runpy, sys
from nanochat_jax import run_log

append = run_log.append

def noisy(*args, **fields):
    for i in range(200):
        print("x" * 200)
    append(*args, **fields)

run_log.append = noisy
from nanochat_jax.data import parquet
texts_of = parquet.texts_of

def noisy_texts(path):
    for text in texts_of(path):
        print("x" * 200)
        yield text

parquet.texts_of = noisy_texts

# While the file `block` exists, the function that $BLOCKED names waits each time before it starts.
import importlib, os, time
if "BLOCKED" in os.environ:
    module, *owner, name = os.environ["BLOCKED"].split(":")
    owner = importlib.import_module(module) if not owner else getattr(importlib.import_module(module), owner[0])
    real = getattr(owner, name)

    def blocked(*args, **kwargs):
        while os.path.exists(block := os.environ["NANOCHAT_BASE_DIR"] + "/block"):
            open(block + "ed", "w").close()
            time.sleep(0.01)
        return real(*args, **kwargs)

    setattr(owner, name, blocked)

sys.argv[0] = sys.argv[1]
del sys.argv[1]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base folder with a corpus, a tokenizer, and a finished run of every stage."""
    base = tmp_path_factory.mktemp("world")
    tiny.make_world(base)
    return base


@pytest.fixture(autouse=True)
def in_world(own_base_dir, world, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world))


@pytest.fixture(scope="module")
def parent(world):
    """parent(stage, tag) makes the run of the stage before, with this tag, for a run of the same tag to start from."""

    def make(stage, tag):
        before = STAGES[: STAGES.index(stage)]
        for each in before:
            output = world / f"{each}.txt"
            assert killable.run(each, world, output, model_tag="parent", num_iterations=2) == 0, output.read_text()
        if before and tag != "parent":
            shutil.copytree(checkpoint.run_dir(before[-1], "parent"), checkpoint.run_dir(before[-1], tag))

    return make


def noisy(world, command: list[str], **environment: str) -> subprocess.Popen:
    """Starts `command`, [python, "-m", module, flags ...], with a lot of output that a thread reads."""
    argv, env = [sys.executable, "-c", NOISY, *command[2:]], tiny.environment(world) | environment
    process = subprocess.Popen(argv, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.lines = []
    reader = threading.Thread(target=lambda: process.lines.extend(process.stdout), daemon=True)
    reader.start()
    process.reader = reader
    return process


def text_of(process: subprocess.Popen) -> str:
    process.reader.join(30)
    return re.sub(rb"x{200}\n?", b"", b"".join(process.lines)).decode()


def storm(process: subprocess.Popen, signals, pause: float, seconds: float = 120.0) -> None:
    """Sends signals in turn until the process ends."""
    deadline = time.monotonic() + seconds
    for signum in itertools.cycle(signals):
        if process.poll() is not None:
            return
        process.send_signal(signum)
        time.sleep(pause)
        assert time.monotonic() < deadline, "the process does not end"


def steps_logged(folder) -> int:
    return max((r["step"] for r in run_log.read(folder) if r["kind"] == "train"), default=0)


def wait_for(condition, process, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, text_of(process)
        time.sleep(0.005)
    assert process.poll() is None, text_of(process)


def assert_saved_and_resumable(folder, process, codes):
    text = text_of(process)
    assert process.returncode in codes, text
    assert "Traceback" not in text and "reentrant" not in text, text
    assert text.count("stopping after this step") == 1
    (saved,) = checkpoint.steps(folder)
    assert f"saved at step {saved}: run the same command again to resume" in text
    assert saved == steps_logged(folder) > 0, "not a step is lost"


STORM = {"num_iterations": 100_000, "save_every": -1, "keep_last": 1}


@pytest.mark.parametrize(
    ("stage", "signals"),
    [("base", [signal.SIGTERM]), ("base", [signal.SIGHUP, signal.SIGTERM]), ("rl", [signal.SIGTERM]),
     pytest.param("mid", [signal.SIGTERM, signal.SIGHUP], marks=pytest.mark.slow),
     pytest.param("sft", [signal.SIGTERM], marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_storm_of_signals_in_a_storm_of_output_saves_once(stage, signals, world, parent):
    tag = stage + "".join(str(int(s)) for s in signals)
    parent(stage, tag)
    command = tiny.command(stage, model_tag=tag, **STORM)
    folder = checkpoint.run_dir(stage, tag)
    process = noisy(world, command)
    wait_for(lambda: steps_logged(folder) >= 3, process)
    storm(process, signals, 0.001)
    assert_saved_and_resumable(folder, process, {128 + s for s in signals})


def test_a_ctrl_c_that_comes_twice_is_one_and_a_later_one_stops_at_once(world):
    """`uv run` and the terminal both send it. A person presses it again."""
    folder = checkpoint.run_dir("base", "twice")
    process = noisy(world, tiny.command("base", model_tag="twice", **STORM))
    wait_for(lambda: steps_logged(folder) >= 3, process)
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    process.wait(60)
    assert_saved_and_resumable(folder, process, {130})


# -----------------------------------------------------------------------------
# What happens in the middle of an evaluation

BPB, ENGINE = "nanochat_jax.evals.bpb:_sums", "nanochat_jax.engine.engine:Engine:step"
METRICS = {"eval_metrics_every": 4, "eval_metrics_tasks": "sums", "eval_metrics_max_problems": 4}
BASE_VAL, BASE_SAMPLE = ("base", BPB, {"eval_every": 4}), ("base", ENGINE, {"sample_every": 4})
RL = ("rl", "nanochat_jax.training.rl:evaluate", {"eval_every": 2, "eval_examples": 2, "eval_samples": 2})


@pytest.fixture
def evaluating(world, parent):
    """Starts a run, and waits until it is in the middle of an evaluation after at least one step."""
    block = world / "block"

    def start(case, name):
        stage, blocked, flags = case
        tag = f"{stage}{name}"
        parent(stage, tag)
        folder = checkpoint.run_dir(stage, tag)
        command = tiny.command(stage, **STORM | {"model_tag": tag} | flags)
        process = noisy(world, command, BLOCKED=blocked)
        wait_for(lambda: steps_logged(folder) >= 1, process)
        block.touch()
        wait_for((world / "blocked").exists, process)
        return process, folder, command

    yield start
    block.unlink(missing_ok=True)
    (world / "blocked").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "case",
    [BASE_VAL, ("sft", ENGINE, METRICS), RL,
     pytest.param(BASE_SAMPLE, marks=pytest.mark.slow),
     pytest.param(("mid", BPB, {"eval_every": 4}), marks=pytest.mark.slow)],
    ids=lambda case: "-".join(case[:2]).rpartition(":")[0].replace(":", "."),
)  # fmt: skip
def test_a_signal_ends_an_evaluation_and_the_run_is_saved(case, evaluating, world):
    """A scheduler sends SIGKILL soon after SIGTERM, and CORE takes longer than that."""
    process, folder, command = evaluating(case, "signal")
    sent = time.monotonic()
    storm(process, [signal.SIGTERM], 0.01)
    took = time.monotonic() - sent
    assert_saved_and_resumable(folder, process, {143})
    assert took < 60, f"{took:.0f} s, although the evaluation would have waited for ever"
    if case != BASE_VAL:
        return
    (saved,) = checkpoint.steps(folder)
    assert saved not in evaluated(folder), "the evaluation was cut short"
    (world / "block").unlink()
    again = noisy(world, command)
    wait_for(lambda: saved in evaluated(folder), again)
    again.terminate()
    again.wait(60)
    assert again.returncode == 143


def evaluated(folder) -> set[int]:
    return {r["step"] for r in run_log.read(folder) if r["kind"] == "val"}


def test_validation_text_that_vanishes_costs_nothing(evaluating, world):
    process, folder, _ = evaluating(BASE_VAL, "vanishes")
    (val,) = world.glob("data/*/val_*.parquet")
    hidden = val.rename(val.with_suffix(".hidden"))
    try:
        (world / "block").unlink()
        process.wait(60)
    finally:
        hidden.rename(val)
    text = text_of(process)
    assert process.returncode == 2 and "Traceback" not in text, text
    (saved,) = checkpoint.steps(folder)[-1:]
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: ") and str(val) in last, text
    assert saved == steps_logged(folder)


def test_a_disk_that_is_full_during_an_evaluation_is_one_line(evaluating, world):
    process, folder, _ = evaluating(BASE_SAMPLE, "full")
    log = folder / run_log.LOG
    kept = log.rename(log.with_suffix(".kept"))
    log.symlink_to("/dev/full")  # every write fails with ENOSPC
    (world / "block").unlink()
    process.wait(60)
    log.unlink()
    kept.rename(log)
    text = text_of(process)
    assert process.returncode == 2 and "Traceback" not in text, text
    last = text.strip().splitlines()[-1]
    assert re.match(r"error: an evaluation at step \d+ failed: .*No space left on device.*: make room and run", last), (
        last
    )
    assert checkpoint.steps(folder) == [steps_logged(folder)], "sampling is preceded by a checkpoint"
