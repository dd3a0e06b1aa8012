"""The names of the numbers that go to wandb: ours, and those of the original nanochat."""

import functools
import json

import disturbed
import killable
import pytest
import tiny

from nanochat_jax import checkpoint, run_log
from nanochat_jax.training import wandb_log

STAND_IN = """
import json

class Run:
    id = "abc"

    def log(self, numbers):
        with open(SEEN, "a") as file:
            file.write(json.dumps(numbers) + "\\n")

    def finish(self):
        pass

def init(**settings):
    return Run()
"""
TOTALS = {"total_training_flops", "total_training_time"}
# {stage: (its flags, the names that the original logs)}; val_loss is missing, since ours is bits per byte: val/bpb.
NAMES = {
    "base": (
        {"eval_every": 2},
        TOTALS | {"train/loss", "train/lrm", "train/dt", "train/tok_per_sec", "train/grad_norm", "val/bpb"},
    ),
    "mid": (
        {"eval_every": 2},
        TOTALS | {"train/loss", "train/lrm", "train/dt", "train/tok_per_sec", "val/bpb"},
    ),
    "sft": (
        {"eval_metrics_every": 2, "eval_metrics_tasks": "choice|sums", "eval_metrics_max_problems": 4},
        {"train_loss", "lrm", "num_tokens", "choice_acc", "sums_acc"},
    ),
    "rl": (
        {"eval_every": 2, "eval_examples": 2, "eval_samples": 2},
        {"reward", "sequence_length", "lrm", "pass@1", "pass@2"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each stage logs to a stand-in for wandb."""
    base = tmp_path_factory.mktemp("world")
    tiny.make_world(base)
    logged = {}
    for stage, (flags, _) in NAMES.items():
        path, output = base / stage / "seen.jsonl", base / f"{stage}.txt"
        path.parent.mkdir()
        (path.parent / "wandb.py").write_text(f"SEEN = {str(path)!r}\n{STAND_IN}")
        flags = {"run": "named", "model_tag": "named", "num_iterations": 4} | flags
        before = functools.partial(disturbed.import_from, path.parent)
        assert killable.run(stage, base, output, before=before, **flags) == 0, output.read_text()
        logged[stage] = [json.loads(line) for line in path.read_text().splitlines()], base
    return logged


@pytest.mark.parametrize("stage", NAMES)
def test_numbers_have_our_names_and_those_of_the_original(stage, seen, monkeypatch):
    lines, base = seen[stage]
    names = {name for line in lines for name in line}
    assert names >= NAMES[stage][1], NAMES[stage][1] - names
    assert all("step" in line for line in lines)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    records = run_log.read(checkpoint.run_dir(stage, "named"))
    last = next(r for r in reversed(records) if r["kind"] == "train")
    line = next(line for line in reversed(lines) if "train/loss" in line)
    lrm = line["train/lrm" if stage in ("base", "mid") else "lrm"]
    assert line["step"] == last["step"] == 4 and lrm == line["train/lr_mult"] == last["lr_mult"]
    assert line["total_training_flops"] == last["flops"] > 0
    if stage == "sft":
        scores = {r["task"]: r["score"] for r in records if r["kind"] == "eval" and r["step"] == 4}
        at_4 = {name: value for line in lines if line["step"] == 4 for name, value in line.items()}
        assert {"choice": at_4["choice_acc"], "sums": at_4["sums_acc"]} == {k.lower(): v for k, v in scores.items()}


def test_core_has_the_name_of_the_original():
    totals = {"seconds": 60.0, "tokens": 1, "flops": 2e18}
    fields = {"core": 0.2, "stderr": 0.01, "n": 9, "centered": {"copa": 0.3, "squad": 0.1}}
    assert wandb_log.numbers("base", "core", fields, totals) == {
        "core/core": 0.2, "core/stderr": 0.01, "core/n": 9, "core_metric": 0.2,
        "centered_results": {"copa": 0.3, "squad": 0.1},
        "total_training_flops": 2e18, "total_training_time": 60.0,
    }  # fmt: skip
