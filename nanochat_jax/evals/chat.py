"""Evaluates a model on chat tasks.

Used by scripts.chat_eval, and by training every --eval_metrics_every steps.

In multiple-choice tasks, the logits of the answer letters are compared. In other tasks, answers are generated and
checked. ChatCORE is the mean of the centered scores of six tasks (0 means guessing, 1 means perfect). The ChatCORE
numbers that nanochat published in October 2025 are not comparable, because they are means over only five tasks:
SpellingBee was not among them.
"""

import functools
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.conversation import problem_prompt
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import Request, Sample
from nanochat_jax.evals.batching import fetch, fixed_rows, gather, num_rows, padded, put
from nanochat_jax.evals.model import NOT_FINITE, EvalModel
from nanochat_jax.evals.score import Score, centered_mean, list_notes
from nanochat_jax.model import gpt
from nanochat_jax.parallel import sharding
from nanochat_jax.progress import Progress
from nanochat_jax.tasks import Task
from nanochat_jax.tokenizer import Tokenizer

CHATCORE_TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
WINDOW = 1024  # multiple-choice problems are tokenized and sorted by length in groups of this size
MAX_SLOTS = 64  # at most this many answers are generated at once on each GPU


@dataclass(frozen=True)
class Sampling:
    """Settings for generating answers. The seed of problem i is `seed` + i."""

    temperature: float = 0.0
    top_k: int = 50
    max_new_tokens: int = 512
    num_samples: int = 1  # answers per problem; a problem counts as solved if any of its answers is right (pass@k)
    seed: int = 42


GREEDY = Sampling()


@dataclass(frozen=True)
class ChatScore(Score):
    """The score of a task, and the answers that were scored."""

    truncated: float | None  # the share of answers cut off by a length limit; None for multiple choice
    answers: list[dict] = field(repr=False)  # one dict per problem, for inspection

    @property
    def ties(self) -> int:
        """The number of multiple-choice problems in which the most likely letter was tied with a later letter."""
        return sum(answer.get("tied", False) for answer in self.answers)

    @property
    def notes(self) -> list[str]:
        """Notes on what may have lowered the score: cut prompts, answers that reached the length limit, and ties."""
        reasons = [reason for answer in self.answers for reason in answer.get("finish_reasons", [])]
        return list_notes(self.cut, self.n, reasons.count("length"), len(reasons)) + (
            [f"{self.ties:,} ties between letters went to the first"] if self.ties else []
        )


def evaluate(
    model: EvalModel,
    task: Task,
    sampling: Sampling = GREEDY,
    *,
    batch_size: int = 8,
    max_problems: int = -1,
    slots: int = 0,
) -> ChatScore:
    """Returns the model's score on the first `max_problems` problems of a task (-1: all problems).

    `batch_size` is the number of multiple-choice prompts per batch on each device. `slots` is the number of answers
    that each device generates at once (0: as many as fit in memory). Raises UserError if the task is only for training.
    """
    if task.eval_type not in ("categorical", "generative"):
        raise UserError(f"{task.name}: for training only, its answers cannot be evaluated")
    start = time.monotonic()
    n = len(task) if max_problems <= 0 else min(max_problems, len(task))
    if task.eval_type == "categorical":
        answers = _choose(model, task, n, batch_size)
        truncated = None
    else:
        local = range(jax.process_index(), n, jax.process_count())  # the problems of this process
        samples, cut = _generate(model, task, local, sampling, slots)
        answers = gather(_check_answers(model.tokenizer, task, local, samples, cut))
        truncated = float(np.mean([reason == "length" for a in answers for reason in a["finish_reasons"]]))
    right, cut = (sum(answer[key] for answer in answers) for key in ("right", "cut"))
    return ChatScore(task.name, right / n, n, task.baseline, time.monotonic() - start, cut, truncated, answers)


