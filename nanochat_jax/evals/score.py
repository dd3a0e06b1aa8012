"""Defines the result of an evaluation: a score, its standard error, and the score of random guessing.

Used by training, scripts.base_eval, scripts.chat_eval and scripts.base_loss. The three scripts also log the score.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_jax import run_log
from nanochat_jax.trained_model import TrainedModel


@dataclass(frozen=True)
class Score:
    """The result on a task's `n` problems.

    `score` is the share of right answers (0 to 1), and `baseline` is the score of random guessing.
    """

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
    """A score that is not a share of right answers: a mean over tasks (CORE, ChatCORE) or bits per byte.

    `n` counts problems, or tokens for bits per byte. For bits per byte, `stderr` and `baseline` are None.
    """

    task: str
    score: float
    n: int
    baseline: float | None
    seconds: float
    stderr: float | None


def log_score(model: TrainedModel, suite: str, score: Score | Metric, **details: object) -> None:
    """Appends a score to the log of the run that `model` comes from.

    `suite` is "core", "chat" or "bpb". `details` are further fields of the record, such as the split and the settings.
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
    """Returns the mean of the tasks' centered scores, and the standard error of this mean.

    The standard error covers only the random choice of problems. The variation between training runs is larger: about
    0.01 in the CORE of a d20 model.
    """
    variance = sum((score.stderr / (1 - score.baseline)) ** 2 for score in scores)
    return sum(score.centered for score in scores) / len(scores), math.sqrt(variance) / len(scores)
