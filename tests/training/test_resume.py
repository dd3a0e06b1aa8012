"""No run is ever lost: killed anywhere and started again, it equals the run that was never interrupted."""

import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time

import jax
import killable
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from nanochat_jax import checkpoint, commandline, config, run_log
from nanochat_jax.config import STAGES, UserError
from nanochat_jax.data import dataloader, sources, text_folder, token_cache
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.training import loop as training
from nanochat_jax.training import rl, validation

pytestmark = pytest.mark.usefixtures("in_world")

STEPS = {"base": 24, "mid": 24, "sft": 24, "rl": 12}
CLOCKS = {"time", "dt", "tok_per_s", "mfu", "loader_wait", "sampling_seconds"}  # differ from run to run


@pytest.fixture(scope="module")
def world(world):
    """The tiny world. Runs with the tag `whole` are never interrupted."""
    (world / "whole.toml").write_text("seed = 7\n")  # a preset, after which the uninterrupted runs are named
    return world


def flags(world, stage, **changes):
    parent = {} if stage == "base" else {"source_tag": "whole"}
    return {"config": world / "whole.toml", "num_iterations": STEPS[stage], "save_every": 2} | parent | changes


@pytest.fixture(scope="module")
def whole(world):
    """The uninterrupted runs of a stage and of the stages before it, each trained once."""
    made = {}

    def upto(stage):
        for each in STAGES[: STAGES.index(stage) + 1]:
            if each not in made:
                output = world / f"{each}.txt"
                assert killable.run(each, world, output, **flags(world, each)) == 0, output.read_text()
                made[each] = True
        return checkpoint.run_dir(stage, "whole")

    return upto


def records(run, kind="train"):
    """The log record of each step, without times and speeds."""
    return {r["step"]: {k: v for k, v in r.items() if k not in CLOCKS} for r in run_log.read(run) if r["kind"] == kind}


def logged(run):
    return max((r["step"] for r in run_log.read(run) if r["kind"] == "train"), default=0)


def logged_at(run, step):
    (record,) = (r for r in run_log.read(run) if r["kind"] == "train" and r["step"] == step)
    return record


def lines(run):
    log = run / run_log.LOG
    return log.read_bytes().count(b"\n") if log.exists() else 0


def unfinished(run):
    return [p for p in run.glob("step_*") if not (p / checkpoint.MANIFEST).exists()]


def content(run, step):
    """What a checkpoint holds, without times: parameters and optimizer state, the position in the data, the totals."""
    from orbax.checkpoint import v1 as ocp

    folder = checkpoint.step_dir(run, step)
    assert checkpoint.damage(folder) is None
    arrays = ocp.load_checkpointables(folder)
    meta = checkpoint.read_meta(run, step)
    plain = {k: meta[k] for k in ("step", "stage", "model", "tokenizer", "parent")}
    plain |= {k: meta["totals"][k] for k in ("tokens", "flops")}
    plain["train"] = {k: v for k, v in meta["metrics"]["train"].items() if k not in CLOCKS}
    return arrays, plain, (folder / "data.json").read_text()


def assert_same_run(a, b):
    assert records(a) == records(b)
    assert checkpoint.steps(a) == checkpoint.steps(b)
    for step in checkpoint.steps(a):
        (arrays, *rest), (other_arrays, *other_rest) = content(a, step), content(b, step)
        assert rest == other_rest
        jax.tree.map(np.testing.assert_array_equal, arrays, other_arrays)


# -----------------------------------------------------------------------------
# SIGKILL