def chat_core(scores: list[ChatScore]) -> tuple[float, float] | None:
    """Returns ChatCORE and its standard error, or None if one of the six tasks is missing from `scores`."""
    by_name = {score.task: score for score in scores}
    if not by_name.keys() >= set(CHATCORE_TASKS):
        return None
    return centered_mean([by_name[name] for name in CHATCORE_TASKS])


# -----------------------------------------------------------------------------
# Multiple choice: the model's answer is the letter most likely to come next


def _choose(model: EvalModel, task: Task, n: int, batch_size: int) -> list[dict]:
    """Chooses a letter for each of the first `n` problems. Returns one dict per problem.

    The dict says which letter was chosen, whether it is right, and whether the prompt was cut to fit in the context.
    """
    rows, answers = num_rows(model.params, model.model_cfg, batch_size), []
    with Progress(task.name, n) as progress:
        for first in range(0, n, WINDOW):
            problems = [task[i] for i in range(first, min(first + WINDOW, n))]
            prompts = [problem_prompt(model.tokenizer, p, model.model_cfg.sequence_len) for p in problems]
            chosen = _choices(model, problems, [ids for ids, _ in prompts], rows)
            for i, (problem, (_, cut), (choice, tied)) in enumerate(zip(problems, prompts, chosen, strict=True), first):
                if choice < 0:
                    raise UserError(f"{task.name}: {NOT_FINITE}")
                letter = problem["letters"][choice]
                right = bool(task.evaluate(problem, letter))
                answers.append({"problem": i, "answer": letter, "right": right, "cut": cut, "tied": bool(tied)})
            progress.advance(len(problems))
    return answers


def _choices(model: EvalModel, problems: list[dict], prompts: list[list[int]], rows: int) -> np.ndarray:
    """Returns the results of `_choose_letter` for each problem, as int [problems, 2]."""
    tokenizer, context = model.tokenizer, model.model_cfg.sequence_len
    letters = [_letter_ids(tokenizer, tuple(p["letters"])) for p in problems]
    width = max(8, *map(len, letters))  # all tasks with up to 8 letters use the same compiled program
    order = sorted(range(len(problems)), key=lambda i: len(prompts[i]))
    results, choices = [], np.zeros((len(problems), 2), int)
    for first in range(0, len(order), rows):
        batch = order[first : first + rows]
        ids = padded([np.asarray(prompts[i]) for i in batch], rows, context, fill=tokenizer.bos)
        last = fixed_rows([len(prompts[i]) - 1 for i in batch], rows)
        options = fixed_rows([letters[i] + [-1] * (width - len(letters[i])) for i in batch], rows)
        arrays = (put(model.params, array) for array in (ids, last, options))
        results.append((batch, _choose_letter(model.params, model.model_cfg, *arrays, model.dtype)))
    for batch, result in results:  # runs after all batches are dispatched, so that the devices never wait for the host
        choices[batch] = fetch(result)[: len(batch)]
    return choices


@functools.lru_cache(maxsize=256)
def _letter_ids(tokenizer: Tokenizer, letters: tuple[str, ...]) -> list[int]:
    """Returns the first token of each letter. Raises UserError if two letters have the same first token."""
    ids = [tokenizer.encode(letter)[0] for letter in letters]
    if len(set(ids)) < len(ids):
        raise UserError(f"the letters {', '.join(letters)} cannot be told apart by their first token")
    return ids


