"""How rollouts become rows: what is trained on, with which weights, and in which order problems come."""

import dataclasses
import itertools
import math
import types

import numpy as np
import pytest

from nanochat_jax import checkpoint
from nanochat_jax.config import Rl, UserError
from nanochat_jax.engine.request import Sample
from nanochat_jax.training import rl, rollouts
from nanochat_jax.training.step import StepMetrics

PAD = 99


def rollout(prompt, ids, mask, reward, advantage):
    sample = Sample(ids=ids, mask=mask, logprobs=[0.0] * len(ids), finish_reason="stop")
    return rollouts.Rollout(prompt, sample, reward, advantage)


def test_prompt_forced_tokens_and_padding_are_not_trained_on_and_the_end_is():
    group = [rollout([1, 2, 3], [10, 11, 12, 13], [1, 0, 0, 1], 1.0, 0.5), rollout([1], [20, 21], [1, 1], 0.0, -0.5)]
    batch = rollouts.as_batch(group, 8, PAD)
    np.testing.assert_array_equal(batch["inputs"][0], [1, 2, 3, 10, 11, 12, 13, PAD])
    np.testing.assert_array_equal(batch["targets"][0], [-1, -1, 10, -1, -1, 13, -1, -1])  # 13 ends the answer
    np.testing.assert_array_equal(batch["targets"][1], [20, 21, -1, -1, -1, -1, -1, -1])
    np.testing.assert_array_equal(batch["weights"][:, 0], [0.5, -0.5])


def test_advantages_are_rewards_minus_the_mean_of_the_group():
    class Task:
        def __getitem__(self, i):
            return i

        def reward(self, problem, text):
            return float(text.startswith(str(problem)))

        def evaluate(self, problem, text):
            return text.startswith("7")

    class Tokenizer:
        def render_for_completion(self, problem, max_tokens):
            return [problem] * min(max_tokens, 100 if problem == 3 else 1)

        def decode(self, ids):
            return " ".join(map(str, ids))

    class Engine:
        model_cfg = type("ModelConfig", (), {"sequence_len": 64})

        def run(self, requests):
            assert all(r.n == 4 and r.temperature == 1.0 for r in requests)
            assert len({r.seed for r in requests}) == len(requests)
            answers = [[Sample([first, 0], [1, 1], [0.0, 0.0], "stop") for first in (7, 7, 7, 5)] for _ in requests]
            return answers

    cfg = Rl(num_samples=4, max_new_tokens=8)
    group = rollouts.sample_rollouts(Engine(), Tokenizer(), Task(), [7, 5, 3], cfg, seed=0)
    assert [r.reward for r in group] == [1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert [r.advantage for r in group] == [0.25] * 3 + [-0.75] + [-0.25] * 3 + [0.75] + [0.0] * 4
    assert [r.other_format for r in group] == [False] * 7 + [True] + [False] * 4  # rewarded, but not right
    assert [r.cut for r in group] == [False] * 8 + [True] * 4 and len(group[-1].prompt) == 64 - 8


def group(first, *rewards):
    mean = sum(rewards) / len(rewards)
    return [rollout([first], [i], [1], r, r - mean) for i, r in enumerate(rewards)]


def test_what_can_teach_something_is_trained_on_first_and_filled_up_with_the_rest():
    sampled = group(1, 1, 1) + group(2, 0, 1) + group(3, 0, 0) + group(4, 1, 0)
    for count, expected in (1, [2]), (2, [2, 4]), (3, [2, 4, 1]):
        chosen = rollouts.select_informative(sampled, count, size=2)
        assert [r.prompt[0] for r in chosen] == [e for e in expected for _ in range(2)]


@pytest.mark.parametrize(("size", "count"), [(10, 4), (3, 8), (5, 5)])
def test_every_epoch_visits_every_problem_once_even_where_steps_do_not_divide(size, count):
    walk = [i for step in range(2 * size) for i in rollouts.problems_of(step, size, count, seed=1)]
    for epoch in range(len(walk) // size):
        assert sorted(walk[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert walk != [i for step in range(2 * size) for i in rollouts.problems_of(step, size, count, seed=2)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"device_batch_size": 3}, "--device_batch_size=3 does not divide the 4 answers per replica .* try 1"),
     ({"device_batch_size": 6}, "--device_batch_size=6 does not divide the 4 .*--num_samples=4 / 2 replicas.*: try 2"),
     ({"num_samples": 3, "examples_per_step": 1}, "answers do not divide over 2 .*: try --examples_per_step=2")],
)  # fmt: skip
def test_answers_that_cannot_be_split_name_the_flags_of_this_stage(changes, words):
    cfg = Rl(**{"examples_per_step": 2, "num_samples": 4, "device_batch_size": 4} | changes)
    with pytest.raises(UserError, match=words) as caught:
        rl.shape_for_answers(cfg, 2, 2, 64)
    assert "total_batch_size" not in str(caught.value)


def test_the_smallest_number_of_problems_is_the_one_that_the_error_proposes():
    for answers, samples in itertools.product(range(1, 25), range(1, 25)):
        smallest = next(n for n in itertools.count(1) if n * samples % answers == 0)
        assert rl.examples_unit(Rl(num_samples=max(2, samples)), answers) == smallest or samples == 1


@pytest.mark.parametrize("changes", [{"examples_per_step": 0}, {"num_samples": 1}, {"oversampling": 0}, {"top_k": -1},
                                     {"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": math.nan},
                                     {"eval_examples": 0}, {"eval_samples": 0},
                                     {"device_batch_size": 0}])  # fmt: skip
def test_numbers_that_no_run_can_have_are_refused_by_their_flag(changes):
    (name,) = changes
    with pytest.raises(UserError, match=f"--{name}=.*: must be at least"):
        Rl(**changes)


def test_answers_are_split_into_micro_batches():
    shape = rl.shape_for_answers(Rl(examples_per_step=4, num_samples=4, device_batch_size=2), 4, 2, 64)
    assert (shape.grad_accum_steps, shape.rows, shape.replicas, shape.padding) == (4, 2, 2, 0)


def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_with_a_right_one():
    for n in range(1, 7):
        for right in range(n + 1):
            answers = [True] * right + [False] * (n - right)
            for k in range(1, n + 1):
                drawn = [any(chosen) for chosen in itertools.combinations(answers, k)]
                assert rl.pass_at_k(n, right, k) == pytest.approx(np.mean(drawn))


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (1.0, math.inf)])
def test_a_step_that_is_not_finite_is_named_with_the_last_good_checkpoint(tmp_path, loss, grad_norm):
    run = types.SimpleNamespace(
        dir=tmp_path, model_cfg=types.SimpleNamespace(sequence_len=64, vocab_size=9), state=None,
        layout=types.SimpleNamespace(mesh=None), put_scalar=lambda x: x,
        tokenizer=types.SimpleNamespace(special=lambda name: 8),
    )  # fmt: skip
    shape = types.SimpleNamespace(shaped=lambda *args: {})
    results = types.SimpleNamespace(loss=loss, grad_norm=grad_norm)
    step = [lambda *args: (None, results), 7, [rollout([1, 2], [3, 8], [1, 1], 1.0, 0.5)], shape, 1.0]
    words = f"the loss is {loss} and the gradient norm {grad_norm} at step 7: lower the learning rates; "
    with pytest.raises(UserError, match=f"{words}there is no earlier checkpoint in "):
        rl.update(run, *step)
    (tmp_path / "step_000004").mkdir()
    (tmp_path / "step_000004" / checkpoint.MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=f"{words}the last good checkpoint is step 4 in {tmp_path}"):
        rl.update(run, *step)