def live_and_die(stage, world, whole, kills, seed):
    """Kills a run `kills` times at random moments, every other time during a save; lets it finish, and compares it."""
    expected = whole(stage)
    tag = f"{stage}{kills}"
    run, output, rng = checkpoint.run_dir(stage, tag), world / f"{tag}.txt", random.Random(seed)
    times = [r["time"] for r in run_log.read(expected) if r["kind"] == "train"]
    a_step = float(np.median(np.diff(times)))
    killed, while_saving = 0, 0
    for i, target in enumerate(sorted(rng.choices(range(1, STEPS[stage] - 3), k=kills))):
        before = lines(run)
        process = killable.start(stage, world, output, **flags(world, stage, model_tag=tag))
        killable.until(
            lambda at=target, n=before: lines(run) > n + 1 and logged(run) >= at, process
        )  # n + 1: its start
        if i % 2:
            killable.until(lambda: unfinished(run), process)
        else:
            time.sleep(rng.uniform(0, 2 * a_step))
        killed += killable.kill(process)
        while_saving += bool(unfinished(run))
    print(f"{stage}: {killed} killed, {while_saving} of them while saving")
    assert killable.run(stage, world, output, **flags(world, stage, model_tag=tag)) == 0, output.read_text()
    assert killed >= 0.9 * kills and while_saving, f"{killed} killed, {while_saving} of them while saving"
    assert_same_run(run, expected)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_twice_is_the_uninterrupted_run_bit_for_bit(stage, world, whole):
    live_and_die(stage, world, whole, kills=2, seed=stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_twenty_times_is_the_uninterrupted_run_bit_for_bit(stage, world, whole):
    live_and_die(stage, world, whole, kills=20, seed=stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_before_the_first_step_is_as_if_never_started(stage, world, whole):
    """While modules are imported, the text is opened and the first step is compiled, no checkpoint exists yet."""
    expected, tag, rng = whole(stage), f"{stage}early", random.Random(stage)
    output = world / f"{tag}.txt"
    for _ in range(10):
        process = killable.start(stage, world, output, **flags(world, stage, model_tag=tag))
        time.sleep(rng.uniform(0, 2.0))
        killable.kill(process)
    assert killable.run(stage, world, output, **flags(world, stage, model_tag=tag)) == 0, output.read_text()
    assert_same_run(checkpoint.run_dir(stage, tag), expected)


def test_the_uninterrupted_runs_learn_something(whole):
    """Otherwise all of the above would hold for a program that does nothing."""
    for stage in STAGES:
        arrays, *_ = content(whole(stage), STEPS[stage])
        before = content(whole(stage), checkpoint.steps(whole(stage))[0])[0]
        changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), arrays["params"], before["params"])
        assert all(jax.tree.leaves(changed)), stage


# -----------------------------------------------------------------------------
# Signals that can be handled, chosen steps, failing evaluations


