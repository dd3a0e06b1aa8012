"""The standard error of a score. It is not printed where it would be 0, because nothing is certain."""

import numpy as np
import pytest

from nanochat_jax.evals.score import Score, list_notes, mean_and_stderr, with_error


@pytest.mark.parametrize("right", [0, 1, 7, 20])
def test_a_score_has_the_standard_error_of_the_mean_of_its_outcomes(right):
    outcomes = [1.0] * right + [0.0] * (20 - right)
    score = Score("t", right / 20, 20, 0.25, 1.0, 0)
    assert (score.score, score.stderr) == pytest.approx(mean_and_stderr(outcomes))
    assert score.stderr == pytest.approx(np.std(outcomes) / 20**0.5)


def test_equal_outcomes_have_an_error_of_0_that_is_not_printed():
    perfect, wrong = Score("t", 1.0, 20, 0.25, 1.0, 0), Score("t", 0.0, 20, 0.25, 1.0, 0)
    assert (str(perfect), str(wrong)) == ("1.0000 (n=20)", "0.0000 (n=20)")
    assert perfect.stderr == wrong.stderr == 0
    assert mean_and_stderr([0.1] * 3)[1] == 0  # although the rounded mean is not 0.1
    assert mean_and_stderr([0.1]) == (0.1, None)


def test_scores_and_notes_are_printed_in_one_format():
    assert with_error(0.45123, 0.0031, "n=1,319") == "0.4512 ± 0.0031 (n=1,319)"
    assert with_error(0.25, 0.01, digits=3, sign="+") == "+0.250 ± 0.010"
    assert list_notes(2, 1000) == ["2 of 1,000 prompts cut to the context"] and list_notes(0, 5) == []
