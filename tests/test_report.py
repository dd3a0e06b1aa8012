"""The report, made from logs like those that the stages write."""

import json
import math
import re
import shutil
import sys
import time

import pytest

from nanochat_jax import checkpoint, commandline, config, lineage, report, run_log
from nanochat_jax.config import UserError, base_dir
from nanochat_jax.parallel import devices


def train_log(stage, tag="d4", steps=40, finished=True, parent=""):
    """A run's folder with a log and a checkpoint."""
    run = base_dir() / f"{stage}_checkpoints" / tag
    run_log.append(run, "config", stage, 0, config={})
    (run / "config.json").write_text(json.dumps({"tag": tag, "depth": 4, "matrix_lr": 0.5, "num_iterations": 40}))
    for step in range(1, steps + 1):
        loss = 6 * math.exp(-step / 15) + 2
        extra = {"reward": 0.1 + step / 100} if stage == "rl" else {"tok_per_s": 1000.0 + step, "mfu": None}
        run_log.append(run, "train", stage, step, loss=loss, lr_mult=1.0, dt=0.5, tokens=step * 4096, flops=1e9 * step,
                       **extra)  # fmt: skip
        if step % 10 == 0:
            passed = {"pass@1": step / 100, "pass@8": step / 50, "n": 200}
            run_log.append(run, "val", stage, step, **(passed if stage == "rl" else {"bpb": loss / 3}))
    if finished:
        step_dir = run / f"step_{steps:06d}"
        step_dir.mkdir(parents=True)
        model = {"n_layer": 4, "n_head": 4, "n_kv_head": 4, "n_embd": 256, "vocab_size": 4096, "sequence_len": 256}
        (step_dir / "meta.json").write_text(json.dumps({"model": model, "parent": parent, "time": time.time()}))
        (step_dir / "manifest.json").write_text("{}")
    return run


def read(stage, tag=""):
    return report.read_run(stage, lineage.find(tag).runs[stage])


def score(run, stage, task, value, suite="chat", step=40, **fields):
    fields = {"stderr": 0.01, "n": 1319, "baseline": 0.0, "seconds": 12.0} | fields
    run_log.append(run, "eval", stage, step, task=task, suite=suite, score=value, **fields)


@pytest.fixture
def quick(monkeypatch):
    """Does not look for devices, which takes a child process and some seconds."""
    monkeypatch.setattr(devices, "described_by_child", lambda: "1 x cpu (cpu)")


@pytest.fixture
def road(quick):
    """All stages, each evaluated, after a reset."""
    report.reset()
    tok = base_dir() / "tokenizer"
    run_log.append(tok, "tok_train", "tok", 0, task="train", source="local", chars=12_345_678, reached_vocab_size=4096,
                   seconds=61.0)  # fmt: skip
    run_log.append(tok, "tok_eval", "tok", 0, task="news", bytes=1000, tokens=250, gpt2_tokens=300, gpt4_tokens=None)
    base = train_log("base")
    score(base, "base", "copa", 0.6, "core", centered=0.2, n=100)
    score(base, "base", "CORE", 0.1234, "core", n=50_000)
    run_log.append(base, "sample", "base", 40, task="The capital of France is", text=" `Paris`\n| <b>")
    for stage in ("mid", "sft"):
        run = train_log(stage)
        for task in ("ARC-Easy", "GSM8K", "SpellingBee", "ChatCORE", "Sums"):
            score(run, stage, task, 0.25 if stage == "mid" else 0.5, truncated=0.125 if task == "GSM8K" else None)
    score(train_log("rl"), "rl", "GSM8K", 0.75)
    return base_dir()


def row(text, name):
    [line] = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_whole_road(road, tmp_path):
    written = report.generate(output=tmp_path / "report.md")
    text = written.read_text(encoding="utf-8")
    assert row(text, "CORE") == ["CORE", "0.1234 ± 0.0100 (n=50,000)", "-", "-", "-"]
    summary = text.split("## Tokenizer")[0]
    assert row(summary, "GSM8K")[2:] == [f"{x} ± 0.0100 (n=1,319)" for x in ("0.2500", "0.5000", "0.7500")]
    for name in ("SpellingBee", "ChatCORE", "Sums"):
        assert row(summary, name)[3].startswith("0.5000")
    for title in ("Tokenizer", "Pretraining (d4)", "Midtraining (d4)", "Supervised finetuning (d4)"):
        assert f"## {title}" in text
    assert "matrix_lr 0.5" in text and "depth 4" in text and "n/a (no peak known" in text and "(median)" in text
    assert "pass@8 0.8000 (n=200)" in text and "12.5%" in text and "12,345,678" in text and "+16.7%" in text
    assert "validation bits per byte: " in text and "commit " in text
    assert re.search(r"Total wall-clock time since the reset: \d+s", text)
    assert "→ ` 'Paris'\\n| <b>`" in text  # a sample cannot break the layout


