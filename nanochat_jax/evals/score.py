"""Defines the result of an evaluation: a score, its standard error, and how far the score is above guessing.

Used in training and by scripts.base_eval, scripts.chat_eval and scripts.base_loss. These three commands log the score.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_jax import run_log
from nanochat_jax.checkpoint import TrainedModel


@dataclass(frozen=True)
class Score:
    """The share (0 to 1) of a task's `n` problems that were answered correctly. Guessing would score `baseline`."""

    task: str
    score: float
    n: int
    baseline: float
    seconds: float

    @property
    def stderr(self) -> float:
        """The standard error of the score, assuming that the problems are independent."""
        return math.sqrt(self.score * (1 - self.score) / self.n)

    @property
    def centered(self) -> float:
        """The score rescaled so that 0 means guessing and 1 means perfect."""
        return (self.score - self.baseline) / (1 - self.baseline)


@dataclass(frozen=True)
class Metric:
    """A score other than a share of correct answers: a mean over tasks (CORE, ChatCORE), or bits per byte.

    `n` counts problems or tokens. `stderr` and `baseline` are None where they have no meaning.
    """

    task: str
    score: float
    n: int
    baseline: float | None
    seconds: float
    stderr: float | None


def log_score(model: TrainedModel, suite: str, score: Score | Metric, **details: object) -> None:
    """Appends a score to the log of the run that `model` comes from.

    suite: "core", "chat" or "bpb". details: further fields of the record, such as the split and the settings.
    """
    run_log.append(
        model.run_dir,
        "eval",
        model.stage,
        model.step,
        task=score.task,
        suite=suite,
        score=score.score,
        stderr=score.stderr,
        n=score.n,
        baseline=score.baseline,
        seconds=round(score.seconds, 3),
        **details,
    )


def centered_mean(scores: Sequence[Score]) -> tuple[float, float]:
    """Returns the mean of the centered scores, with equal weight for every task, and the standard error of this mean.

    The standard error covers only the random choice of problems. It does not cover the variation between training runs.
    That variation is larger: about 0.01 in the CORE of a d20 model.
    """
    variance = sum((score.stderr / (1 - score.baseline)) ** 2 for score in scores)
    return sum(score.centered for score in scores) / len(scores), math.sqrt(variance) / len(scores)
