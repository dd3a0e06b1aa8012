"""Rollouts: the answers that a policy samples, their rewards and advantages, and the training rows made of them."""

from dataclasses import dataclass

import numpy as np

from nanochat_jax import config
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import Request, Sample
from nanochat_jax.tasks import Task
from nanochat_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rollout:
    """One sampled answer to one problem."""

    prompt: list[int]  # token ids
    sample: Sample  # the answer: token ids, and a mask that is 1 for sampled and 0 for forced tokens
    reward: float
    advantage: float  # the reward minus the mean reward of the answers to the same problem


def problems_of(step: int, size: int, count: int, seed: int) -> list[int]:
    """The problems of a step: the next `count` indices of a permutation of range(size). Every epoch has its own
    permutation.

    Example: problems_of(1, 4, 2, 0) -> the second half of the first permutation.
    """
    positions = range(step * count, (step + 1) * count)
    orders = {e: np.random.default_rng((seed, e)).permutation(size) for e in {p // size for p in positions}}
    return [int(orders[p // size][p % size]) for p in positions]


def sample_rollouts(
    engine: Engine, tokenizer: Tokenizer, task: Task, indices: list[int], cfg: config.Rl, seed: int
) -> list[Rollout]:
    """Samples `cfg.num_samples` answers to each problem of `indices`. Answers to one problem are adjacent."""
    problems = [task[i] for i in indices]
    seeds = [derive_seed(seed, i) for i in indices]
    prompts, groups = answer(engine, tokenizer, problems, cfg, cfg.num_samples, seeds)
    rollouts = []
    for problem, prompt, group in zip(problems, prompts, groups, strict=True):
        rewards = [task.reward(problem, tokenizer.decode(sample.content)) for sample in group]
        mean = sum(rewards) / len(rewards)
        rollouts += [Rollout(prompt, s, r, r - mean) for s, r in zip(group, rewards, strict=True)]
    return rollouts


def answer(
    engine: Engine, tokenizer: Tokenizer, problems: list[dict], cfg: config.Rl, n: int, seeds: list[int]
) -> tuple[list[list[int]], list[list[Sample]]]:
    """Samples `n` answers to each problem, with one seed per problem.

    Returns (prompts as token ids, a list of answers for each prompt).
    """
    limit = engine.model_cfg.sequence_len - cfg.max_new_tokens
    prompts = [tokenizer.render_for_completion(problem, max_tokens=limit) for problem in problems]
    requests = [
        Request(ids=prompt, max_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_k=cfg.top_k, n=n, seed=seed)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return prompts, engine.run(requests)


def derive_seed(*parts: int) -> int:
    """A 31-bit seed from numbers such as a run's seed and a step."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0]) & 0x7FFFFFFF


def select_informative(rollouts: list[Rollout], count: int, size: int) -> list[Rollout]:
    """Selects `count` groups of `size` answers to train on; groups with unequal rewards come first.

    This is DAPO's dynamic sampling (arXiv:2503.14476). In a group with equal rewards, every advantage is 0.
    """
    groups = split_groups(rollouts, size)
    # The sort is stable, so groups of the same kind stay in the order in which they were sampled.
    groups.sort(key=lambda group: not any(r.advantage for r in group))
    return [rollout for group in groups[:count] for rollout in group]


def split_groups(rollouts: list[Rollout], size: int) -> list[list[Rollout]]:
    """Splits rollouts into groups, one for each problem: [a, b, c, d] with size 2 -> [[a, b], [c, d]]."""
    return [rollouts[i : i + size] for i in range(0, len(rollouts), size)]


def as_batch(rollouts: list[Rollout], length: int, pad: int) -> dict[str, np.ndarray]:
    """Makes training rows [len(rollouts), length]: inputs int32, targets int32 (-1 for prompt, forced tokens and
    padding), and weights float32 (the advantages).

    Example: a prompt [1, 2] with the answer [7, 8] -> inputs [1, 2, 7, pad], targets [-1, 7, 8, -1].
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
