"""How a run starts: a refused start changes nothing, and any other resumes from the last good checkpoint."""

import dataclasses
import json
import re
import shutil
import subprocess
import time

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from nanochat_jax import checkpoint, commandline, config, run_log, trained_model
from nanochat_jax.config import REPOSITORY, UserError
from nanochat_jax.data import dataloader, sources
from nanochat_jax.evals.bpb import bits_per_byte
from nanochat_jax.evals.model import EvalModel
from nanochat_jax.training import optim
from nanochat_jax.training.loop import train
from nanochat_jax.training.run import open_run
from scripts import base_loss

pytestmark = pytest.mark.usefixtures("in_world")


@pytest.fixture(scope="module")
def world(world):
    """The tiny world with a finished run, `made`, with the steps 2, 4, 6 and 8."""
    tiny.train_made(world)
    return world


@pytest.fixture
def run(world, request):
    """A copy of the run `made`, with the name of the test as its tag."""
    folder = checkpoint.run_dir("base", re.sub(r"\W+", "-", request.node.name))
    shutil.copytree(checkpoint.run_dir("base", "made"), folder)
    return folder


def settings(tag, **changes):
    return tiny.base_config(**({"model_tag": tag, "keep_last": 9} | changes))


def contents(run):
    """Every file of a run, and of neighbouring folders whose names contain the run's name, except the lock."""
    files = [p for p in run.parent.rglob("*") if p.is_file() and run.name in str(p) and p.name != "lock"]
    return {p: p.read_bytes() for p in files}


# -----------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("resume", "changes"),
    [("4", {"matrix_lr": 0.03}), ("4", {"mesh": "data=3"}), ("4", {"device_batch_size": 3}),
     ("never", {"mesh": "data=3"}), ("never", {"device_batch_size": 3}), ("never", {"data": "fineweb-edu"}),
     ("never", {"remat": "ful"})],
)  # fmt: skip
def test_a_refused_start_changes_nothing(run, resume, changes):
    before = contents(run)
    with pytest.raises(UserError):
        train(settings(run.name, resume=resume, **changes))
    assert contents(run) == before


def test_a_run_of_another_text_changes_nothing(run, monkeypatch):
    other = dataclasses.replace(sources.open(), hash="another")
    monkeypatch.setattr(sources, "open", lambda *args: other)
    before = contents(run)
    with pytest.raises(UserError, match="the text is not the one that"):
        train(settings(run.name, resume="4"))
    assert contents(run) == before


def test_a_run_of_other_conversations_changes_nothing(world):
    """The same tasks in another order, which compare equal as settings, or tasks with other content."""
    ours = world / "ours.jsonl"
    ours.write_text("".join(chat(f"Question {i}") for i in range(9)))
    mixture = f"sums=20,customjson:{ours}=9"
    flags = {"model_tag": "talk", "source": "base", "source_tag": "made", "num_iterations": 4}
    first = tiny.run("mid", world, mixture=mixture, **flags)
    assert first.returncode == 0, first.stderr
    run = checkpoint.run_dir("mid", "talk")
    before = contents(run)

    def refused(mixture: str, words: str) -> None:
        again = tiny.run("mid", world, mixture=mixture, resume="2", **flags)
        assert again.returncode == 2 and again.stderr.count("\n") == 1 and words in again.stderr, again.stderr
        assert contents(run) == before

    refused(f"customjson:{ours}=9,sums=20", "the conversations are not the ones that")
    refused(f"sums=21,customjson:{ours}=9", "a run started with different settings (mixture: ")
    ours.write_text(ours.read_text().replace("Question 3", "Question ?"))
    refused(mixture, "(different content)")