@functools.partial(jax.jit, static_argnames=("model_cfg", "dtype"))
def _choose_letter(
    params: gpt.Params, model_cfg: GPTConfig, ids: jax.Array, last: jax.Array, letters: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """In each row of `ids` [b,t], chooses the letter that is most likely to follow position `last` [b].

    `letters` [b,c] holds each problem's letter tokens, padded with -1.

    Returns int [b,2]. The first number is the index of the letter, or -1 if a logit is NaN. The second is 1 if another
    letter is equally likely, else 0. Of equally likely letters, the first is chosen.
    """
    x = gpt.hidden(params, model_cfg, ids, dtype)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    logits = jnp.take_along_axis(gpt.head(params, model_cfg, x), jnp.maximum(letters, 0), axis=1)
    logits = jnp.where(letters < 0, -jnp.inf, logits)
    choice = jnp.where(jnp.isnan(logits).any(axis=1), -1, jnp.argmax(logits, axis=1))
    tied = (logits == logits.max(axis=1, keepdims=True)).sum(axis=1) > 1
    return jnp.stack([choice, tied], axis=1)


# -----------------------------------------------------------------------------
# Generated answers


def _generate(
    model: EvalModel, task: Task, problems: Sequence[int], sampling: Sampling, slots: int
) -> tuple[list[list[Sample]], list[bool]]:
    """Generates the samples of each problem, with one engine on all devices of this process.

    Returns (the samples of each problem, whether each problem's prompt was cut to fit in the context).
    """
    # Every process must take part in this, even if it has no problems. So no process may return before.
    params = sharding.on_local_devices(gpt.cast(model.params, model.dtype))
    prompts = [problem_prompt(model.tokenizer, task[i], model.model_cfg.sequence_len) for i in problems]
    requests = [
        Request(
            ids,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            n=sampling.num_samples,
            seed=sampling.seed + i,
        )
        for i, (ids, _) in zip(problems, prompts, strict=True)
    ]
    cut = [was_cut for _, was_cut in prompts]
    if not requests:
        return [], cut
    mesh = sharding.mesh_of(params)
    devices = 1 if mesh is None else mesh.size
    answers = len(requests) * sampling.num_samples
    slots = min(slots or _slots_that_fit(model), math.ceil(answers / devices)) * devices
    with Progress(task.name, answers) as progress:
        engine = Engine(params, model.model_cfg, model.tokenizer, slots=slots, dtype=model.dtype)
        try:
            return engine.run(requests, progress=lambda done, _: progress.reach(done)), cut
        finally:
            engine.close()


def _slots_that_fit(model: EvalModel) -> int:
    """Returns how many cache rows of full context length fit in a third of the free memory.

    The number is rounded down to a power of two, and is at most MAX_SLOTS. The other two thirds are left for copies of
    rows. If the free memory is unknown, the number is 8.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats:
        return 8
    model_cfg, size = model.model_cfg, jnp.dtype(model.dtype).itemsize
    row = 2 * model_cfg.n_layer * model_cfg.n_kv_head * model_cfg.head_dim * model_cfg.sequence_len * size
    free = 0.9 * stats["bytes_limit"] - stats["bytes_in_use"] - size * model_cfg.num_params
    return min(MAX_SLOTS, 2 ** int(math.log2(max(1.0, free / 3 / row))))


def _check_answers(
    tokenizer: Tokenizer, task: Task, problems: Sequence[int], samples: list[list[Sample]], cut: list[bool]
) -> list[dict]:
    """Checks the answers to each problem. Returns one dict per problem.

    The dict holds the answers as text, and says whether any of them is right and whether the prompt was cut.

    The checks run in threads, because the check of a generated program mostly waits for the program to end.
    """

    def check(i: int, group: list[Sample], was_cut: bool) -> dict:
        problem = task[i]
        texts = [tokenizer.decode(sample.content) for sample in group]
        right = any(task.evaluate(problem, text) for text in texts)  # stops at the first right answer
        reasons = [s.finish_reason for s in group]
        if any(math.isnan(logprob) for sample in group for logprob in sample.logprobs):
            raise UserError(f"{task.name}: {NOT_FINITE}")
        return {"problem": i, "answers": texts, "finish_reasons": reasons, "right": bool(right), "cut": was_cut}

    answers = []
    with Progress(f"{task.name}, checking", len(samples)) as progress, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for answer in pool.map(check, problems, samples, cut):
            answers.append(answer)
            progress.advance()
    return answers
