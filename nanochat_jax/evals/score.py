"""Defines the result of an evaluation: a score, its standard error, and the score of random guessing.

Used by training, scripts.base_eval, scripts.chat_eval and scripts.base_loss. The three scripts also log the score. All
scores are printed in the format of `with_error`.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_jax import run_log
from nanochat_jax.trained_model import TrainedModel


@dataclass(frozen=True)
class Score:
    """The result on a task's `n` problems.

    `score` is the share of right answers (0 to 1), and `baseline` is the score of random guessing. `cut` is the number
    of prompts that were cut because they were longer than the context.
    """

    task: str
    score: float
    n: int
    baseline: float
    seconds: float
    cut: int

    def __str__(self) -> str:
        return with_error(self.score, self.stderr, f"n={self.n:,}")

    @property
    def stderr(self) -> float:
        """The standard error of the score, assuming that the problems are independent."""
        return standard_error(self.score * (1 - self.score), self.n)

    @property
    def centered(self) -> float:
        """The score rescaled so that 0 means guessing and 1 means perfect."""
        return (self.score - self.baseline) / (1 - self.baseline)

    @property
    def centered_stderr(self) -> float:
        return self.stderr / (1 - self.baseline)


@dataclass(frozen=True)
class Metric:
    """A score that is not a share of right answers: a mean over tasks (CORE, ChatCORE) or bits per byte.

    For a mean over tasks, `n` counts problems. For bits per byte, `n` counts tokens, and `baseline` is None. `stderr`
    is None if bits per byte were computed from fewer than two rows.
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
    variance = sum(score.centered_stderr**2 for score in scores)
    return sum(score.centered for score in scores) / len(scores), math.sqrt(variance) / len(scores)


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean of independent values, and its standard error (None if there is only one value)."""
    n, mean = len(values), sum(values) / len(values)
    return mean, None if n == 1 else standard_error(statistics.pvariance(values), n)  # pvariance is exact


def standard_error(variance: float, n: int) -> float:
    """Returns the standard error of the mean of `n` independent values, from their mean squared deviation."""
    return math.sqrt(variance / n)


def with_error(score: float, stderr: float | None, of: str = "", digits: int = 4, sign: str = "") -> str:
    """Formats a score with its standard error. `of` says what the score was measured on. The sign "+" marks gains.

    Leaves out an error of 0. It only says that all outcomes were equal, and not that the score is certain.

    Example: with_error(0.45123, 0.0031, "n=1,319") -> "0.4512 ± 0.0031 (n=1,319)".
    """
    error = f" ± {stderr:.{digits}f}" if stderr else ""
    return f"{score:{sign}.{digits}f}{error}" + (f" ({of})" if of else "")


def list_notes(cut: int, prompts: int, at_limit: int = 0, answers: int = 0) -> list[str]:
    """Returns notes on answers that reached the length limit and on cut prompts. Leaves out counts of zero."""
    notes = [f"{at_limit:,} of {answers:,} answers stopped at the limit"] if at_limit else []
    return notes + ([f"{cut:,} of {prompts:,} prompts cut to the context"] if cut else [])
