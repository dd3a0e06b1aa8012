"""From which weights a stage starts, and which runs resume."""

import json
import shutil
from contextlib import ExitStack

import pytest
import saved

from nanochat_jax import checkpoint, commandline, config
from nanochat_jax.config import UserError
from nanochat_jax.training.start_plan import make_plan

STAGES = {"base": config.Base, "mid": config.Mid, "sft": config.Sft, "rl": config.Rl}


def plan(stage, *flags):
    with ExitStack() as lock:
        return make_plan(commandline.parse(STAGES[stage], list(flags)), lock)


@pytest.fixture
def runs(own_base_dir):
    """Two runs of stage mid; d12 was saved last."""
    for tag, time in (("d20", 1000.0), ("d12", 2000.0)):
        saved.save("mid", tag, step=10, time=time)
        saved.save("mid", tag, step=20, time=time + 1)


@pytest.mark.parametrize(
    ("flags", "tag", "parent"),
    [([], "d12", ("d12", 20)), (["--model_tag=d20"], "d20", ("d20", 20)), (["--source_tag=d20"], "d20", ("d20", 20)),
     (["--model_tag=try", "--source_tag=d20"], "try", ("d20", 20)),
     (["--model_tag=try", "--source_tag=d20", "--source_step=10"], "try", ("d20", 10)),
     (["--source_step=10"], "d12", ("d12", 10))],
)  # fmt: skip
def test_the_parent_is_the_one_named_or_else_the_last(runs, flags, tag, parent, capsys):
    started = plan("sft", *flags)
    assert started.tag == tag and (started.parent[0].name, started.parent[1]) == parent
    assert started.parent_id.startswith(f"mid {parent[0]} step {parent[1]} ")
    named = any("tag" in flag for flag in flags)
    assert named or "mid: d12 is the run that was saved last" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--model_tag=d26x"], r"--model_tag=d26x: stage mid has no run .* choose .* --source_tag \(d12, d20\), "
      "or run python -m scripts.train --stage=mid --model_tag=d26x first"),
     (["--source_tag=d26x"], r"--source_tag=d26x: stage mid has no run .* --source_tag \(d12, d20\)$"),
     (["--config=cpu"], r"--config=cpu: stage mid has no run .* --source_tag \(d12, d20\)"),
     (["--model_tag=try", "--source_tag=D20"], "--source_tag=D20: "), (["--source_tag=../d20"], "must be a name"),
     (["--source_tag=d20", "--source_step=15"], "--source_step=15: no checkpoint of .*; available: 10, 20"),
     (["--source=base"], r"stage base has no run .*: run python -m scripts.train --stage=base first "
      r"\(trained so far: mid: d12, d20\)"),
     (["--source=base", "--model_tag=d5"], "run python -m scripts.train --stage=base --model_tag=d5 first"),
     (["--source=base", "--source_tag=cpuu"], "stage base .*: run python -m scripts.train --stage=base first"),
     (["--source=rl"], r"stage rl has no run .*: choose another --source \(trained so far: mid: d12, d20\)"),
     (["--source=sft", "--source_tag=d20"], "stage sft has no run .*: choose another --source"),
     (["--model_tag=d20", "--max_seq_len=512"], "--max_seq_len=512: the model to start from has 256: leave out"),
     (["--model_tag=d20", "--depth=5"], "--depth=5: .* has 4"), (["--model_tag=d20", "--head_dim=128"], "has 64"),
     (["--model_tag=d20", "--aspect_ratio=128"], "has width 256"), (["--model_tag=d20", "--n_kv_head=2"], "has 4"),
     (["--model_tag=d20", "--window_pattern=SSSL"], "--window_pattern=SSSL: .* has L")],
)  # fmt: skip
def test_a_refused_start_leaves_nothing_behind(runs, own_base_dir, flags, words):
    before = sorted(own_base_dir.rglob("*"))
    with pytest.raises(UserError, match=words) as error:
        plan("sft", *flags)
    assert "\n" not in str(error.value) and sorted(own_base_dir.rglob("*")) == before


def test_a_damaged_source_step_is_refused(runs):
    (checkpoint.run_dir("mid", "d20") / "step_000010" / "meta.json").write_text("{}")
    with pytest.raises(UserError, match=r"step_000010: meta.json is damaged"):
        plan("sft", "--source_tag=d20", "--source_step=10")


def test_flags_for_the_shape_are_accepted_if_they_agree(runs):
    shape = [
        "--depth=4",
        "--head_dim=64",
        "--max_seq_len=256",
        "--aspect_ratio=64",
        "--n_kv_head=4",
        "--window_pattern=l",
    ]
    assert plan("sft", "--model_tag=d20", *shape).parent[0].name == "d20"
    saved.save("mid", "cpu", time=1.0)  # the preset cpu gives depth, head_dim and max_seq_len to every stage
    assert plan("sft", "--config=cpu").tag == "cpu"