def test_the_log_says_how_sure_the_reward_is_and_what_was_done_for_it(capsys):
    """The answers to one problem are no independent measurements: n counts problems."""
    logged = {}
    fake = types.SimpleNamespace(step=0, totals={"seconds": 0.0}, log=lambda kind, step, **f: logged.update(f))
    log = rl.RolloutLog(fake, Rl(num_samples=4), 10)
    rewards = [(1, 1, 1, 0), (0, 0, 0, 0), (1, 0, 0, 0)]
    sampled = [r for i, group_rewards in enumerate(rewards) for r in group(i, *group_rewards)]
    sampled[1] = dataclasses.replace(sampled[1], other_format=True)
    sampled[4:8] = [dataclasses.replace(r, cut=True) for r in sampled[4:8]]
    sampled[0] = dataclasses.replace(sampled[0], sample=dataclasses.replace(sampled[0].sample, finish_reason="length"))
    log.push(1, sampled, StepMetrics(np.float32(0), np.float32(1), np.int32(1)), 0.5, 1.0)
    stderr = np.std([0.75, 0, 0.25]) / 3**0.5
    assert logged["reward"] == pytest.approx(1 / 3) and logged["stderr"] == pytest.approx(stderr) and logged["n"] == 3
    assert (logged["rewarded"], logged["other_format"], logged["cut"], logged["truncated"]) == (4, 1, 1, 1 / 12)
    out = capsys.readouterr().out
    assert f"reward 0.333 ± {stderr:.3f} (n=3 problems), 4 of 12 answers right (1 of them in another format) |" in out
    assert "| 1 of 12 answers stopped at the limit | 1 of 3 prompts cut to the context |" in out
