"""Which run is found: by name, by preset, or as the one that was saved last."""

import json
import os
import shutil

import pytest
import saved

from nanochat_jax import checkpoint, commandline, config, run_log, trained_model
from nanochat_jax.config import UserError


def last(stage="sft"):
    run, step = trained_model.find(stage)
    return run.name, step


def test_the_run_saved_last_is_told_by_recorded_times_and_printed(own_base_dir, capsys):
    old, new = saved.save("sft", "d20", time=1000.0), saved.save("sft", "d12", time=2000.0)
    for path in old.rglob("*"):
        os.utime(path, (9e9, 9e9))
    os.utime(old, (9e9, 9e9))
    assert last() == ("d12", 10)
    out = capsys.readouterr().out
    assert out.startswith("sft: d12 is the run that was saved last (1970-01-01") and "there are also d20" in out
    saved.save("sft", "d20", step=20, time=3000.0)
    assert last() == ("d20", 20) and new.exists()


def test_checkpoints_without_a_time_have_it_in_their_log(own_base_dir, capsys):
    for tag, when in (("first", 1000.0), ("second", 2000.0)):
        run = saved.save("sft", tag)
        with open(run / run_log.LOG, "a", encoding="utf-8") as log:
            log.write(json.dumps({"kind": "checkpoint", "stage": "sft", "step": 10, "time": when}) + "\n")
    os.utime(checkpoint.run_dir("sft", "first") / "step_000010" / checkpoint.MANIFEST, (9e9, 9e9))
    assert last() == ("second", 10) and "time of its files" not in capsys.readouterr().out
    saved.save("sft", "third")  # records its time nowhere
    assert last() == ("third", 10) and "third/step_000010: neither its metadata nor" in capsys.readouterr().out


def test_of_a_run_and_its_copies_the_original_is_chosen(own_base_dir, capsys):
    run = saved.save("sft", "d20", time=1000.0)
    copy = run.with_name("a-copy")
    shutil.copytree(run, copy)  # like cp -r, this gives the copy new file times
    assert last() == ("d20", 10)
    assert "a-copy and d20 are copies of one run; d20 is the original" in capsys.readouterr().out
    shutil.move(run, run.with_name("renamed"))
    with pytest.raises(
        UserError, match=r"a-copy and renamed were saved at the same time: name one of them with --model_tag"
    ):
        last()
    assert trained_model.find("sft", "a-copy") == (copy, 10)


def test_a_run_that_is_not_finished_or_went_further_says_so(own_base_dir):
    run = saved.save("sft", "d20")
    assert trained_model.described(run, 10) == "sft_checkpoints/d20, step 10 (this run is not finished)"
    run_log.append(run, "note", "sft", 10, text="finished")
    assert trained_model.described(run, 10) == "sft_checkpoints/d20, step 10"
    assert trained_model.described(run, 5) == "sft_checkpoints/d20, step 5 (this run finished at step 10)"
    assert trained_model.described(run, 15).endswith("step 15 (this run is not finished)"), "it was extended"
    (run / run_log.LOG).unlink()  # nothing is known
    assert trained_model.described(run, 10) == "sft_checkpoints/d20, step 10"


def test_other_things_beside_runs_and_checkpoints_are_not_read(own_base_dir):
    run = saved.save("sft", "d20", time=1000.0)
    for name in (
        "step_000020-hf",
        "step_5",
        "step_0000011",
        "step_٠٠٠٠٢٠",
        "step_000020 (copy)",
        "abandoned_step_000010.x",
    ):
        shutil.copytree(run / "step_000010", run / name)
    (run.parent / ".d20.20261122").mkdir()
    (run.parent / "notes.txt").write_text("x")
    (run.parent / "empty").mkdir()
    assert last() == ("d20", 10) and trained_model.tags("sft") == ["d20"]


@pytest.mark.parametrize("command", [config.BaseLoss, config.BaseEval, config.ChatEval, config.ChatCli, config.ChatWeb])
def test_a_preset_names_the_run_to_load(own_base_dir, command):
    saved.save("sft", "cpu", time=1000.0)
    saved.save("sft", "d20", time=2000.0)
    cfg = commandline.parse(command, ["--config=cpu", "-i", "sft"])
    assert trained_model.find(cfg.source, cfg.model_tag, cfg.step, cfg.preset)[0].name == "cpu"
    cfg = commandline.parse(command, ["--config=cpu", "-i", "sft", "-g", "d20"])
    assert trained_model.find(cfg.source, cfg.model_tag, cfg.step, cfg.preset)[0].name == "d20"
    with pytest.raises(
        UserError, match=r"no sft checkpoint under .*d12: choose one .* --model_tag \(cpu, d20\), or run"
    ):
        trained_model.find("sft", preset="d12")


def test_errors_are_one_line_with_what_there_is(own_base_dir):
    with pytest.raises(UserError, match=r"no sft checkpoint under .*: run python -m scripts.train --stage=sft \(bash"):
        last()
    saved.save("sft", "d20", time=1000.0)
    with pytest.raises(
        UserError, match=r"d21: choose one that exists with --model_tag \(d20\), or run .* --model_tag=d21"
    ):
        trained_model.find("sft", "d21")
    with pytest.raises(UserError, match=r"--step=7: no checkpoint of this step in .*; available: 10"):
        trained_model.find("sft", "d20", 7)
    with pytest.raises(UserError, match="must be a name without /"):
        trained_model.find("sft", "../d20")


def test_suggested_commands_keep_the_preset(own_base_dir, monkeypatch, capsys, tmp_path):
    preset = tmp_path / "mine.toml"
    preset.write_text("seed = 3\n")
    for flags, kept in ((["--config=cpu"], "cpu"), (["--config", str(preset)], preset)):
        monkeypatch.setattr("sys.argv", ["base_loss", *flags])
        with pytest.raises(SystemExit):
            commandline.run(lambda cfg: trained_model.find(cfg.source, preset=cfg.preset), config.BaseLoss)
        error = capsys.readouterr().err
        assert error.endswith(
            f"run python -m scripts.train --config={kept} --stage=base (bash speedrun_jax.sh runs all stages)\n"
        ), error
    monkeypatch.setattr("sys.argv", ["base_loss"])
    with pytest.raises(SystemExit):
        commandline.run(lambda cfg: trained_model.find(cfg.source), config.BaseLoss)
    assert "--config" not in capsys.readouterr().err
