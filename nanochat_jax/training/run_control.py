"""Saves, evaluates and stops between two optimizer steps, in every stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import jax

from nanochat_jax import checkpoint
from nanochat_jax.config import UserError, advice_for, first_line
from nanochat_jax.progress import Timer
from nanochat_jax.training.interruption import Interruption, StopRequested
from nanochat_jax.training.run import Run


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that runs at each step that is a multiple of `every`, and after the last step.

    With `at_start`, the evaluation also runs before the first step. If `every` is below 1, the evaluation runs only
    after the last step, and only with `at_end`.

    A `risky` evaluation may fail at any time, because it loads data or generates text. So a checkpoint is saved
    each time before the evaluation begins. Any other evaluation needs a checkpoint only before it runs for the first
    time in a process. After that, it is known to work.
    """

    evaluate: Callable[[int], None]  # called with the step
    every: int
    risky: bool = True
    at_start: bool = False
    at_end: bool = False

    def is_due(self, step: int, last: bool) -> bool:
        if self.every < 1:
            return self.at_end and last
        return last or (step % self.every == 0 and (step > 0 or self.at_start))


class RunControl:
    """Keeps track of a run's current step, and of the steps at which the run was last saved and evaluated.

    Every iteration of a training loop begins with `between_steps`.
    """

    def __init__(
        self, run: Run, evaluations: Sequence[Evaluation], place: dict, interruption: Interruption, timer: Timer,
        flush: Callable[[], None],
    ):  # fmt: skip
        self.run, self.evaluations, self.interruption = run, evaluations, interruption
        self.timer = timer  # measures the time of steps, without saving and evaluating
        self.flush = flush  # logs the pending step, if any; called before saving and evaluating
        self.step = run.step  # the number of optimizer steps taken
        self.place = place  # the position in the data after the last batch that was trained on
        self.saved_at = run.step if run.data is not None else -1
        self.evaluated_at: dict[Evaluation, int] = {}  # the step at which each evaluation last ran in this process

    def between_steps(self, last: bool) -> None:
        """Saves if due, ends the process on a stop signal, and then evaluates if due.

        The checkpoint is saved before the evaluation, so that no weights are lost if the evaluation fails. `last` is
        true after the last step.
        """
        stop = self.interruption.stop_signal
        self.save_if_due(last, stop)
        if stop:
            self.exit(stop)
        self.evaluate_due(last)

    def save_if_due(self, last: bool, stop: int | None) -> None:
        """Saves a checkpoint every --save_every steps, after the last step, and before a stop.

        Also saves before an evaluation that is risky or has not yet run in this process.
        """
        every = self.run.cfg.save_every
        due = self._has_risk(self._due(last)) or (every > 0 and self.step % every == 0)
        if (last or stop or (due and self.step > 0)) and self.saved_at != self.step:
            self._save()

    def evaluate_due(self, last: bool) -> None:
        """Runs the evaluations that are due.

        If one fails, calls `rescue` and raises the error again. If a stop signal ends an evaluation, saves and exits.
        The resumed run then repeats this evaluation.
        """
        due = self._due(last)
        if not due:
            return
        self.flush()
        if self._has_risk(due):  # the checkpoint must be complete in case the process crashes
            self.run.saver.wait_all()
        for evaluation in due:
            try:
                with self.interruption.raise_at_signal():
                    evaluation.evaluate(self.step)
            except (StopRequested, Exception) as error:
                if stop := self.interruption.raised:
                    self.save_if_due(last, stop)
                    self.exit(stop)
                self.rescue()
                if isinstance(error, OSError) and (advice := advice_for(error)):
                    raise UserError(f"an evaluation at step {self.step} failed: {error}: {advice}") from error
                raise
            self.evaluated_at[evaluation] = self.step
        self.timer.lap()

    def exit(self, stop: int) -> NoReturn:
        """Waits until the checkpoint of this step is complete, then ends the process with exit status 128 + `stop`."""
        self.run.saver.wait_all()
        print(f"saved at step {self.step}: run the same command again to resume")
        raise SystemExit(128 + stop)

    def rescue(self) -> None:
        """Saves a checkpoint after an error in reading data or in an evaluation.

        With several processes, does nothing, since the other processes may be blocked in a collective operation.
        """
        if self.step == 0 or self.saved_at == self.step or jax.process_count() > 1:
            return
        try:
            self._save()
            self.run.saver.wait_all()
        except Exception as error:  # for example, the loss is not finite; the caller raises the original error
            if not self._is_complete():
                print(f"not saved: {first_line(error)}")
                return
        print(f"saved at step {self.step}, before the error")

    def _is_complete(self) -> bool:
        """Whether this step's checkpoint is complete, although `_save` has failed.

        If only the log record of a checkpoint cannot be written, the checkpoint itself is still saved.
        """
        try:
            self.run.saver.wait_all()
            return self.step in checkpoint.steps(self.run.dir)
        except UserError:
            return False

    def _due(self, last: bool) -> list[Evaluation]:
        return [e for e in self.evaluations if self.evaluated_at.get(e) != self.step and e.is_due(self.step, last)]

    def _has_risk(self, due: list[Evaluation]) -> bool:
        return any(e.risky or e not in self.evaluated_at for e in due)

    def _save(self) -> None:
        self.flush()
        self.run.save(self.step, self.place)
        self.saved_at = self.step
        self.timer.lap()