def chat(question: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "So it is."}]
    return json.dumps(messages) + "\n"


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [("rl", {"mixture": "sums=10,smoltalk=0"}, "--mixture: smoltalk has no answers that can be generated and checked"),
     ("rl", {"examples_per_step": 0}, "--examples_per_step=0"),
     ("rl", {"mixture": "sums=3", "examples_per_step": 8}, "has only 3: try --examples_per_step="),
     ("rl", {"mixture": "sums=3", "oversampling": 9}, "has only 3: lower --oversampling, or add problems to --mixture"),
     ("sft", {"eval_metrics_tasks": "sums|customjson:{base}/chats.jsonl"}, "CustomJSON is for training only"),
     ("sft", {"eval_metrics_tasks": "sums|mmul"}, "unknown task 'mmul'")],
)  # fmt: skip
def test_tasks_are_looked_at_before_the_first_step(world, stage, changes, words):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
    (world / "chats.jsonl").write_text(json.dumps(messages) + "\n")
    if stage == "sft":
        changes = {"eval_metrics_every": 200, "eval_metrics_tasks": changes["eval_metrics_tasks"].format(base=world)}
    result = tiny.run(stage, world, model_tag="early", source="base", source_tag="made", **changes)
    assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not (checkpoint.run_dir(stage, "early") / run_log.LOG).exists()


def test_never_moves_the_run_aside_and_holds_the_lock_of_the_new_one(run):
    train(settings(run.name, resume="never", num_iterations=2))
    (aside,) = run.parent.glob(f".{run.name}.*")
    assert checkpoint.steps(aside) == [2, 4, 6, 8] and checkpoint.steps(run) == [2]
    assert [r["step"] for r in run_log.read(run) if r["kind"] == "train"] == [1, 2]


def test_a_disk_without_room_for_all_checkpoints_is_a_warning(world, monkeypatch, capsys):
    cfg = commandline.parse(config.Base, tiny.command("base", model_tag="cramped", save_every=2, keep_last=2)[4:])
    with open_run(cfg, optim.momentum_warmup) as run:
        run.load_state()
        arrays = jax.tree.leaves((run.state.params, run.state.opt_state))
        one, disk = sum(x.nbytes for x in arrays), shutil.disk_usage(world)
        for free, words in ((2 * one, "and 3 checkpoints at a time take about"), (3 * one, "")):
            monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: disk._replace(free=free))
            run._check_disk()
            output = capsys.readouterr().out
            assert words in output and ("lower --keep_last (now 2)" in output) == bool(words)