def test_a_run_cannot_start_from_itself(runs):
    with pytest.raises(UserError, match="cannot start from itself"):
        plan("mid", "--source=mid", "--model_tag=d20")
    assert plan("mid", "--source=mid", "--source_tag=d20", "--model_tag=second").tag == "second"


# -----------------------------------------------------------------------------
# Resuming


def test_a_run_resumes_only_from_the_parent_it_started_from(runs):
    saved.save("sft", "try", step=30, parent=saved.weights_id("mid", "d20", 10))
    resumed = plan("sft", "--model_tag=try", "--source_tag=d20", "--source_step=10")
    assert resumed.step == 30 and resumed.parent is None
    # Without a source, there is no run `try` in mid to compare with.
    assert plan("sft", "--model_tag=try").step == 30
    for flags, now in (
        (["--source_tag=d20"], "d20 step 20"),
        (["--source_tag=d12", "--source_step=10"], "d12 step 10"),
    ):
        words = rf"weights \(mid d20 step 10, now mid {now}\): resume it with --source_tag=d20 --source_step=10, choose"
        with pytest.raises(UserError, match=words):
            plan("sft", "--model_tag=try", *flags)
    for flags in (["--source_tag=d19"], ["--source_step=11"]):  # gone, but clearly another parent
        words = r"different weights \(mid d20 step 10, now .*, which does not exist\): resume"
        with pytest.raises(UserError, match=words):
            plan("sft", "--model_tag=try", *flags)
    with pytest.raises(UserError, match="--max_seq_len=64: the model to start from has 256"):
        plan("sft", "--model_tag=try", "--max_seq_len=64")


def test_a_parent_with_another_name_is_the_same_parent(runs):
    saved.save("sft", "try", step=30, parent=saved.weights_id("mid", "d20", 20))
    mid = checkpoint.run_dir("mid", "d20")
    shutil.copytree(mid, mid.with_name("copy"))
    mid.rename(mid.with_name("renamed"))
    for tag in ("copy", "renamed"):
        assert plan("sft", "--model_tag=try", f"--source_tag={tag}").step == 30
    saved.save("mid", "d20", step=20, time=5000.0)  # trained again, so that naming it would not help
    with pytest.raises(UserError, match=r"\(mid d20 step 20, now mid d20 step 20\): choose another --model_tag"):
        plan("sft", "--model_tag=try", "--source_tag=d20")


def test_a_missing_parent_is_chosen_with_source_tag(runs):
    (checkpoint.run_dir("mid", "d20") / "step_000010" / "meta.json").write_text("{}")
    (checkpoint.run_dir("mid", "d20") / "step_000020" / "meta.json").write_text("{}")
    with pytest.raises(UserError, match=r"choose one that exists with --source_tag \(d12\), or run"):
        plan("sft", "--model_tag=d20")
    shutil.copytree(checkpoint.run_dir("mid", "d12"), checkpoint.run_dir("mid", "x"))
    checkpoint.run_dir("mid", "d12").rename(checkpoint.run_dir("mid", "y"))
    with pytest.raises(UserError, match=r"d20: choose one that exists with --source_tag \(x, y\), or run"):
        plan("sft")  # d20 was saved last, by the times of its files, but it is damaged
    shutil.rmtree(checkpoint.run_dir("mid", "d20"))
    with pytest.raises(UserError, match=r"x and y were saved at the same time: name one of them with --source_tag"):
        plan("sft")


def test_checkpoints_saved_before_these_settings_existed_resume(runs):
    run = saved.save("sft", "d20", step=30, parent=saved.weights_id("mid", "d20", 20))
    meta = checkpoint.read_meta(run, 30)
    new = (
        "source_tag",
        "source_step",
        "depth",
        "aspect_ratio",
        "head_dim",
        "n_kv_head",
        "max_seq_len",
        "window_pattern",
    )
    meta["config"] = {name: value for name, value in meta["config"].items() if name not in new}
    (run / "step_000030" / "meta.json").write_text(json.dumps(meta))
    (run / "step_000030" / checkpoint.MANIFEST).unlink()
    checkpoint._write_manifest(run / "step_000030")
    for flags in ([], ["--max_seq_len=256"], ["--source_tag=d20"]):
        assert plan("sft", "--model_tag=d20", *flags).step == 30


def test_resume_from_step_is_another_name_of_resume(own_base_dir):
    for step in (10, 20):
        saved.save("base", "d4", step=step, depth=4)
    assert (
        plan("base", "--depth=4", "--resume_from_step=10").step == plan("base", "--depth=4", "--resume=10").step == 10
    )
    with pytest.raises(UserError, match=r"--resume=15: no checkpoint of this step in .*; available: 10, 20"):
        plan("base", "--depth=4", "--resume-from-step=15")
    assert plan("base", "--depth=4", "--resume_from_step=-1").step == 20, "the original's default: the last checkpoint"
    with pytest.raises(UserError, match="--resume=-2: must be auto, never or a step"):
        plan("base", "--depth=4", "--resume_from_step=-2")
