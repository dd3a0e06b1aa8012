"""What an evaluation comes to: the share of right answers, how sure that is, and how much better than guessing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """The share of `n` problems answered right, 0 to 1; `baseline` is what guessing gets."""

    task: str
    score: float
    n: int
    baseline: float
    seconds: float

    @property
    def stderr(self) -> float:
        """Standard error of a share of n independent problems."""
        return math.sqrt(self.score * (1 - self.score) / self.n)

    @property
    def centered(self) -> float:
        """What is left of the score above guessing: 0 is guessing, 1 is perfect."""
        return (self.score - self.baseline) / (1 - self.baseline)


def centered_mean(scores: Sequence[Score]) -> tuple[float, float]:
    """Mean of the centered scores, each task counting alike, and its standard error.

    The error is that of sampling problems alone; two training runs differ by more (in CORE about 0.01 for a d20).
    """
    variance = sum((score.stderr / (1 - score.baseline)) ** 2 for score in scores)
    return sum(score.centered for score in scores) / len(scores), math.sqrt(variance) / len(scores)
