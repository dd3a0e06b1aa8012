"""Samples rollouts and makes training rows from them. A rollout is a sampled answer with its reward and advantage."""

from dataclasses import dataclass

import numpy as np

from nanochat_jax import config
from nanochat_jax.conversation import problem_prompt
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import Request, Sample
from nanochat_jax.tasks import Task
from nanochat_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rollout:
    """One sampled answer to one problem."""

    prompt: list[int]  # token ids
    sample: Sample  # the answer; its mask is 1 for sampled tokens and 0 for the calculator's output
    reward: float
    advantage: float  # the reward minus the mean reward of all sampled answers to the problem
    other_format: bool = False  # whether the answer is rewarded but counts as wrong, such as $18 instead of 18
    cut: bool = False  # whether the problem was cut, so that the answer fits in the context


def problems_of(step: int, size: int, count: int, seed: int) -> list[int]:
    """Returns the indices of the `count` problems of a step.

    Each epoch has its own random order of all `size` problems. Each step takes the next `count` problems in this order.

    Example: problems_of(step=1, size=4, count=2, seed=0) returns the second half of the first epoch's order.
    """
    positions = range(step * count, (step + 1) * count)
    orders = {e: np.random.default_rng((seed, e)).permutation(size) for e in {p // size for p in positions}}
    return [int(orders[p // size][p % size]) for p in positions]


def sample_rollouts(
    engine: Engine, tokenizer: Tokenizer, task: Task, indices: list[int], cfg: config.Rl, seed: int
) -> list[Rollout]:
    """Samples `cfg.num_samples` answers to each problem in `indices`. Answers to the same problem are adjacent."""
    problems = [task[i] for i in indices]
    seeds = [derive_seed(seed, i) for i in indices]
    prompts, groups = answer(engine, tokenizer, problems, cfg, cfg.num_samples, seeds)
    rollouts = []
    for problem, (prompt, cut), group in zip(problems, prompts, groups, strict=True):
        texts = [tokenizer.decode(sample.content) for sample in group]
        rewards = [task.reward(problem, text) for text in texts]
        mean = sum(rewards) / len(rewards)
        for sample, text, reward in zip(group, texts, rewards, strict=True):
            other_format = reward > 0 and not task.evaluate(problem, text)
            rollouts.append(Rollout(prompt, sample, reward, reward - mean, other_format, cut))
    return rollouts


def answer(
    engine: Engine, tokenizer: Tokenizer, problems: list[dict], cfg: config.Rl, n: int, seeds: list[int]
) -> tuple[list[tuple[list[int], bool]], list[list[Sample]]]:
    """Samples `n` answers to each problem, with one seed per problem.

    Returns two lists with one item per problem. In the first list, an item is (the prompt's token ids, whether the
    prompt was cut). In the second list, an item is the list of answers. A prompt is cut if it leaves too little of the
    context for `cfg.max_new_tokens` tokens.
    """
    limit = engine.model_cfg.sequence_len - cfg.max_new_tokens
    prompts = [problem_prompt(tokenizer, problem, limit) for problem in problems]
    requests = [
        Request(ids=ids, max_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_k=cfg.top_k, n=n, seed=seed)
        for (ids, _), seed in zip(prompts, seeds, strict=True)
    ]
    return prompts, engine.run(requests)


def derive_seed(*parts: int) -> int:
    """Derives a 31-bit seed from several numbers, such as a run's seed and a step number."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0]) & 0x7FFFFFFF


def select_informative(rollouts: list[Rollout], count: int, size: int) -> list[Rollout]:
    """Returns the rollouts of `count` groups to train on. A group has `size` answers.

    Groups with unequal rewards are chosen first, as in DAPO's dynamic sampling (arXiv:2503.14476). A group with equal
    rewards teaches nothing, because its advantages are all 0.
    """
    groups = split_groups(rollouts, size)
    # The sort is stable, so groups with equal keys keep their order.
    groups.sort(key=lambda group: not any(r.advantage for r in group))
    return [rollout for group in groups[:count] for rollout in group]


def split_groups(rollouts: list[Rollout], size: int) -> list[list[Rollout]]:
    """Splits rollouts into groups of `size`, one group per problem: [a, b, c, d] with size 2 -> [[a, b], [c, d]]."""
    return [rollouts[i : i + size] for i in range(0, len(rollouts), size)]


def as_batch(rollouts: list[Rollout], length: int, pad: int) -> dict[str, np.ndarray]:
    """Makes a batch with one row per rollout and `length` tokens per row.

    Inputs and targets are int32. The target is -1 for every token that was not sampled. Weights are float32, and every
    weight in a row is the answer's advantage.

    Example with length 4: prompt [1, 2] and answer [7, 8] give inputs [1, 2, 7, 8] and targets [-1, 7, 8, -1].
    """
    rows = len(rollouts)
    ids = np.full((rows, length + 1), pad, np.int32)
    counted = np.zeros((rows, length + 1), bool)
    for row, rollout in enumerate(rollouts):
        start, end = len(rollout.prompt), len(rollout.prompt) + len(rollout.sample.ids)
        ids[row, :end] = [*rollout.prompt, *rollout.sample.ids]
        counted[row, start:end] = np.asarray(rollout.sample.mask, bool)
    weights = np.array([r.advantage for r in rollouts], np.float32)[:, None] * np.ones((1, length), np.float32)
    return {"inputs": ids[:, :-1], "targets": np.where(counted, ids, -1)[:, 1:], "weights": weights}
