"""Meshes: training on eight devices equals training on one, for every mesh, with exactly the collectives we intend."""

import collections
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from sharded_steps import MODEL

from nanochat_jax import checkpoint, run_log
from nanochat_jax.config import REPOSITORY, GPTConfig, ModelFlags, UserError
from nanochat_jax.model import gpt
from nanochat_jax.parallel.sharding import Layout, make_mesh, process_rows
from nanochat_jax.training import optim

# The cases of sharded_steps.py. Those in MORE are compared in slow tests only.
SHARDED = ["data=8 optimizer", "data=8 full", "node=2,data=4 optimizer", "data=4,model=2 full"]
OTHERWISE = ["one batch", "remat matmuls"]
MORE = ["scan", "remat", "node=2,data=4 full", "data=4,model=2 optimizer"]
DEPTHS = [12, 20, 26, 32]
TOGETHER = "node=2,data=4 optimizer"  # also run in two processes
MORE_TOGETHER = "node=2,data=4 full"  # the same, in slow tests only
MUONS = ["26 8", "5 12"]  # layers and width; 52 matrices and a width of 12 do not divide over 8 devices
MORE_MUONS = ["12 8", "20 8", "32 8"]  # the same, in slow tests only


def make_steps(out: Path, cases: list[str], together: str) -> None:
    """Takes five steps per case in a process with eight devices, and those of `together` also in two processes."""
    script = REPOSITORY / "tests" / "support" / "sharded_steps.py"
    command = [sys.executable, str(script), str(out)]
    environment = tiny.environment(out, devices=8) | {"JAX_ENABLE_X64": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([*command, *cases], env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    assert "full rematerialization" not in result.stderr  # XLA found no way from one sharding to another
    where = tiny.free_address()
    halves = [
        subprocess.Popen(
            [*command, together], stderr=subprocess.PIPE, text=True,
            env=environment | tiny.environment(out, devices=4) | {"PROCESS": f"{i}/2@{where}"},
        )
        for i in range(2)
    ]  # fmt: skip
    problems = [p.communicate(timeout=300)[1] for p in halves]
    assert [p.returncode for p in halves] == [0, 0], "".join(problems)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The folder with the results of five steps per case."""
    out = tmp_path_factory.mktemp("steps")
    make_steps(out, ["one device", *OTHERWISE, *SHARDED, *(f"muon {case}" for case in MUONS)], TOGETHER)
    return out


@pytest.fixture(scope="module")
def more_steps(steps):
    """The same folder, with the results of the slow cases."""
    make_steps(steps, [*MORE, *(f"muon {case}" for case in MORE_MUONS)], MORE_TOGETHER)
    return steps


def check_steps(steps: Path, case: str) -> None:
    # In float64: in float32, Newton-Schulz would amplify the rounding that the order of a sum makes.
    one, other = np.load(steps / "one device.npz"), np.load(steps / f"{case}.npz")
    assert np.ptp(one["results"][:, 0]) > 0.01  # the loss changes
    assert {name.split("[")[0].split(".")[1] for name in one if name != "results"} == {"params", "opt_state"}
    for name in one:
        np.testing.assert_allclose(other[name], one[name], rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("case", [*OTHERWISE, *SHARDED, f"{TOGETHER} in 2"])
def test_five_steps_are_those_of_one_device(steps, case):
    check_steps(steps, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*MORE, f"{MORE_TOGETHER} in 2"])
def test_five_steps_in_other_ways_are_those_of_one_device(more_steps, case):
    check_steps(more_steps, case)


def check_muon(steps: Path, case: str) -> None:
    results = np.load(steps / f"muon {case}.npz")
    names = [name.removeprefix("one/") for name in results if name.startswith("one/")]
    assert len(names) == 12 and all(len(results[f"one/{name}"]) == int(case.split()[0]) for name in names)
    for name in names:
        for how in ("all", "full"):
            np.testing.assert_allclose(
                results[f"{how}/{name}"], results[f"one/{name}"], rtol=0, atol=1e-9, err_msg=name
            )


@pytest.mark.parametrize("case", MUONS)
def test_muon_shares_out_as_many_layers_as_there_are(steps, case):
    """26 layers make batches of 52 matrices, which eight devices do not divide."""
    check_muon(steps, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_MUONS)
def test_muon_shares_out_the_layers_of_other_presets(more_steps, case):
    check_muon(more_steps, case)


def collectives(hlo: str) -> dict[bool, collections.defaultdict]:
    """{inside a loop?: {kind of collective: sizes of the arrays that it moves}}; single numbers are left out."""
    moved = {True: collections.defaultdict(list), False: collections.defaultdict(list)}
    inside = True
    for line in hlo.splitlines():
        if re.match(r"(ENTRY )?%?[\w.\-]+ \(.*\{$", line):
            inside = not line.startswith("ENTRY")
        kinds = "all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute"
        if match := re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line):
            sizes = [math.prod(map(int, a.split(","))) for a in re.findall(r"\w+\[([\d,]+)\]", match[1])]
            moved[inside][match[2]] += [size for size in sizes if size > 1]
    return moved


def test_sharded_optimizer_reduces_once_a_step(steps):
    moved = collectives((steps / "data=8 optimizer.hlo").read_text())
    assert not any(moved[True].values())  # no communication between micro-batches
    assert len(moved[False]["reduce-scatter"]) == 8  # one for each kind of weight
    assert not moved[False]["all-reduce"]


@pytest.mark.parametrize(("case", "data"), [("data=8 optimizer", 8), ("node=2,data=4 optimizer", 4)])
def test_muon_sends_each_matrix_once_there_and_once_back(steps, case, data):
    """The model has matrices of three shapes; the HLO of an all-to-all has one array for each target device."""
    moved = collectives((steps / f"{case}.hlo").read_text())[False]
    assert len(moved["all-to-all"]) == 3 * data
    assert len(moved["all-gather"]) == 3 + 2  # Muon's updates by shape; embedding and head


def test_between_nodes_only_shares_of_the_gradient_travel(steps):
    moved = collectives((steps / "node=2,data=4 optimizer.hlo").read_text())
    assert not any(moved[True].values())
    assert sum(moved[False]["reduce-scatter"]) == MODEL.num_params / 4
    assert sum(moved[False]["all-reduce"]) == MODEL.num_params / 4  # after the reduce-scatter, so a quarter of them


@pytest.mark.slow
def test_the_loss_falls_as_in_float32_if_gradients_and_updates_travel_in_bfloat16(tmp_path):
    """The means of 20 steps differ by up to 0.0004. With float8_e5m2 instead, they differ by 0.0036."""
    script = REPOSITORY / "tests" / "support" / "curve_by_dtype.py"
    environment = tiny.environment(tmp_path, devices=8) | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, str(script), "float32", "bfloat16"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    wide, narrow = np.array(json.loads(result.stdout.splitlines()[-1])).reshape(2, 15, 20).mean(-1)
    assert wide[0] > wide[-1] + 0.4  # it learns
    np.testing.assert_allclose(narrow, wide, rtol=0, atol=0.001)
    assert (narrow != wide).any()


def test_full_sharding_gathers_and_reduces_in_every_micro_batch(steps):
    moved = collectives((steps / "data=8 full.hlo").read_text())
    weights = 3 * 6 + 2  # six per layer, embedding and head
    assert len(moved[True]["all-reduce"] + moved[True]["reduce-scatter"]) == weights
    assert not moved[False]["all-reduce"] + moved[False]["reduce-scatter"]
    # On a CPU, XLA gathers the weights once for all micro-batches; on a GPU, in each.
    assert len(moved[True]["all-gather"] + moved[False]["all-gather"]) >= weights
    assert len(moved[False]["all-to-all"]) == 2 * 3 * 8  # Muon's: three shapes, there and back


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("data", [8, 3])
def test_every_preset_can_be_sharded(depth, data):
    """Every spec divides its array, on any number of devices; on eight, all of the optimizer state is sharded."""
    model = ModelFlags(depth=depth).gpt_config(65536)
    mesh = jax.sharding.AbstractMesh((1, data, 1), ("node", "data", "model"))
    layout = Layout(mesh)
    params = jax.eval_shape(lambda: gpt.init(model))
    tx = optim.make_optimizer(model.n_embd, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, layout=layout)
    opt_state = jax.eval_shape(tx.init, params)
    specs = jax.tree.leaves(layout.shard_specs(opt_state), is_leaf=lambda x: isinstance(x, jax.P))
    for spec, leaf in zip(specs, jax.tree.leaves(opt_state), strict=True):
        if data == 8 and leaf.ndim:
            assert "data" in spec, (spec, leaf.shape)
        for axis, size in zip(spec, leaf.shape, strict=False):
            assert axis is None or size % mesh.shape[axis] == 0


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("data=3", "this run has 1"),
        ("data=1,data=1", "data is given twice"),
        ("rows=2", "node=N"),
        ("data=zero", "node=N"),
        ("data", "node=N"),
        ("model=2", "try"),
    ],
)
def test_a_mesh_that_does_not_match_the_devices_is_refused(spec, complaint):
    with pytest.raises(UserError, match=complaint):
        make_mesh(spec)


@pytest.mark.parametrize("devices", [1, 6, 8])
@pytest.mark.parametrize("spec", ["data=7", "node=3", "model=3", "node=4,model=4", "node=2,data=2,model=16"])
def test_the_mesh_that_is_suggested_has_as_many_devices_as_there_are(devices, spec, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    with pytest.raises(UserError) as refused:
        make_mesh(spec)
    suggested = str(refused.value).partition(": try ")[2]
    assert math.prod(int(part.partition("=")[2]) for part in suggested.split(",")) == devices


@pytest.mark.parametrize(
    ("processes", "own", "model", "shares"),
    [(1, 8, 2, [0]), (2, 4, 1, [0, 1]), (2, 4, 2, [0, 1]), (2, 4, 8, [0, 0]), (4, 1, 2, [0, 0, 1, 1]), (2, 3, 2, None)],
)
def test_processes_that_share_a_replica_read_the_same_rows(processes, own, model, shares, monkeypatch):
    devices = [SimpleNamespace(process_index=i // own) for i in range(processes * own)]
    data = len(devices) // model
    mesh = SimpleNamespace(
        devices=np.reshape(devices, (1, data, model)), shape={"node": 1, "data": data, "model": model},
        local_devices=devices[:own],
    )  # fmt: skip
    if shares is None:
        with pytest.raises(
            UserError, match=r"model=2 does not line up with the 3 devices of a process.*: try node=1,data=6,model=1"
        ):
            process_rows(mesh)
        return
    rows = []
    for i in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda i=i: i)
        rows.append(process_rows(mesh))
    assert rows == [(share, max(shares) + 1) for share in shares]


def test_heads_that_the_model_axis_does_not_divide_are_refused():
    layout = Layout(jax.sharding.AbstractMesh((1, 2, 4), ("node", "data", "model")))
    with pytest.raises(UserError, match="a head is never split: try model=2"):
        layout.check(GPTConfig(n_layer=2, n_head=6, n_kv_head=2, n_embd=96))


# -----------------------------------------------------------------------------
# Several processes


def start_together(
    base: Path, processes: int, devices: int, code: str = "", output: Path | None = None, **changes
) -> list[subprocess.Popen]:
    """Starts one run of base in several processes on this machine, by `code` if given instead of `-m scripts.train`.

    Process i prints to the file `output`/i if `output` is given, else to two pipes.
    """
    where = tiny.free_address()

    def start(i: int) -> subprocess.Popen:
        python, *module = tiny.command("base", coordinator=where, num_processes=processes, process_id=i, **changes)
        command = [python, "-c", code, *module[2:]] if code else [python, *module]
        with open(output / str(i) if output else os.devnull, "w") as file:
            out, err = (file, subprocess.STDOUT) if output else (subprocess.PIPE, subprocess.PIPE)
            return subprocess.Popen(
                command, cwd=REPOSITORY, env=tiny.environment(base, devices), stdout=out, stderr=err, text=True
            )

    return [start(i) for i in range(processes)]


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in run_log.read(run) if r["kind"] == "train"]


def place(run: Path, step: int) -> str:
    """The saved state of the data pipeline after a step, as text."""
    return (checkpoint.step_dir(run, step) / "data.json").read_text(encoding="utf-8")


FLAGS = {"total_batch_size": 1024, "device_batch_size": 1, "eval_every": 4}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A base folder that holds a run of one process on eight devices, with the tag "one"."""
    base = tmp_path_factory.mktemp("alone")
    tiny.make_world(base)
    one = tiny.run("base", base, devices=8, model_tag="one", **FLAGS)
    assert one.returncode == 0, one.stderr
    return base


@pytest.mark.parametrize(("own", "mesh"), [(4, ""), pytest.param(1, "model=2", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(alone, own, mesh):
    """With rows of its own in each process, or with one model sharded over both."""
    tag = f"two-of-{own}"
    started = start_together(alone, 2, own, model_tag=tag, mesh=mesh, **FLAGS)
    (out, problems), (silent, more_problems) = [p.communicate(timeout=300) for p in started]
    assert [p.returncode for p in started] == [0, 0], problems + more_problems
    assert f"{2 * own} x cpu" in out and "in 2 processes" in out
    # Only process 0 prints; the library Gloo does as well, from threads that may interrupt each other.
    gloo = "[Gloo] Rank is connected to peer ranks. Expected number of connected peer ranks is :"
    assert set(re.findall("[A-Za-z]+", silent)) <= set(re.findall("[A-Za-z]+", gloo)), silent
    one, two = (losses(alone / "base_checkpoints" / tag) for tag in ("one", tag))
    np.testing.assert_allclose(two, one, rtol=1e-4)


def test_one_process_goes_on_where_two_were_ended(alone):
    run = alone / "base_checkpoints" / "ended"
    long = FLAGS | {"model_tag": "ended", "num_iterations": 60, "save_every": -1}
    started = start_together(alone, 2, 4, **long)
    deadline = time.monotonic() + 200
    while len(losses(run)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    started[1].terminate()  # one gets the signal, both stop after the same step
    (out, problems), (_, more_problems) = [p.communicate(timeout=200) for p in started]
    assert "run the same command again to resume" in out, problems + more_problems
    assert all(p.returncode != 0 for p in started)
    rest = tiny.run("base", alone, devices=8, **long)
    assert rest.returncode == 0, rest.stderr
    assert "resuming at step" in rest.stdout
    assert len(losses(run)) == 60
    whole = tiny.run("base", alone, devices=8, **long | {"model_tag": "whole"})
    assert whole.returncode == 0, whole.stderr
    np.testing.assert_allclose(losses(run), losses(run.with_name("whole")), rtol=1e-2)
    assert place(run, 60) == place(run.with_name("whole"), 60)


def test_two_processes_go_on_where_one_was_ended(alone):
    one = alone / "base_checkpoints" / "one"
    run = one.with_name("wider")
    shutil.copytree(one, run, ignore=shutil.ignore_patterns("step_000008"))
    started = start_together(alone, 2, 4, model_tag="wider", **FLAGS)
    (out, problems), (_, more_problems) = [p.communicate(timeout=300) for p in started]
    assert [p.returncode for p in started] == [0, 0], problems + more_problems
    assert "resuming at step 6" in out and "in 2 processes" in out
    np.testing.assert_allclose(losses(run), losses(one), rtol=1e-4)
    assert place(run, 8) == place(one, 8)


FAULT = """
import os, signal, sys, jax
from nanochat_jax import commandline
from nanochat_jax.config import UserError
from nanochat_jax.training.batch_shape import BatchShape
from scripts import train
shaped, calls = BatchShape.shaped, []
def fail(*args):
    calls.append(1)
    if len(calls) == 4 and jax.process_index() == {failing}:
        print("now", file=sys.stderr, flush=True)
        {fault}
    return shaped(*args)
BatchShape.shaped = fail
commandline.run(train.main, train.chosen_stage())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failing", "fault", "own_line", "reported"),
    [(1, "raise UserError('made up')", "error: made up", "made up"),
     (0, "raise OSError('made up')", "OSError: made up", "OSError: made up"),
     (1, "os.kill(os.getpid(), signal.SIGKILL)", "now", None)],
)  # fmt: skip
def test_an_error_of_one_process_ends_both(alone, failing, fault, own_line, reported):
    """Within seconds, each with a line that says which one failed; if one was killed, once heartbeats are missed."""
    code = FAULT.format(failing=failing, fault=fault)
    started = start_together(
        alone, 2, 4, code, model_tag=f"alone{failing}", **FLAGS | {"num_iterations": 2000, "max_epochs": 1000}
    )
    assert any(line.strip() == "now" for line in started[failing].stderr)
    begun = time.monotonic()
    problems = [p.communicate(timeout=150)[1] for p in started]
    assert time.monotonic() - begun < (15 if reported else 60)
    assert all(p.returncode != 0 for p in started), problems
    last = [["now", *text.strip().splitlines()][-1] for text in problems]
    assert last[failing] == own_line
    if reported:
        assert last[1 - failing] == f"error: process {failing} has ended: {reported}"


def test_a_save_that_fails_on_one_process_ends_both(alone):
    """The save of process 1 fails first; then, when the run is resumed, that of process 0."""
    run = alone / "base_checkpoints" / "failing"
    long = FLAGS | {
        "model_tag": "failing",
        "num_iterations": 2000,
        "max_epochs": 1000,
        "save_every": 4,
        "eval_every": -1,
    }
    for failing in (1, 0):
        before, started = checkpoint.steps(run), start_together(alone, 2, 4, **long)
        deadline = time.monotonic() + 200
        while checkpoint.steps(run) == before and time.monotonic() < deadline:
            time.sleep(0.05)
        # Like a full disk, for one process only: no file it writes can exceed this size, and only its arrays need more.
        resource.prlimit(started[failing].pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
        output = [p.communicate(timeout=100) for p in started]
        last = checkpoint.latest(run)
        assert last == max(checkpoint.steps(run)) and last + 4 <= len(losses(run)) <= last + 8
        lines = [problems.strip().splitlines() for _, problems in output]
        ends = f"; the last good checkpoint is step {last}"
        assert lines[failing][-1].startswith(f"error: could not save a checkpoint in {run} (")
        assert lines[failing][-1].endswith(ends) and "File too large" in lines[failing][-1]
        assert lines[1 - failing][-1] == f"error: another process could not save a checkpoint in {run}" + ends
        assert [p.returncode for p in started] == [2, 2]
        assert not [p for p in run.glob("step_*") if not (p / checkpoint.MANIFEST).exists()]
    assert "resuming at step" in output[0][0]


NOISY = """
import disturbed
from nanochat_jax import commandline
from scripts import train
disturbed.print_a_lot()
commandline.run(train.main, train.chosen_stage())
"""


@pytest.mark.slow
@pytest.mark.parametrize("hit", [(0, 1), (0,), (1,)], ids=["both", "first", "second"])
def test_a_storm_of_signals_in_a_storm_of_output_ends_both_processes_after_one_step(alone, hit, tmp_path, monkeypatch):
    """Both print 200 lines for each log record, while SIGTERM comes every millisecond to both of them or to one."""
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{REPOSITORY / 'tests' / 'support'}")
    run = alone / "base_checkpoints" / f"storm{hit}"
    long = FLAGS | {"model_tag": run.name, "num_iterations": 100_000, "max_epochs": 100_000, "save_every": -1}
    started = start_together(alone, 2, 1, NOISY, output=tmp_path, **long)
    deadline = time.monotonic() + 200
    while len(losses(run)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    while time.monotonic() < deadline and any(p.poll() is None for p in started):
        for i in hit:
            started[i].send_signal(signal.SIGTERM)
        time.sleep(0.001)
    texts = [re.sub(r"x{200}\n?", "", (tmp_path / str(i)).read_text()) for i in range(2)]
    assert [p.poll() for p in started] == [143, 143], texts
    for i, text in enumerate(texts):
        assert "Traceback" not in text and "reentrant" not in text, text
        assert text.count("stopping after this step") == (i in hit), text
    (saved,) = checkpoint.steps(run)
    assert f"saved at step {saved}: run the same command again to resume" in texts[0]
    assert saved == len(losses(run)) >= 3, "not a step is lost"