@pytest.mark.parametrize(
    ("stage", "asked"),
    [("base", signal.SIGTERM), ("rl", signal.SIGTERM), pytest.param("sft", signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_run_that_is_asked_to_stop_saves_first_and_goes_on(stage, asked, world, whole):
    expected, tag = whole(stage), f"asked{asked}"
    run, output = checkpoint.run_dir(stage, tag), world / f"{stage}{tag}.txt"
    process = killable.start(stage, world, output, **flags(world, stage, model_tag=tag, save_every=-1))
    killable.until(lambda: logged(run) >= 5, process)
    os.kill(process.pid, asked)
    process.join(100)
    assert process.exitcode == 128 + asked and "run the same command again to resume" in output.read_text()
    (step,) = checkpoint.steps(run)
    assert step == logged(run) >= 5, "not a step is lost"
    assert killable.run(stage, world, output, **flags(world, stage, model_tag=tag)) == 0
    assert records(run) == records(expected)


def test_a_run_that_waits_for_text_is_stopped_at_once(world, whole, monkeypatch):
    """A shard may take an hour to arrive, but whoever sends SIGTERM waits half a minute."""
    real = dataloader.BatchIterator.__next__

    def stalls(self):
        if self._rows >= 6 * 4:
            self._batches.stop.wait(100)
            raise InterruptedError("stopped waiting for a shard")
        return real(self)

    def stop():
        while logged(run) < 5:
            time.sleep(0.01)
        time.sleep(0.5)  # the loop has asked for a batch that does not come
        os.kill(os.getpid(), signal.SIGTERM)

    cfg = tiny.base_config(model_tag="starved", num_iterations=STEPS["base"], seed=7, save_every=-1)
    run = checkpoint.run_dir("base", "starved")
    monkeypatch.setattr(dataloader.BatchIterator, "__next__", stalls)
    killer = threading.Thread(target=stop, daemon=True)
    killer.start()
    with pytest.raises(SystemExit) as ended:
        training.train(cfg)
    killer.join()
    assert ended.value.code == 128 + signal.SIGTERM
    assert checkpoint.steps(run) == [logged(run)] == [6]
    monkeypatch.setattr(dataloader.BatchIterator, "__next__", real)
    training.train(cfg)
    assert records(run) == records(whole("base"))


def test_a_failing_evaluation_costs_nothing(world, whole, monkeypatch):
    def fails_after(good):
        def sample(run, step):
            assert checkpoint.latest(run.dir) == step, "the checkpoint is complete, not still being written"
            if step > good:
                raise RuntimeError("an evaluation that fails")

        return sample

    cfg = tiny.base_config(model_tag="evaluated", num_iterations=STEPS["base"], seed=7, save_every=-1, sample_every=5)
    run = checkpoint.run_dir("base", "evaluated")
    for step in (5, 10):
        monkeypatch.setattr(validation, "sample", fails_after(step - 5))
        with pytest.raises(RuntimeError, match="an evaluation that fails"):
            training.train(cfg)
        assert checkpoint.latest(run) == logged(run) == step
    monkeypatch.undo()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world))
    training.train(cfg)
    assert records(run) == records(whole("base"))


def test_a_failing_validation_costs_nothing(world, whole, monkeypatch):
    """Only the first validation of a process follows a checkpoint, but a failing one saves before it ends the run."""
    real, calls, saved = validation.validate, [], {}

    def validate(run, step, stage):
        calls.append(step)
        saved[step] = checkpoint.latest(run.dir)
        if len(calls) == 3:
            raise RuntimeError("a validation that fails")
        real(run, step, stage)

    monkeypatch.setattr(validation, "validate", validate)
    cfg = {"model_tag": "validated", "num_iterations": STEPS["base"], "seed": 7, "save_every": -1}
    run = checkpoint.run_dir("base", "validated")
    with pytest.raises(RuntimeError, match="a validation that fails"):
        training.train(tiny.base_config(eval_every=5, **cfg))
    assert saved == {0: None, 5: None, 10: None} and checkpoint.steps(run) == [10]
    training.train(tiny.base_config(eval_every=6, keep_last=9, **cfg))
    assert calls == [0, 5, 10, 12, 18, 24] and (saved[12], saved[18]) == (12, 12)
    assert records(run) == records(whole("base"))


def test_text_that_fails_costs_nothing(world, whole, monkeypatch, capsys):
    """If a shard is damaged or stops coming, what was learned before is kept."""
    real = dataloader.BatchIterator.__next__

    def fails(self):
        if self._rows >= 6 * 4:
            raise UserError("a shard that cannot be read")
        return real(self)

    cfg = tiny.base_config(model_tag="torn", num_iterations=STEPS["base"], seed=7, save_every=-1)
    run = checkpoint.run_dir("base", "torn")
    monkeypatch.setattr(dataloader.BatchIterator, "__next__", fails)
    with pytest.raises(UserError, match="a shard that cannot be read"):
        training.train(cfg)
    assert "saved at step 6, before the error" in capsys.readouterr().out
    assert checkpoint.steps(run) == [logged(run)] == [6]
    monkeypatch.setattr(dataloader.BatchIterator, "__next__", real)
    training.train(cfg)
    assert records(run) == records(whole("base"))


def test_a_failing_evaluation_of_answers_costs_nothing(world, whole, monkeypatch):
    def evaluate(run, cfg, engine, task, step):
        if step:
            assert checkpoint.latest(run.dir) == step, "the checkpoint is complete, not still being written"
            raise RuntimeError("an evaluation that fails")

    whole("sft")
    monkeypatch.setattr(rl, "evaluate", evaluate)
    changes = {"model_tag": "judged", "save_every": 2, "eval_every": 3}
    argv = tiny.command("rl", **flags(world, "rl", **changes))
    cfg = commandline.parse(config.Rl, argv[argv.index("--stage=rl") + 1 :])
    with pytest.raises(RuntimeError, match="an evaluation that fails"):
        rl.train(cfg)
    run = checkpoint.run_dir("rl", "judged")
    assert checkpoint.steps(run) == [2, 3] and logged(run) == 3


def test_resuming_at_a_chosen_step_abandons_those_after_it(world, whole):
    cfg = {"model_tag": "chosen", "num_iterations": STEPS["base"], "seed": 7, "save_every": 2, "keep_last": 20}
    training.train(tiny.base_config(**cfg))
    run = checkpoint.run_dir("base", "chosen")
    assert checkpoint.steps(run) == list(range(2, STEPS["base"] + 1, 2))
    training.train(tiny.base_config(resume="6", **cfg))
    assert len(list(run.glob("abandoned_step_*"))) == STEPS["base"] // 2 - 3
    assert records(run) == records(whole("base"))


def test_the_texts_hashes_are_in_the_checkpoint_and_another_text_is_refused(world, tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("\n\n".join(f"the cat sees {i} dogs near a tree" for i in range(3000)))
    cfg = {"model_tag": "text", "num_iterations": 4, "data_dir": str(folder), "keep_every": 2, "keep_last": 1}
    training.train(tiny.base_config(**cfg))
    run = checkpoint.run_dir("base", "text")
    assert checkpoint.steps(run) == [2, 4]
    source = sources.open(data_dir=folder)
    text = {
        "source": "texts",
        "hash": source.hash,
        "validation": source.val_hash(),
        "files": 1,
        "names": [path.name for path in source.train_files],
        "data_dir": str(folder),
    }
    meta = checkpoint.read_meta(run, 4)
    assert meta["text"] == text
    assert meta["config"] == dataclasses.asdict(tiny.base_config(**cfg)) and meta["step"] == 4
    assert meta["tokenizer"] == Tokenizer.load(world / "tokenizer").hash
    assert meta["metrics"]["train"] == {k: v for k, v in logged_at(run, 4).items() if k in meta["metrics"]["train"]}
    assert meta["metrics"]["train"]["loss"] > 0
    assert meta["versions"].keys() >= {"commit", "python", "jax", "numpy", "flax", "optax", "orbax-checkpoint", "grain"}
    out = capsys.readouterr().out
    assert re.search(
        r"text: texts, 1 file of about [0-9.K]+ tokens; this run reads 1 of them, 0\.\d\d epochs$", out, re.M
    )
    place = r"\| 256 tokens \| total 0\.00m \| epoch \d shard 0 group \d \| waste 0\.0% \| wait \d+ ms \| eta n/a$"
    assert re.search(place, out, re.M), out

    (folder / "b.txt").write_text("another validation text")
    with pytest.raises(
        UserError, match=r"the text is not the one that .*step_000002 was trained on \(different hash, validation\)"
    ):
        training.train(tiny.base_config(resume="2", **cfg))


def test_a_run_of_earlier_versions_that_trained_on_the_test_file_is_refused(world, tmp_path, monkeypatch):
    """They trained on the first file and validated on the last, whatever the names."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("test", "train"):
        documents = [f"the {name} cat sees {i} dogs near a tree" for i in range(3000)]
        pq.write_table(pa.table({"text": documents}), folder / f"{name}.parquet")
    cfg = {"model_tag": "swapped", "num_iterations": 4, "data_dir": str(folder), "keep_last": 20}
    with monkeypatch.context() as patch:
        patch.setattr(text_folder, "role_of", lambda path: "train" if path.stem == "test" else "val")
        training.train(tiny.base_config(**cfg))
    with pytest.raises(
        UserError, match=r"step_000002 was trained on \(different validation\): choose another"
    ) as caught:
        training.train(tiny.base_config(resume="2", **cfg))
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_with_tokens_where_it_began_with_text(world, whole, capsys):
    cfg = {"model_tag": "tokens", "seed": 7, "num_iterations": STEPS["base"], "save_every": 2, "keep_last": 20}
    training.train(tiny.base_config(**cfg))
    source, tokenizer = sources.open(), Tokenizer.load(world / "tokenizer")
    cache_dir = token_cache.build(source, tokenizer)
    try:
        training.train(tiny.base_config(resume="10", **cfg))
    finally:
        shutil.rmtree(cache_dir)
    assert re.search(r"tokens, 1 of them already tokenized; this run reads 1 of them,", capsys.readouterr().out)
    run = checkpoint.run_dir("base", "tokens")
    assert records(run) == records(whole("base"))


# -----------------------------------------------------------------------------
# A full disk


def test_a_disk_that_fills_up_ends_the_run_with_one_line(world, whole):
    run, output = checkpoint.run_dir("base", "full"), world / "full.txt"
    run.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(run)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("not permitted to mount a small disk")
    try:
        (run / "ballast").write_bytes(bytes(600_000))
        code = killable.run("base", world, output, **flags(world, "base", model_tag="full", keep_last=20))
        last = output.read_text().strip().splitlines()[-1]
        assert code == 2 and last.startswith("error: could not save a checkpoint") and "the disk is full" in last
        kept = checkpoint.steps(run)
        assert kept and f"the last good checkpoint is step {kept[-1]}" in last
        (run / "ballast").unlink()
        assert killable.run("base", world, output, **flags(world, "base", model_tag="full")) == 0, output.read_text()
        assert records(run) == records(whole("base"))
    finally:
        subprocess.run(["umount", "-l", str(run)], check=True)


# -----------------------------------------------------------------------------
# Other devices


EIGHT_ROWS = {"model_tag": "on8", "device_batch_size": 1, "total_batch_size": 512, "num_iterations": 8, "keep_last": 9}


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [(1, {}), (2, {}), pytest.param(8, {"mesh": "data=4,model=2"}, id="4x2"),
     pytest.param(8, {"mesh": "data=4,model=2", "shard": "full"}, id="4x2 full", marks=pytest.mark.slow)],
)  # fmt: skip
def test_saved_on_eight_devices_resumed_on_others(devices, mesh, world):
    eight, output = checkpoint.run_dir("base", "on8"), world / "on8.txt"
    if not eight.exists():
        assert killable.run("base", world, output, 8, **EIGHT_ROWS) == 0, output.read_text()
    run = checkpoint.run_dir("base", f"on{devices}{len(mesh)}")
    shutil.copytree(eight, run, ignore=shutil.ignore_patterns("step_000006", "step_000008"))
    expected = records(run)
    resumed = EIGHT_ROWS | {"model_tag": run.name} | mesh
    assert killable.run("base", world, output, devices, **resumed) == 0, output.read_text()
    assert "resuming at step 4" in output.read_text()
    actual = records(run)
    assert actual.keys() == expected.keys() == set(range(1, 9))
    for step, record in expected.items():
        assert actual[step]["loss"] == pytest.approx(record["loss"], rel=1e-4), step
        same = {k for k in record if k not in ("loss", "grad_norm")}
        assert {k: actual[step][k] for k in same} == {k: record[k] for k in same}
    for step in (6, 8):
        places = [(checkpoint.step_dir(each, step) / "data.json").read_text() for each in (run, eight)]
        assert places[0] == places[1], "the same place in the data"