def test_pictures_are_found_from_both_places(road, tmp_path):
    pytest.importorskip("matplotlib")
    written = report.generate(output=tmp_path / "elsewhere" / "report.md")
    for path in (written, tmp_path / "elsewhere" / "report.md"):
        links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
        assert len(links) == 4
        for link in links:
            assert (path.parent / link).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(road, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = report.generate(output=tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.count("Plots are skipped: matplotlib is not installed") == 1 and "![" not in text


def test_a_run_that_is_not_there_leaves_the_last_report_alone(road, tmp_path):
    (tmp_path / "report.md").write_text("of another run")
    with pytest.raises(
        UserError,
        match=r"nothing to report on: .* does not hold a run called 'nope' yet: choose another --model_tag, or",
    ):
        report.generate("nope", output=tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text() == "of another run"


def test_stages_may_be_missing(quick, tmp_path):
    with pytest.raises(UserError, match="nothing to report on"):
        report.generate(output=tmp_path / "report.md")
    run = train_log("base", steps=1, finished=False)  # just started
    run_log.append(run, "core", "base", 1, core=0.05)
    text = report.generate(output=tmp_path / "report.md").read_text(encoding="utf-8")
    assert row(text, "CORE")[1] == "0.0500 (in training)" and "Midtraining" not in text
    assert row(text, "ChatCORE")[1:] == ["-"] * 4 and "| GSM8K |" not in text  # no row consists of dashes alone
    assert "Total wall-clock time since the first record" in text


def test_the_reported_score_is_of_the_last_checkpoint_greedy_and_of_the_most_problems(quick, tmp_path):
    """Even if others were measured later; among equals, the latest counts. Any other score says how it differs."""
    run = train_log("sft")
    score(run, "sft", "MMLU", 0.3, n=14_042)
    score(run, "sft", "MMLU", 0.1, n=1024)
    score(run, "sft", "MMLU", 0.4, n=14_042, temperature=1.0, num_samples=8)
    score(run, "sft", "MMLU", 0.5, n=14_042, step=30)
    score(run, "sft", "GSM8K", 0.1, temperature=0.0, num_samples=1)
    score(run, "sft", "GSM8K", 0.2, temperature=0.0, num_samples=1)
    score(run, "sft", "HumanEval", 0.6, n=164, temperature=0.8, num_samples=10, step=30)
    score(run, "sft", "val_bpb", 0.7, "bpb", step=20)
    text = report.generate(output=tmp_path / "report.md").read_text(encoding="utf-8").split("## Super")[0]
    assert row(text, "MMLU")[3] == "0.3000 ± 0.0100 (n=14,042)" and row(text, "GSM8K")[3].startswith("0.2000")
    assert row(text, "HumanEval")[3] == "0.6000 ± 0.0100 (n=164, step 30, temperature 0.8, best of 10)"
    assert row(text, "bits per byte")[3] == "0.7000 ± 0.0100 (n=1,319, step 20)"


def test_every_score_shows_its_error_and_what_was_cut(quick, tmp_path):
    base = train_log("base")
    run_log.append(base, "val", "base", 40, bpb=1.25, stderr=0.004, n=65_536, rows=256)
    run_log.append(base, "core", "base", 40, core=0.05, stderr=0.008, n=11_000, cut=3)
    score(base, "base", "boolq", 0.7, "core", centered=-0.2, n=100, baseline=0.75, cut=17, max_per_task=100)
    score(train_log("sft"), "sft", "GSM8K", 0.5, truncated=0.25, cut=4)
    rl = train_log("rl")
    run_log.append(rl, "train", "rl", 41, loss=1.0, reward=0.5, stderr=0.06, n=16, rewarded=37, other_format=2, cut=1)
    run_log.append(rl, "val", "rl", 41, **{"pass@1": 0.25, "pass@1_stderr": 0.02, "pass@2": 0.5}, n=400)
    text = report.generate(output=tmp_path / "report.md").read_text(encoding="utf-8")
    assert row(text, "bits per byte")[1] == "1.2500 ± 0.0040 (n=65,536 tokens, 256 rows)"
    assert "- validation bits per byte: 1.250000 ± 0.004000 (n=65,536 tokens, 256 rows) at the end, " in text
    assert row(text, "CORE")[1] == "0.0500 ± 0.0080 (n=11,000, in training)"
    assert row(text, "boolq")[1:] == ["0.7000 ± 0.0100 (n=100)", "-0.2000 ± 0.0400", "17"]
    assert row(text.split("## Super")[1], "GSM8K")[1:4] == ["0.5000 ± 0.0100 (n=1,319)", "25.0%", "4"]
    assert "(moving average), last step 0.5000 ± 0.0600 (n=16)" in text
    assert (
        "- problems cut to the context: 1, in 1 of 41 steps\n- right answers in another format: 2, in 1 of 41 steps"
        in text
    )
    assert "pass@1 0.2500 ± 0.0200, pass@2 0.5000 (n=400)" in text  # the second as in logs of early versions


def test_scores_on_validation_problems_are_not_reported(quick, tmp_path):
    """They are logged beside test scores, even at the same step, and replace none of them."""
    run = train_log("sft")
    score(run, "sft", "Sums", 0.95, n=400, split="test")
    score(run, "sft", "Sums", 0.97, n=400, split="val")
    score(run, "sft", "TwoStep", 0.6, n=400, split="val")
    text = report.generate(output=tmp_path / "report.md").read_text(encoding="utf-8")
    assert row(text.split("## Super")[0], "Sums")[3].startswith("0.9500")
    assert "0.97" not in text and "TwoStep" not in text
    assert [r["score"] for r in run_log.read(run) if r.get("task") == "Sums"] == [0.95, 0.97]


def test_the_run_saved_last_or_the_one_named(quick, tmp_path):
    train_log("base", "old")
    train_log("base", "new")
    run_log.append(base_dir() / "base_checkpoints" / "old", "note", "base", 40, text="touched later")
    assert read("base").tag == "new" and read("base", "old").tag == "old" and not lineage.find("none").runs
    with pytest.raises(UserError, match="a run called 'none'"):
        report.generate("none", tmp_path / "report.md")


@pytest.fixture
def two_roads(quick):
    """The runs d12 and d20 in each stage but rl; the base run of d12 was trained last."""
    for tag in ("d20", "d12"):
        parent = ""
        for stage in ("base", "mid", "sft") if tag == "d20" else ("mid", "sft"):
            run = train_log(stage, tag, parent=parent or "base d12 step 40 0123456789abcdef")
            parent = str(checkpoint.WeightsId.read(stage, run, 40))
    train_log("base", "d12")


def test_runs_of_different_lineages_are_not_mixed(two_roads, tmp_path, capsys):
    text = report.generate(output=tmp_path / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \w[\w ]+ \((\w+)\)", text, re.MULTILINE) == ["d12"] * 3
    left_out = "Runs of other lineages are left out (base d20, mid d20, sft d20): --model_tag reports them."
    again = "mid d12 started from base d12 step 40, but base d12 was trained again after that."
    out = capsys.readouterr().out
    assert all(line in text and line in out for line in (left_out, again))


def test_runs_of_other_lineages_are_neither_printed_nor_compared(two_roads, capsys):
    base = checkpoint.run_dir("base", "d20")
    shutil.copytree(base, base.with_name("a-copy"))
    base.rename(base.with_name("renamed"))  # two copies, of which none is the original
    assert [run.name for run in lineage.find().runs.values()] == ["d12"] * 3
    assert "saved last" not in capsys.readouterr().out


def test_of_copies_of_the_last_run_the_original_is_reported(two_roads, capsys):
    base = checkpoint.run_dir("base", "d12")
    shutil.copytree(base, base.with_name("a-copy"))
    assert lineage.find().runs["base"] == base
    assert "base: a-copy and d12 are copies of one run; d12 is the original" in capsys.readouterr().out
    base.rename(base.with_name("renamed"))
    with pytest.raises(UserError, match=r"a-copy and renamed were saved at the same time: name one .* --model_tag"):
        lineage.find()


def test_the_lineage_follows_recorded_parents_and_not_names(two_roads, tmp_path):
    """An experiment on d20 is reported with the runs of d20, whatever its name."""
    parent = checkpoint.WeightsId.read("sft", checkpoint.run_dir("sft", "d20"), 40)
    train_log("rl", "d12", parent=str(parent))
    assert {stage: run.name for stage, run in lineage.find().runs.items()} == {
        "base": "d20", "mid": "d20", "sft": "d20", "rl": "d12"
    }  # fmt: skip
    named = lineage.find("d12")
    assert [run.name for run in named.runs.values()] == ["d12"] * 4
    assert "rl d12 started from sft d20 step 40, which is not in this report." in named.remarks


def test_a_parent_that_is_gone_is_said(quick):
    train_log("sft", parent="mid gone step 7 0123456789abcdef")
    chosen = lineage.find()
    assert list(chosen.runs) == ["sft"]
    assert chosen.remarks == ["sft d4 started from mid gone step 7, which is not in this report."]


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff\xfe", b"", b'{"model": {"n_layer": 4}, "time": "noon"}'])
def test_damaged_and_foreign_files_of_a_run_end_no_report(road, tmp_path, text, capsys):
    """Neither do other things that lie beside checkpoints."""
    run = checkpoint.run_dir("sft", "d4")
    for path in (run / "config.json", run / "step_000040" / "meta.json", base_dir() / "report" / "start.json"):
        path.write_bytes(text)
    for name in ("step_000020-hf", "step_5", "step_٠٠٠٠٢٠", "step_000020 (copy)", "abandoned_step_000040.2026"):
        (run / name).mkdir()
    with open(run / run_log.LOG, "ab") as log:
        log.write(b'7\n[1]\n{"a": 1}\n{"kind": "eval", "stage": "sft", "step": 40, "task": "X"}\n\xe4\xb8\n')
    written = report.generate(output=tmp_path / "report.md").read_text(encoding="utf-8")
    assert "## Supervised finetuning (d4)" in written
    assert text[:8] == b'{"model"' or "meta.json is damaged" in capsys.readouterr().out


def test_a_presets_runs_are_reported(quick, tmp_path, capsys):
    train_log("base", "cpu")
    train_log("base", "later")
    run("generate", "--config=cpu", f"--output={tmp_path}/r.md")
    assert "Pretraining (cpu)" in (tmp_path / "r.md").read_text(encoding="utf-8")
    assert (base_dir() / "report" / "cpu" / "report.md").exists()


def test_wall_time_without_and_with_rl(road):
    runs = {stage: read(stage) for stage in ("base", "sft", "rl")}
    for run, end in zip(runs.values(), (1000.0, 2000.0, 5000.0), strict=True):
        for record in run.records:
            record |= {"time": end, "seconds": 0}
    assert report._wall_time(runs, {"time": 500.0}) == (4500.0, 1500.0)
    assert report._wall_time(runs, {}) == (4000.0, 1000.0)


def test_an_evaluation_a_week_later_adds_its_own_time_alone(road):
    """Every task adds its time; ChatCORE is the mean of the tasks and adds none."""
    runs = {"sft": read("sft")}
    for record in runs["sft"].records:
        record["time"] = 1000.0 + record["step"] + (7 * 86_400 if record["kind"] == "eval" else 0)
    runs["sft"].records.append({"kind": "note", "stage": "sft", "step": 40, "text": "finished", "time": 1050.0})
    assert report._wall_time(runs, {"time": 1000.0})[0] == 50 + 4 * 12


def test_every_tag_has_its_own_start_and_report(quick, tmp_path):
    """The reported time is that of the reported run, whatever else was started before or after it."""
    starts = {}
    for tag, ago in (("old", 5000), ("new", 100)):
        starts[tag] = report.reset(tag)
        record = json.loads(starts[tag].read_text(encoding="utf-8"))
        starts[tag].write_text(json.dumps(record | {"time": record["time"] - ago}))
        train_log("base", tag)
    for tag, minutes in (("old", "1h23m"), ("new", "1m40s")):
        written = report.generate(tag, tmp_path / "report.md")
        assert written.parent == starts[tag].parent == base_dir() / "report" / tag
        text = written.read_text(encoding="utf-8")
        assert f"Total wall-clock time since the reset: {minutes}" in text and f"Pretraining ({tag})" in text
    # A reset after the first record is not the start of the run.
    report.reset("old")
    assert "since the first record" in report.generate("old", tmp_path / "report.md").read_text(encoding="utf-8")


def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report", *arguments])
        commandline.run(report.main, config.Report)


def test_command_line(quick, tmp_path, capsys):
    for flags, folder in (([], "report"), (["-g", "d4"], "report/d4"), (["--model-tag=d5"], "report/d5")):
        run("reset", *flags)
        start = json.loads((base_dir() / folder / "start.json").read_text(encoding="utf-8"))
        assert start["time"] <= time.time() and "jax" in start["environment"]["Versions"]
    train_log("base")
    run("generate", "-g", "d4", "--output", str(tmp_path / "r.md"))
    assert (tmp_path / "r.md").read_text(encoding="utf-8").startswith("# nanochat report")
    assert f"written to {base_dir()}/report/d4/report.md and {tmp_path}/r.md" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["generate"], "nothing to report on"), ([], "{reset,generate}"), (["best"], "best: must be reset or generate"),
     (["reset", "--tag=x"], "--tag=x")],
)  # fmt: skip
def test_mistakes_on_the_command_line_are_one_line(quick, capsys, arguments, words):
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: ") and words in error and error.count("\n") == 1
