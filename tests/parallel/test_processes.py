"""How the processes of a run find each other, agree, and end together."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import tiny

from nanochat_jax.config import REPOSITORY, UserError
from nanochat_jax.parallel import processes


@pytest.fixture
def joined(monkeypatch):
    """The arguments of every attempt to join other processes."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **where: calls.append(where))
    for name in ("SLURM_STEP_NUM_TASKS", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_one_process_joins_nobody(joined, monkeypatch):
    processes.join("", 0, -1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    processes.join("", 0, -1)
    assert joined == []


@pytest.mark.parametrize(("name", "value"), [("SLURM_STEP_NUM_TASKS", "16"), ("JOB_COMPLETION_INDEX", "0")])
def test_slurm_and_kubernetes_say_themselves_where(joined, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package)
    processes.join("", 0, -1)
    assert joined == [{"heartbeat_timeout_seconds": 30}]
    processes.join("", 1, -1)
    assert len(joined) == 1, "--num_processes=1: there are no others, whatever the environment says"


def test_kubernetes_cannot_be_asked_without_its_package(joined, monkeypatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"pip install '.\[k8s\]', or give --coordinator, or --num_processes=1"):
        processes.join("", 0, -1)
    assert joined == []


def test_flags_say_where_and_come_first(joined, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    processes.join("there:1234", 2, 1)
    (where,) = joined
    assert where.items() >= {"coordinator_address": "there:1234", "num_processes": 2, "process_id": 1}.items()


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("there:1", 0, -1), "needs --num_processes=N and --process_id=0 to N-1, got 0 and -1"),
     (("there:1", 2, 2), "got 2 and 2"), (("there", 2, 0), "--coordinator=there: must be host:port"),
     (("", 2, 0), "--num_processes needs --coordinator=host:port")],
)  # fmt: skip
def test_processes_that_cannot_be_counted_are_refused(joined, flags, words):
    with pytest.raises(UserError, match=words):
        processes.join(*flags)
    assert joined == []


def test_processes_that_cannot_be_joined_are_one_line(joined, monkeypatch):
    def fail(**where):
        raise RuntimeError("nobody there\nand more of it")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"^could not join the other processes: nobody there$"):
        processes.join("there:1", 2, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match="nobody there: try --coordinator=host:port --num_processes=N --process_id=I"):
        processes.join("", 0, -1)


def test_the_example_for_slurm_is_a_script_of_one_task_a_gpu():
    path = REPOSITORY / "docs" / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8")
    assert "--ntasks-per-node=8" in text and "--gpus-per-node=8" in text and "scripts.train --stage=base" in text


# -----------------------------------------------------------------------------
# Two processes


def start_two(code: str, base: Path) -> list[subprocess.Popen]:
    """Starts python -c CODE ADDRESS 0, and the same with 1."""
    where = tiny.free_address()
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, where, str(i)], cwd=REPOSITORY, env=tiny.environment(base),
            stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip


DECIDE = """
import sys
from nanochat_jax.parallel import devices, processes
from nanochat_jax.config import UserError
me = int(sys.argv[2])
devices.start("cpu", sys.argv[1], 2, me)
say = lambda text: print(text, file=sys.stderr)
assert processes.broadcast_from_0(lambda: "x" * 10_000 if me == 0 else None) == "x" * 10_000
for error in (UserError("fix it"), OSError("no such thing")):
    def fail():
        assert me == 0, "decided on another process"
        raise error
    try:
        processes.broadcast_from_0(fail)
    except Exception as raised:
        say(f"{type(raised).__name__}: {raised}")
"""


def test_what_process_0_cannot_do_ends_all_of_them(tmp_path):
    started = start_two(DECIDE, tmp_path)
    errors = [[line for line in p.communicate(timeout=120)[1].splitlines() if "Error" in line] for p in started]
    assert [p.returncode for p in started] == [0, 0], errors
    assert errors == [
        ["UserError: fix it", "OSError: no such thing"],
        ["UserError: process 0: fix it", "RuntimeError: process 0: no such thing"],
    ]


WORK = """
import sys
from nanochat_jax.parallel import devices, processes
from nanochat_jax.config import UserError
me = int(sys.argv[2])
devices.start("cpu", sys.argv[1], 2, me)
with processes.fail_together():
    processes.broadcast_from_0(lambda: None)
    if me == {failing}:
        raise {error}
    processes.broadcast_from_0(lambda: None)  # the other process never takes part
"""


@pytest.mark.parametrize(
    ("failing", "error", "line"),
    [(1, "UserError('made up')", "made up"), (0, "ValueError('no good')", "ValueError: no good"),
     (1, "KeyboardInterrupt()", "KeyboardInterrupt")],
)  # fmt: skip
def test_an_error_of_one_ends_the_other_which_says_whose_it_was(tmp_path, failing, error, line):
    started, begun = start_two(WORK.format(failing=failing, error=error), tmp_path), time.monotonic()
    lines = [p.communicate(timeout=120)[1].strip().splitlines() for p in started]
    assert time.monotonic() - begun < 40  # JAX alone: five minutes
    assert all(p.returncode != 0 for p in started)
    assert lines[failing][-1].endswith(line)
    assert lines[1 - failing][-1] == f"error: process {failing} has ended: {line}"
