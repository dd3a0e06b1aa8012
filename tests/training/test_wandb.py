"""wandb shows a copy of the log. Whatever it does, the run goes on."""

import shutil
import sys
import time

import pytest
import tiny

from nanochat_jax import checkpoint, run_log
from nanochat_jax.training import wandb_log
from nanochat_jax.training.loop import train
from nanochat_jax.training.wandb_log import Wandb


@pytest.fixture(scope="module")
def world(world):
    """The tiny world with a finished run, `made`, with the steps 2, 4, 6 and 8."""
    tiny.train_made(world)
    return world


@pytest.fixture
def run(own_base_dir, world, monkeypatch, request):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world))
    folder = checkpoint.run_dir("base", request.node.name.replace("[", "-").strip("]"))
    shutil.copytree(checkpoint.run_dir("base", "made"), folder)
    return folder


class FakeWandb:
    """The part of wandb that a run uses; `runs` lists those that were started or resumed."""

    def __init__(self):
        self.runs, self.finished = [], 0

    def init(self, *, id, **kwargs):
        self.id = id or f"made-up-{len(self.runs)}"
        self.runs.append({"id": self.id, "logged": []} | kwargs)
        return self

    def log(self, fields):
        self.runs[-1]["logged"].append(fields)

    def finish(self):
        self.finished += 1


def again(folder, **changes):
    train(tiny.base_config(model_tag=folder.name, keep_last=9, **changes))


def test_a_run_that_goes_on_is_one_run_on_wandb(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    for _ in range(2):
        again(run, resume="6", run="shown")
    again(run, resume="6", run="dummy")
    first, second = fake.runs
    assert first["id"] == second["id"] and fake.finished == 2
    assert first["resume"] == "allow" and first["name"] == "shown" and first["project"] == "nanochat"
    assert [r["step"] for r in first["logged"] if "train/loss" in r] == [7, 8]
    again(run, resume="never", run="shown", num_iterations=1)
    assert fake.runs[-1]["id"] != first["id"], "a new run"


def fail(*_, **__):
    raise RuntimeError("api_key not configured (no-tty)\ncall wandb.login()")


@pytest.mark.parametrize("method", ["init", "log", "finish"])
def test_a_failure_of_wandb_is_one_line_and_the_run_ends_well(run, method, monkeypatch, capsys):
    fake = FakeWandb()
    setattr(fake, method, fail)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    again(run, resume="never", run="shown", num_iterations=2)
    out = capsys.readouterr().out
    assert out.count("wandb: api_key not configured (no-tty): run 'shown' goes on, logged to log.jsonl only\n") == 1
    assert checkpoint.steps(run) == [2] and run_log.read(run)[-1]["text"] == "finished"


STAND_INS = {
    "broken": "raise TypeError('Descriptors cannot be created directly')",
    "old": "def init(**_): raise AttributeError('no attribute: settings')",
    "folder": None,
}


@pytest.mark.parametrize("kind", STAND_INS)
def test_a_package_that_does_not_work_ends_no_run(tmp_path, monkeypatch, capsys, kind):
    """`folder` is a folder called wandb, in which wandb has kept its files before it was uninstalled."""
    (tmp_path / "wandb" / "run-1").mkdir(parents=True)
    if STAND_INS[kind]:
        (tmp_path / "wandb" / "__init__.py").write_text(STAND_INS[kind])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    view = Wandb(tmp_path, "base", "shown", {})
    view.log(1, loss=2.0)
    view.finish()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith("wandb: ") and "run 'shown' goes on" in out
    assert kind != "folder" or "not installed (pip install wandb)" in out
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def test_an_end_that_hangs_is_not_waited_for(tmp_path, monkeypatch, capsys):
    fake = FakeWandb()
    fake.finish = lambda: time.sleep(60)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(wandb_log, "PATIENCE", 0.2)
    start = time.monotonic()
    Wandb(tmp_path, "base", "shown", {}).finish()
    assert time.monotonic() - start < 10 and "it has not finished after 0.2 s" in capsys.readouterr().out


def test_without_wandb_the_process_says_so_and_trains(world):
    """In a process of its own, where wandb is a folder, and no package."""
    done = tiny.run("base", world, model_tag="alone", num_iterations=1, run="shown")
    assert done.returncode == 0, done.stderr
    assert "run 'shown' goes on, logged to log.jsonl only" in done.stdout
