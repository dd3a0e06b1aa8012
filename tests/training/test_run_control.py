"""When a run saves, evaluates and stops between two optimizer steps."""

import errno
import json
import signal
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanochat_jax.progress import Timer
from nanochat_jax.training.interruption import Interruption
from nanochat_jax.training.loop import NoBatch, next_batch
from nanochat_jax.training.run_control import Evaluation, RunControl
from nanochat_jax.training.start_plan import StartPlan


class FakeRun:
    """Writes down what is asked of it, in order."""

    def __init__(self, save_every: int = -1, resumed_at: int | None = None):
        self.events: list[str] = []
        self.cfg = SimpleNamespace(save_every=save_every)
        self.step, self.data = resumed_at or 0, None if resumed_at is None else {}
        self.saver = SimpleNamespace(wait_all=lambda: self.events.append("wait"))

    def save(self, step: int, place: dict) -> None:
        self.events.append(f"save {step} at {place['row']}")

    def evaluation(self, name: str, every: int, **when: bool) -> Evaluation:
        return Evaluation(lambda step: self.events.append(f"{name} {step}"), every, **when)


def control_of(run: FakeRun, *evaluations: Evaluation) -> RunControl:
    return RunControl(run, evaluations, {"row": 0}, Interruption(), Timer(), flush=lambda: run.events.append("flush"))


def passes(control: RunControl, steps: int) -> list[str]:
    """What happens while `steps` steps are trained, with a mark for each."""
    while True:
        last = control.step == steps
        control.between_steps(last)
        if last:
            return control.run.events
        control.step += 1
        control.place = {"row": 10 * control.step}
        control.run.events.append("step")


def test_a_checkpoint_is_complete_before_a_risky_evaluation_and_at_the_end():
    run = FakeRun()
    events = passes(control_of(run, run.evaluation("core", 2)), steps=3)
    assert events == [
        *("step", "step", "flush", "save 2 at 20", "flush", "wait", "core 2"),
        *("step", "flush", "save 3 at 30", "flush", "wait", "core 3"),
    ]


def test_an_evaluation_known_to_work_is_not_preceded_by_a_checkpoint():
    run = FakeRun()
    events = passes(control_of(run, run.evaluation("loss", 1, risky=False, at_start=True)), steps=2)
    assert events == [
        *("flush", "wait", "loss 0"),  # at step 0 there is nothing to save
        *("step", "flush", "loss 1"),
        *("step", "flush", "save 2 at 20", "flush", "loss 2"),
    ]


def test_save_every_and_a_resumed_step_is_not_saved_again():
    run = FakeRun(save_every=2, resumed_at=2)
    assert passes(control_of(run), steps=5) == [
        "step",
        "step",
        "flush",
        "save 4 at 40",
        "step",
        "flush",
        "save 5 at 50",
    ]


@pytest.mark.parametrize(("every", "at_end", "expected"), [(-1, False, []), (-1, True, [5]), (2, False, [2, 4, 5])])
def test_when_an_evaluation_is_due(every, at_end, expected):
    evaluation = Evaluation(lambda step: None, every, at_end=at_end)
    assert [step for step in range(6) if evaluation.is_due(step, last=step == 5)] == expected


def test_an_evaluation_that_fails_costs_no_weights():
    def fail(step: int) -> None:
        raise ValueError("no such task")

    run = FakeRun()
    control = control_of(run, Evaluation(fail, 1, risky=False))
    control.evaluated_at[control.evaluations[0]] = 0  # it worked before, so that no checkpoint precedes it
    control.step, control.place = 1, {"row": 10}
    control.save_if_due(last=False, stop=None)
    with pytest.raises(ValueError, match="no such task"):
        control.evaluate_due(last=False)
    assert run.events == ["flush", "flush", "save 1 at 10", "wait"]


def test_there_is_nothing_to_rescue_at_step_0_or_after_a_save():
    run = FakeRun()
    control = control_of(run)
    control.rescue()
    control.step = 1
    control.save_if_due(last=True, stop=None)
    control.rescue()
    assert run.events == ["flush", "save 1 at 0"]


def test_a_stop_saves_and_exits_with_the_signals_number():
    run = FakeRun()
    control = control_of(run)
    control.step = 1
    control.interruption.received = signal.SIGINT
    with pytest.raises(SystemExit) as exit:
        control.between_steps(last=False)
    assert exit.value.code == 130 and run.events == ["flush", "save 1 at 0", "wait"]


class FakeLoader:
    """Yields batches; an exception in their place is raised."""

    def __init__(self, *batches):
        self.batches, self.taken = list(batches), 0

    def __next__(self):
        self.taken += 1
        batch = self.batches.pop(0)
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def state(self) -> dict:
        return {"row": self.taken}


def stop_in_a_library(interruption: Interruption) -> None:
    """A stop signal comes while a library runs that replaces every exception by its own."""
    try:
        interruption._receive(signal.SIGTERM, None)
    except BaseException:
        raise OSError(errno.ENOENT, "not read", "file") from None


def test_a_stop_whose_exception_a_library_replaces_is_still_a_stop():
    run = FakeRun()
    control = control_of(run, Evaluation(lambda step: stop_in_a_library(control.interruption), 1, risky=False))
    control.step = 1
    with pytest.raises(SystemExit) as exit:
        control.evaluate_due(last=False)
    assert exit.value.code == 143 and "save 1 at 0" in run.events

    class Loader(FakeLoader):
        def __next__(self):
            stop_in_a_library(control.interruption)

    run = FakeRun()
    control = control_of(run)
    control.step = 1
    assert next_batch(Loader(), control.interruption, control) is NoBatch.STOP and not run.events


def test_next_batch_says_why_there_is_none_and_keeps_the_place_of_the_last_one():
    run, interruption = FakeRun(), Interruption()
    control, loader = control_of(run), FakeLoader({"inputs": 1}, StopIteration())
    assert next_batch(loader, interruption, control) == {"inputs": 1} and control.place == {"row": 1}
    assert next_batch(loader, interruption, control) is NoBatch.END
    interruption.received = signal.SIGTERM
    assert next_batch(loader, interruption, control) is NoBatch.STOP
    assert control.place == {"row": 1} and not run.events


def test_text_that_cannot_be_read_costs_no_weights():
    run = FakeRun()
    control = control_of(run)
    control.step = 3
    with pytest.raises(OSError, match="gone"):
        next_batch(FakeLoader(OSError("gone")), Interruption(), control)
    assert run.events == ["flush", "save 3 at 0", "wait"]


def test_a_start_plan_survives_the_way_from_process_0_as_json():
    plan = StartPlan("d4", None, finished=False, parent_id="mid d4 step 8 0123", parent_dir="/base/d4", parent_step=8)
    assert plan.parent == (Path("/base/d4"), 8)
    assert StartPlan(**json.loads(json.dumps(asdict(plan)))) == plan
