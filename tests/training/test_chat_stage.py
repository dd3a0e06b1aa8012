"""What midtraining and finetuning read, what they leave out, and what they validate on, in real runs."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import tiny

from nanochat_jax import commandline, config, run_log, tasks
from nanochat_jax.config import UserError
from nanochat_jax.tasks import published
from nanochat_jax.training import loop, stages, start_plan

LONG = "the small red cat sees a large dog under the tree " * 20  # longer than a row of 64 tokens


def conversation(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def world(world) -> Path:
    base = world
    done = tiny.run("base", base, model_tag="t", num_iterations=2)
    assert done.returncode == 0, done.stderr[-2000:]
    own = [conversation(f"cat {i}?", "dog.") for i in range(40)]
    own += [conversation("cat?", "dog.", "and?", LONG)] * 5  # the second answer is too long
    own += [conversation(LONG, "dog."), conversation("cat?", LONG)]  # no answer fits
    (base / "own.jsonl").write_text("".join(json.dumps(c) + "\n" for c in own), encoding="utf-8")
    for tag in ("one", "two"):
        (base / "base_checkpoints" / tag).symlink_to(base / "base_checkpoints" / "t")
    held_out = [conversation(f"tree {i}?", "dog.") for i in range(30)]
    (base / "val.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in held_out), encoding="utf-8")
    return base


def sft(world: Path, tag: str, **changes) -> tuple[list[str], list[dict]]:
    """Finetunes on the conversations of your own. Returns what is printed, and the log."""
    flags = {
        "source": "base", "model_tag": tag, "num_iterations": -1, "eval_examples": 12, "eval_every": 100,
        "save_every": -1,
        "mixture": f"customjson:{world}/own.jsonl=0", "val_mixture": f"customjson:{world}/val.jsonl=0",
    }  # fmt: skip
    done = tiny.run("sft", world, **(flags | changes))
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines(), run_log.read(world / "sft_checkpoints" / tag)


@pytest.fixture(scope="module")
def finetuned(world) -> tuple[list[str], list[dict]]:
    return sft(world, "one", task_order="sequence")


def test_finetuning_says_what_it_reads_and_what_it_leaves_out(finetuned):
    lines, log = finetuned
    assert any(line.startswith("  conversations: 47 of ") for line in lines)
    assert any(line.endswith("tokens on average, one task after the other: CustomJSON 47") for line in lines)
    assert "  validation: 12 conversations of CustomJSON 30" in lines
    assert "  longer than a row: about 14.9% of the conversations; each ends after its last whole answer" in lines
    assert lines[-2] == (
        "sft: 7 conversations were longer than a row, and ended after their last whole answer; "
        "2 without a whole answer were skipped"
    )
    last = [record for record in log if record["kind"] == "train"][-1]
    assert (last["truncated"], last["skipped"], last["epoch"]) == (7, 2, 1)
    rates = [record["lr_mult"] for record in log if record["kind"] == "train"]
    assert rates[0] == 0.02 and rates == sorted(rates, reverse=True)
    assert rates[-1] > 0, "the last step, which may be the only one, trains too"


def test_the_same_conversations_are_validated_on_whatever_the_number_of_devices(world, finetuned):
    def at_start(log: list[dict]) -> list[float]:
        return [r["bpb"] for r in log if r["kind"] == "val" and r["step"] == 0]

    _, log = sft(world, "two", devices=2, device_batch_size=1)
    assert at_start(log) == pytest.approx(at_start(finetuned[1]), rel=1e-5) and len(at_start(log)) == 1


def test_a_dry_run_does_not_record_a_failed_download(world, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world))
    monkeypatch.setattr(published, "_download", lambda file, path: "offline")
    flags = {"model_tag": "dry", "source_tag": "t", "task_files": "published", "mixture": "identity=9,simplespelling=9"}
    cfg = commandline.parse(config.Mid, tiny.command("mid", dry_run=1, device_type="cpu", **flags)[4:])
    loop.train(cfg)
    out = capsys.readouterr().out
    assert out.count("(download failed: offline)") == 2 and "dry run: nothing was trained" in out
    assert not list(world.rglob("*.failed")) and not (world / "mid_checkpoints" / "dry").exists()


def test_a_run_of_an_earlier_version_may_have_other_validation_settings(capsys):
    cfg = config.Sft()
    saved = dataclasses.asdict(cfg) | {"eval_tokens": 20 * 524288}
    del saved["eval_examples"], saved["task_order"], saved["task_files"]
    assert start_plan._changed_settings(cfg, saved) == []
    assert "no longer exist are ignored: eval_tokens\n" in capsys.readouterr().out
    assert start_plan._changed_settings(dataclasses.replace(cfg, eval_examples=7, task_files="published"), saved) == []
    assert start_plan._changed_settings(dataclasses.replace(cfg, task_order="sequence"), saved) != []


def test_finetuning_validates_on_as_many_conversations_as_specified():
    assert config.Sft().eval_examples == 100 * 4 * 8  # eval_steps x device_batch_size x ranks


@pytest.mark.parametrize("name", ["CustomJSON:./a.jsonl", "customjson:b/../a.jsonl", "customjson:link.jsonl"])
def test_a_file_cannot_be_validated_on_under_another_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    mixture = {"customjson:a.jsonl": 0}
    with pytest.raises(UserError, match="is also in --mixture: hold out"):
        stages.check_held_out(config.Sft(mixture=mixture, val_mixture={name: 0}))
    with pytest.raises(UserError, match="are the same task"):
        tasks.mixture(mixture | {name: 0}, "train")


def test_a_file_cannot_be_trained_and_validated_on():
    same = {"customjson:a.jsonl": 0}
    with pytest.raises(UserError, match=r"--val_mixture: customjson:a\.jsonl is also in --mixture"):
        stages.check_held_out(config.Sft(mixture=same | {"sums": 5}, val_mixture=same))
    stages.check_held_out(config.Mid(mixture={"sums": 5} | same, val_mixture={"sums": 5, "customjson:b.jsonl": 0}))


def write(path: Path, conversations: list, key: str = "") -> str:
    lines = [json.dumps({key: c} if key else c) + "\n" for c in conversations]
    path.write_text("".join(lines), encoding="utf-8")
    return f"customjson:{path}"


def test_a_copy_of_a_training_file_cannot_be_validated_on(tmp_path):
    made = [conversation(f"cat {i}?", "dog.") for i in range(9)]
    one, two = (write(tmp_path / name, made) for name in ("one.jsonl", "two.jsonl"))
    cfg = config.Sft(mixture={"sums": 5, one: 0}, val_mixture={two: 0})
    with pytest.raises(UserError, match=rf"^--val_mixture: {two} is a copy of {one}, which is in --mixture: hold out"):
        stages.check_held_out(cfg)
    stages.check_held_out(cfg, is_new=False)
    write(tmp_path / "two.jsonl", [*made[:-1], conversation("cat 9?", "dog.")])  # of the same size
    stages.check_held_out(cfg)


def test_validation_conversations_that_are_trained_on_are_counted(tmp_path, capsys):
    made = [conversation(f"cat {i}?", "dog.") for i in range(9)]
    trained = tasks.mixture({write(tmp_path / "one.jsonl", made): 0, "sums": 3}, "train")

    def check(conversations: list, is_new: bool = True) -> str:
        name = write(tmp_path / "two.jsonl", conversations, "messages")
        stages.check_overlap(trained, tasks.mixture({name: 0, "sums": 3}, "val"), is_new)
        return capsys.readouterr().out

    others = [conversation(f"tree {i}?", "dog.") for i in range(7)]
    assert check(others) == ""
    said = "--val_mixture: 2 of 9 of your own conversations are also in --mixture: hold out some conversations in "
    assert check(others + made[:2]) == f"{said}another file\n"
    for same in (made, made[3:5]):  # in another format, so the files differ
        with pytest.raises(UserError, match=rf"^--val_mixture: all {len(same)} of your own conversations are also in"):
            check(same)
        assert f"{len(same)} of {len(same)} of your own" in check(same, is_new=False)


def test_a_run_on_a_copy_does_not_begin(world):
    text = (world / "own.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (world / "reversed.jsonl").write_text("".join(reversed(text)), encoding="utf-8")
    done = tiny.run(
        "sft", world, source="base", source_tag="t", model_tag="leak", mixture=f"customjson:{world}/own.jsonl=0",
        val_mixture=f"customjson:{world}/reversed.jsonl=0",
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "error: --val_mixture: all 47 of your own conversations are also in --mixture: " in done.stderr


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_too_many_passes_over_the_conversations_are_refused(world, stage):
    """As in base, --max_epochs allows them, and the number of passes is printed before the first step."""
    name = write(world / "forty.jsonl", [conversation(f"cat {i}?", "dog.") for i in range(40)])
    flags = {
        "source": "base", "source_tag": "t", "model_tag": "often", "num_iterations": 2000, "max_epochs": 8,
        "mixture": f"{name}=0", "val_mixture": f"customjson:{world}/val.jsonl=0", "dry_run": 1,
    }  # fmt: skip
    refused = tiny.run(stage, world, **flags)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    asked = re.search(
        r"error: --num_iterations=2000: ([\d,.]+) passes over the 40 conversations of --mixture are more than "
        r"--max_epochs=8: add conversations, train fewer steps \(--num_iterations=(\d+)\), or allow it "
        r"\(--max_epochs=(\d+)\)",
        refused.stderr,
    )
    assert asked, refused.stderr
    passes, steps, allowed = (float(number.replace(",", "")) for number in asked.groups())
    assert passes > 300 and steps == int(2000 * 8 / passes) and passes <= allowed <= passes + 1.1
    assert not (world / f"{stage}_checkpoints" / "often" / "log.jsonl").exists()
    for changes in ({"num_iterations": int(steps)}, {"max_epochs": int(allowed)}):
        done = tiny.run(stage, world, **(flags | changes))
        epochs = re.search(r"^  epochs: about ([\d,.]+)$", done.stdout, re.M)
        assert epochs, done.stdout + done.stderr
        expected = passes * (changes.get("num_iterations", 2000)) / 2000
        assert float(epochs[1].replace(",", "")) == pytest.approx(expected, abs=0.06)


def test_a_number_of_epochs_is_never_refused(world):
    name = write(world / "forty.jsonl", [conversation(f"cat {i}?", "dog.") for i in range(40)])
    flags = {
        "source": "base", "source_tag": "t", "model_tag": "epochs", "num_iterations": -1, "num_epochs": 50,
        "max_epochs": 8, "mixture": f"{name}=0", "val_mixture": f"customjson:{world}/val.jsonl=0", "dry_run": 1,
    }  # fmt: skip
    done = tiny.run("sft", world, **flags)
    assert done.returncode == 0 and "\n  epochs: 50\n" in done.stdout, done.stdout + done.stderr
    done = tiny.run("sft", world, **flags | {"num_iterations": 4})
    unused = r"^  epochs: about [\d.]+; --num_epochs=50 is not used, because --num_iterations is given$"
    assert re.search(unused, done.stdout, re.M), done.stdout + done.stderr
