"""How many rows are computed at once: the fastest if the device reports its memory, and the same after a resume."""

import gc
import re

import jax
import pytest
import tiny

from nanochat_jax import checkpoint, run_log
from nanochat_jax.config import UserError
from nanochat_jax.parallel import devices, processes
from nanochat_jax.training import batch_trial
from nanochat_jax.training.batch_shape import BatchShape
from nanochat_jax.training.loop import train
from nanochat_jax.training.run import open_run
from nanochat_jax.training.stages import base_stage

pytestmark = pytest.mark.usefixtures("in_world")

FLAGS = {"device_batch_size": 0, "total_batch_size": 512, "num_iterations": 2}  # 8 rows of 64 tokens


@pytest.fixture
def device(monkeypatch):
    """device(limit, times) is a stand-in for a GPU: its memory in bytes, and seconds a step for each number of rows.

    A step needs 1 MiB for each row that is computed at once.
    Returns the list of the numbers of rows that are timed.
    """
    timed = []

    def put(limit: int, times: dict[int, float]) -> list[int]:
        def time_step(run, step, state, grad_accum_steps, rows):
            timed.append(rows)
            assert grad_accum_steps * rows == 8
            return times[rows], state

        monkeypatch.setattr(batch_trial, "memory_limit", lambda: limit)
        monkeypatch.setattr(batch_trial, "compile_step", lambda run, grad_accum_steps, rows: rows)
        monkeypatch.setattr(batch_trial, "peak_memory", lambda step: step * 2**20)
        monkeypatch.setattr(batch_trial, "time_step", time_step)
        return timed

    return put


def shape_of(**changes) -> BatchShape:
    """Opens a run and sets up its stage, as `loop.train` does."""
    cfg = tiny.base_config(**FLAGS | changes)
    with open_run(cfg, 0.95) as run:
        stage = base_stage(run, cfg)
        stage.loader.close()
        assert run.origin["rows"] == stage.batch_shape.rows
        return stage.batch_shape


@pytest.mark.parametrize(
    ("times", "rows", "printed"),
    [({8: 0.374, 4: 0.371}, 4, "4, the fastest of those timed (374.0 ms a step with 8, 371.0 ms a step with 4)"),
     ({8: 0.371, 4: 0.374}, 8, "8, the fastest of those timed (371.0 ms a step with 8, 374.0 ms a step with 4)"),
     ({8: 0.371, 4: 0.371}, 8, "8, the fastest of those timed (371.0 ms a step with 8, 371.0 ms a step with 4)")],
    ids=["fastest is not the most", "the most is fastest", "equal"],
)  # fmt: skip
def test_a_run_takes_what_is_fastest_and_prints_the_times(device, capsys, times, rows, printed):
    timed = device(2**40, times)
    shape = shape_of(model_tag="given")
    assert timed == [8, 4] and f"rows at once: {printed}\n" in capsys.readouterr().out
    assert (shape.rows, shape.grad_accum_steps) == (rows, 8 // rows)


def test_hosts_that_measure_different_times_choose_the_same(device, monkeypatch, capsys):
    """Process 0 finds 4 rows faster, and process 1 finds 8 faster. The slower process decides in both."""
    of_process = [{8: 0.30, 4: 0.29}, {8: 0.31, 4: 0.33}]
    for mine, other in (of_process, of_process[::-1]):
        device(2**40, mine)
        theirs = {round(1e6 * mine[n]): round(1e6 * other[n]) for n in mine}
        monkeypatch.setattr(processes, "all_max", lambda number, theirs=theirs: max(number, theirs.get(number, 0)))
        assert shape_of(model_tag="host").rows == 8
        times = "(310.0 ms a step with 8, 330.0 ms a step with 4)"
        assert f"rows at once: 8, the fastest of those timed {times}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "peak", "rows", "printed"),
    [({"total_batch_size": 64}, None, 1, "1, the most that fit"),
     ({"total_batch_size": 7 * 64}, None, 7, "7, the most that fit"),  # one row at once would be slower
     ({"num_iterations": 1}, 1e12, 8, "8, the most that fit (in a run of less than 20 minutes, nothing is timed)"),
     ({"dry_run": True}, None, 8, "8 fit; a run of more than 20 minutes also times 4, and takes what is faster")],
    ids=["one row", "nothing near", "short", "dry"],
)  # fmt: skip
def test_what_is_not_worth_it_is_not_timed(device, monkeypatch, capsys, changes, peak, rows, printed):
    timed = device(2**40, {})
    monkeypatch.setattr(devices, "peak_flops", lambda: peak)
    assert shape_of(model_tag="untimed", **changes).rows == rows
    assert timed == [] and f"rows at once: {printed}\n" in capsys.readouterr().out


def test_a_run_that_resumes_keeps_its_rows_though_others_are_faster_now(device, capsys):
    def losses() -> dict[int, float]:
        return {r["step"]: r["loss"] for r in run_log.read(checkpoint.run_dir("base", "kept")) if r["kind"] == "train"}

    flags = {"model_tag": "kept", "num_iterations": 4}
    device(2**40, {8: 0.2, 4: 0.1})
    train(tiny.base_config(**FLAGS | flags))
    before = losses()
    timed = device(2**40, {8: 0.1, 4: 0.2})
    timed.clear()
    capsys.readouterr()
    train(tiny.base_config(**FLAGS | flags | {"resume": "2"}))
    out = capsys.readouterr().out
    assert timed == [] and "rows at once: 4, as in the run so far\n" in out and " x 4 rows x " in out
    assert losses() == before, "equal to the last bit"

    # On a device without room for these rows, the run says so and chooses again.
    with pytest.raises(UserError, match=r"^one row of 64 tokens needs"):
        device(2**10, {})
        shape_of(**flags, resume="2")
    assert "4 rows at once so far, which this machine or --mesh does not allow" in capsys.readouterr().out


def test_real_steps_are_timed_on_one_state_that_is_thrown_away(monkeypatch, capsys):
    def live() -> int:
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    def time_step(run, *args):
        found = really(run, *args)
        extra = live() - before
        state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.state))
        assert state <= extra < 1.5 * state
        return found

    monkeypatch.setattr(batch_trial, "memory_limit", lambda: 2**40)
    really, before = batch_trial.time_step, live()
    monkeypatch.setattr(batch_trial, "time_step", time_step)
    shape_of(model_tag="timed")
    assert live() <= before
    pattern = r"rows at once: \d, the fastest of those timed \((.*) ms a .* 8, (.*) ms a .* 4\)"
    found = re.search(pattern, capsys.readouterr().out)
    assert found and all(float(ms) > 0 for ms in found.groups())