def test_nothing_moves_before_held_out_data_and_the_disk_are_looked_at(run, monkeypatch):
    before = contents(run)
    never = settings(run.name, resume="never")
    full = shutil.disk_usage(run)._replace(free=100_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: full)
        with pytest.raises(UserError, match=r"the disk has 0 MB free, and a checkpoint takes about \d MB: make room"):
            train(never)
    source = sources.open()
    torn = dataclasses.replace(source, val_files=(run.parent / "torn.parquet",))
    whole = source.val_files[0].read_bytes()
    torn.val_files[0].write_bytes(whole[: len(whole) // 2])
    with monkeypatch.context() as patch:
        patch.setattr(sources, "open", lambda *args: torn)
        patch.setattr(type(torn), "val_hash", lambda self: "0" * 64)
        with pytest.raises(UserError, match=r"torn\.parquet"):
            train(never)
    with pytest.raises(UserError, match=r"--core_dir=/nowhere: no core\.yaml"):
        train(settings(run.name, resume="never", core_dir="/nowhere", core_metric_every=2))
    assert contents(run) == before


def test_a_refused_command_leaves_no_folder_behind(world):
    before = sorted(p for p in world.rglob("*"))
    for stage, flags in (
        ("base", {"model_tag": "new", "mesh": "data=3"}), ("sft", {"model_tag": "d26x"}),
        ("mid", {"model_tag": "new", "source_tag": "made", "mixture": "mmul=0"}),
        ("mid", {"model_tag": "new", "source_tag": "made", "max_seq_len": 128}),
    ):  # fmt: skip
        done = tiny.run(stage, world, **flags)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert sorted(p for p in world.rglob("*")) == before, flags


def test_a_parent_is_never_replaced_by_another(world):
    done = tiny.run("mid", world, model_tag="d26x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--model_tag=d26x: stage base has no run of this name" in done.stderr and "made" in done.stderr
    done = tiny.run("mid", world, model_tag="d26x", source_tag="made", source_step=4, max_seq_len=64, num_iterations=1)
    assert done.returncode == 0, done.stderr
    meta = checkpoint.read_meta(checkpoint.run_dir("mid", "d26x"), 1)
    assert meta["parent"].startswith("base made step 4 ") and meta["time"] == pytest.approx(time.time(), abs=600)


NO_LOCKS = """
import errno, fcntl
def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""


def test_a_file_system_without_locks_stops_no_run(world, tmp_path):
    """The run is in a separate process, in which flock fails as it does on NFS without a lock daemon."""
    (tmp_path / "sitecustomize.py").write_text(NO_LOCKS)
    command = tiny.command("base", model_tag="nfs", num_iterations=1)
    env = tiny.environment(world) | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be locked (No locks available): start only one process") == 1
    assert checkpoint.steps(checkpoint.run_dir("base", "nfs")) == [1]


def test_a_log_torn_inside_a_character_is_continued(run, capsys):
    with open(run / run_log.LOG, "ab") as log:
        log.write('{"kind": "note", "stage": "base", "step": 8, "text": "ü'.encode()[:-1])
    train(settings(run.name, resume="6"))
    assert "1 line is not a record: skipped" in capsys.readouterr().out
    assert [r["step"] for r in run_log.read(run) if r["kind"] == "train"] == list(range(1, 9))


# -----------------------------------------------------------------------------
# Settings that were added, changed or removed since a run was saved


def with_config(run, step, change):
    """Changes the settings recorded in a checkpoint, and keeps its manifest valid."""
    with_meta(run, step, lambda meta: change(meta["config"]))


def with_meta(run, step, change):
    """Changes the metadata of a checkpoint, and keeps its manifest valid."""
    folder = checkpoint.step_dir(run, step)
    meta = checkpoint.read_meta(run, step)
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / checkpoint.MANIFEST).unlink()
    checkpoint._write_manifest(folder)


@pytest.mark.parametrize("last", [8, 4])
def test_a_setting_that_is_new_or_gone_stops_no_run(run, last, capsys):
    def older(config):
        del config["window_pattern"], config["weight_decay"]
        config["moon_phase"] = 3

    for step in (6, 8):
        if step > last:
            shutil.rmtree(checkpoint.step_dir(run, step))
    with_config(run, last, older)
    train(settings(run.name))
    out = capsys.readouterr().out
    assert ("is finished (step 8)" if last == 8 else "resuming at step 4") in out
    assert "ignored: moon_phase" in out
    with pytest.raises(UserError, match=r"settings \(weight_decay: 0.0, now 0.1\)"):
        train(settings(run.name, resume=str(last), weight_decay=0.1))


# -----------------------------------------------------------------------------
# What a run leaves behind when it restarts from an earlier step


def test_runs_and_steps_set_aside_within_a_second_are_all_kept(tmp_path):
    for i in range(3):
        for folder in (run := tmp_path / "run", run / "step_000004"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "note").write_text(str(i))
        checkpoint.abandon_after(run, 3)
    kept = [path.read_text() for path in run.glob("abandoned_step_000004.*/note")]
    assert sorted(kept) == ["0", "1", "2"]
    for _ in range(3):
        checkpoint.move_aside(run)
        run.mkdir()
    assert len(list(tmp_path.glob(".run.*"))) == 3


def test_what_was_logged_of_abandoned_steps_is_gone(run):
    run_log.append(run, "eval", "base", 8, suite="core", task="hellaswag", score=0.5)
    train(settings(run.name, resume="4", num_iterations=8, eval_every=3))
    records = run_log.read(run)
    assert not [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [r["step"] for r in records if r["kind"] == "val"] == [6, 8]  # 8 once, 3 was not due the first time


# -----------------------------------------------------------------------------
# Damaged and missing checkpoints


@pytest.mark.parametrize("good", [4, None])
def test_damaged_steps_are_moved_aside_and_cost_no_good_one(run, good):
    damaged = [step for step in (2, 4, 6, 8) if not good or step > good]
    for step in damaged:
        (checkpoint.step_dir(run, step) / "data.json").write_text("{}")
    train(settings(run.name, keep_last=1, save_every=2, num_iterations=8))
    assert checkpoint.steps(run) == [8] and checkpoint.latest(run) == 8
    aside = sorted(p.name.split(".")[0] for p in run.glob("abandoned_*"))
    assert aside == [f"abandoned_step_{step:06d}" for step in damaged]


def test_a_stage_takes_the_weights_alone_from_the_one_before(world):
    cfg = commandline.parse(config.Mid, tiny.command("mid", model_tag="made")[4:])
    with open_run(cfg, optim.momentum_warmup) as run:
        params, used, *_ = checkpoint.restore(checkpoint.run_dir("base", "made"), 8, *run.state)
        run.load_state()
        fresh = run.optimizer.init(params)
        jax.tree.map(np.testing.assert_array_equal, run.state.params, params)
        jax.tree.map(np.testing.assert_array_equal, run.state.opt_state, fresh)
        assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (used, fresh)), strict=True))
        assert (run.step, run.data, run.totals["tokens"]) == (0, None, 0)


def test_a_stage_goes_on_without_its_parent_but_not_after_another_one(world):
    for stage, steps in (("base", 2), ("mid", 4)):
        assert (ended := tiny.run(stage, world, model_tag="child", num_iterations=steps)).returncode == 0, ended.stderr
    base, mid = (checkpoint.run_dir(stage, "child") for stage in ("base", "mid"))
    shutil.rmtree(checkpoint.step_dir(mid, 4))
    parent = checkpoint.read_meta(mid, 2)["parent"]
    aside = base.parent.with_name("elsewhere")
    base.parent.rename(aside)
    try:
        gone = tiny.run("mid", world, model_tag="child", num_iterations=4)
        assert gone.returncode == 0 and "resuming at step 2" in gone.stdout, gone.stderr
        assert checkpoint.read_meta(mid, 4)["parent"] == parent
        assert "stage base has no run to start from" in tiny.run("mid", world, model_tag="orphan").stderr
    finally:
        aside.rename(base.parent)
    (base / "step_000002" / checkpoint.MANIFEST).write_text("{}")  # as if it had been trained again
    assert "started from different weights" in tiny.run("mid", world, model_tag="child", num_iterations=4).stderr


# -----------------------------------------------------------------------------
# Text that arrives in the meantime


def test_files_that_came_later_change_nothing(world, tmp_path, monkeypatch):
    """The order of the files depends on their names, and from the second epoch on also on their number."""
    whole = sources.open()
    parts = []
    for i in range(5):
        texts = list(whole.texts("train"))[i * 4 : i * 4 + 4]
        parts.append(tmp_path / f"part_{i}.parquet")
        pq.write_table(pa.table({"text": texts}), parts[-1])

    def run(tag, files, **changes):
        source = dataclasses.replace(whole, train_files=tuple(files))
        monkeypatch.setattr(sources, "open", lambda *args: source)
        train(settings(tag, num_iterations=20, save_every=10, keep_last=9, **changes))
        folder = checkpoint.run_dir("base", tag)
        text = checkpoint.read_meta(folder, 20)["text"]
        assert text["files"] == 3 and text["names"] == [path.name for path in began]
        records = [r for r in run_log.read(folder) if r["kind"] == "train"]
        return {r["step"]: (r["loss"], r["shard"], r["epoch"]) for r in records}

    began = parts[1:4]  # as if shards were copied by hand
    expected = run("few", began)
    assert max(epoch for *_, epoch in expected.values()) > 1
    run("more", began)
    assert run("more", parts, resume="10") == expected, "one file was added before them, and one after them"
    elsewhere = parts[3].rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"was trained on 3 files of texts, but part_3.parquet is not here: .* -n 4$"):
        run("more", parts[:3], resume="10")

    elsewhere.rename(parts[3])
    assert run("more", parts[:2], resume="10") == expected, "files that are here but no longer requested are found"
    folder = checkpoint.run_dir("base", "more")
    with_meta(folder, 10, lambda meta: meta["text"].pop("names"))  # as early versions saved it
    assert run("more", [*began, parts[4]], resume="10") == expected
    with pytest.raises(UserError, match=r"was trained on 3 files of texts, but only 2 are here: .* -n 3$"):
        run("more", began[:2], resume="10")


def test_base_loss_measures_what_training_did(run, tmp_path, capsys):
    with_config(run, 8, lambda config: config.update(packing="crop"))
    (tmp_path / "a.txt").write_text("\n\n".join(f"the cat sees {i} dogs near a tree" for i in range(900)))
    shutil.copy(tmp_path / "a.txt", tmp_path / "b.txt")

    def measured(**changes):
        base_loss.main(
            config.BaseLoss(
                model_tag=run.name, split_tokens=64 * 40, device_batch_size=4, compute_dtype="float32", **changes
            )
        )
        out = capsys.readouterr().out
        return re.search(r"val bits per byte: ([\d.]+)(?: ± ([\d.]+))? \((.*)\) of (\w+)", out), out

    match, out = measured()
    source, model = sources.open(), trained_model.load("base", run.name)
    batches = dataloader.val_batches(source.val_files, model.tokenizer, 4, 64, 64 * 40, packing="crop")
    expected = bits_per_byte(EvalModel(model.params, model.model_cfg, model.tokenizer), batches)
    batches.close()
    assert float(match[1]) == pytest.approx(expected.bpb, abs=1e-6) and "compare with care" not in out
    assert float(match[2] or 0) == pytest.approx(expected.stderr or 0, abs=1e-6)
    assert match[3] == f"n={expected.tokens:,} tokens, {expected.rows} row{'s' * (expected.rows != 1)}"
    records = {r["task"]: r for r in run_log.read(run) if r["kind"] == "eval"}
    assert records["val_bpb"].items() >= {"n": expected.tokens, "rows": expected.rows}.items()
    assert records["train_bpb"]["rows"] == 40 and records["train_bpb"]["stderr"] > 0
    match, out = measured(data_dir=str(tmp_path))
    assert "(different source, hash, validation)" in out and match[4] in tmp_path.name


def test_base_loss_says_if_a_text_is_shorter_than_asked_for(run, capsys):
    base_loss.main(config.BaseLoss(model_tag=run.name, split_tokens=64 * 10_000, device_batch_size=64))
    out = capsys.readouterr().out
    assert "  all of val: it has less than --split_tokens=640000\n" in out


# -----------------------------------------------------------------------------
# Time


def test_saving_is_no_part_of_a_step(world, monkeypatch):
    save = checkpoint.Saver.save

    def slowly(self, *args):
        time.sleep(1.5)
        save(self, *args)

    monkeypatch.setattr(checkpoint.Saver, "save", slowly)
    train(settings("slow", num_iterations=3, save_every=2))
    records = run_log.read(checkpoint.run_dir("base", "slow"))
    assert all(r["save_seconds"] >= 1.5 for r in records if r["kind"] == "checkpoint")
    (third,) = (r for r in records if r["kind"] == "train" and r["step"] == 3)
    assert third["loader_wait"] < 1.5 and third["dt"] < 1.5
