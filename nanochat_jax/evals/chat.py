"""How well a model answers: multiple choice by comparing logits, everything else by generating and judging text.

ChatCORE is the mean of six tasks' centered scores. It is comparable only with itself: numbers
published in October 2025 are over five tasks, before SpellingBee.
"""

import functools
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import Request, Sample
from nanochat_jax.evals.batching import fetch, fixed_rows, gather, num_rows, padded, put
from nanochat_jax.evals.score import Score, centered_mean
from nanochat_jax.model import gpt
from nanochat_jax.parallel import sharding
from nanochat_jax.progress import Progress
from nanochat_jax.tasks import Task

CHATCORE_TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
WINDOW = 1024  # multiple-choice problems that are tokenized, sorted by length and batched together
MAX_SLOTS = 64  # answers generated at once on a GPU, if its memory holds as many


@dataclass(frozen=True)
class ChatScore(Score):
    """Share of a task's problems answered right, and the answers themselves."""

    truncated: float | None  # share of generated answers that hit the limit of tokens; None for multiple choice
    answers: list[dict] = field(repr=False)  # one a problem, for looking at


def evaluate(
    params: gpt.Params,
    model_cfg: GPTConfig,
    tokenizer,
    task: Task,
    *,
    dtype: jnp.dtype = jnp.float32,
    batch_size: int = 8,
    max_problems: int = -1,
    num_samples: int = 1,
    temperature: float = 0.0,
    top_k: int = 50,
    max_new_tokens: int = 512,
    slots: int = 0,
    seed: int = 42,
) -> ChatScore:
    """The model's score on (the first `max_problems` of) a task. UserError for a task that cannot be judged.

    batch_size: prompts a device takes at once in multiple choice. The others are for generated answers: with
    `num_samples` a problem, one right answer is a pass; slots: answers at once on a device (0: as many as fit).
    """
    if task.eval_type not in ("categorical", "generative"):
        raise UserError(f"{task.name}: a task only for training, its answers cannot be judged")
    start = time.monotonic()
    n = len(task) if max_problems <= 0 else min(max_problems, len(task))
    if task.eval_type == "categorical":
        answers = _choose(params, model_cfg, tokenizer, task, n, dtype, batch_size)
        truncated = None
    else:
        settings = {"max_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "n": num_samples}
        own = range(jax.process_index(), n, jax.process_count())  # problems of this process
        samples = _generate(params, model_cfg, tokenizer, task, own, dtype, slots, seed, settings)
        answers = gather(_judge(tokenizer, task, own, samples))
        truncated = float(np.mean([reason == "length" for a in answers for reason in a["finish_reasons"]]))
    score = sum(answer["right"] for answer in answers) / n
    return ChatScore(task.name, score, n, task.baseline, time.monotonic() - start, truncated, answers)


def chat_core(scores: list[ChatScore]) -> tuple[float, float] | None:
    """ChatCORE and its standard error, None unless all of its tasks are among the scores."""
    by_name = {score.task: score for score in scores}
    if not by_name.keys() >= set(CHATCORE_TASKS):
        return None
    return centered_mean([by_name[name] for name in CHATCORE_TASKS])


# -----------------------------------------------------------------------------
# Multiple choice: the likeliest of the problem's letters right after the prompt


def _choose(params, model_cfg: GPTConfig, tokenizer, task: Task, n: int, dtype, batch_size: int) -> list[dict]:
    """The letter chosen in each problem, and whether it is right."""
    rows, answers = num_rows(params, batch_size), []
    with Progress(task.name, n) as progress:
        for first in range(0, n, WINDOW):
            problems = [task[i] for i in range(first, min(first + WINDOW, n))]
            chosen = _choices(params, model_cfg, tokenizer, problems, dtype, rows)
            for i, (problem, choice) in enumerate(zip(problems, chosen, strict=True), first):
                letter = problem["letters"][choice]
                answers.append({"problem": i, "answer": letter, "right": bool(task.evaluate(problem, letter))})
            progress.advance(len(problems))
    return answers


def _choices(params, model_cfg: GPTConfig, tokenizer, problems: list[dict], dtype, rows: int) -> np.ndarray:
    """Position of the likeliest letter in each problem's list, [problems]."""
    prompts = [np.asarray(tokenizer.render_for_completion(p, max_tokens=model_cfg.sequence_len)) for p in problems]
    letters = [_letter_ids(tokenizer, tuple(p["letters"])) for p in problems]
    width = max(8, *map(len, letters))  # 8: one shape for all usual tasks
    order = sorted(range(len(problems)), key=lambda i: len(prompts[i]))
    results, choices = [], np.zeros(len(problems), int)
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        ids = padded([prompts[i] for i in chosen], rows, model_cfg.sequence_len, fill=tokenizer.bos)
        last = fixed_rows([len(prompts[i]) - 1 for i in chosen], rows)
        listed = fixed_rows([letters[i] + [-1] * (width - len(letters[i])) for i in chosen], rows)
        results.append(
            (chosen, _choose_letter(params, model_cfg, *(put(params, a) for a in (ids, last, listed)), dtype))
        )
    for chosen, result in results:  # read only now, so that the devices never wait for the host
        choices[chosen] = fetch(result)[: len(chosen)]
    return choices


@functools.lru_cache(maxsize=256)
def _letter_ids(tokenizer, letters: tuple[str, ...]) -> list[int]:
    """The token of each letter; of one that takes several, the first."""
    ids = [tokenizer.encode(letter)[0] for letter in letters]
    if len(set(ids)) < len(ids):
        raise UserError(f"the letters {', '.join(letters)} cannot be told apart by their first token")
    return ids


@functools.partial(jax.jit, static_argnames=("model_cfg", "dtype"))
def _choose_letter(
    params, model_cfg: GPTConfig, ids: jax.Array, last: jax.Array, letters: jax.Array, dtype
) -> jax.Array:
    """Which of letters [b,c] (-1: none) has the highest logit after position last [b] of ids [b,t]; int32 [b]."""
    x = gpt.hidden(params, model_cfg, ids, dtype)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    logits = jnp.take_along_axis(gpt.head(params, model_cfg, x), jnp.maximum(letters, 0), axis=1)
    return jnp.argmax(jnp.where(letters < 0, -jnp.inf, logits), axis=1)


# -----------------------------------------------------------------------------
# Generated answers


def _generate(params, model_cfg, tokenizer, task, own: range, dtype, slots, seed, settings) -> list[list[Sample]]:
    """The samples of each problem in `own`, from one engine a device."""
    if mesh := sharding.mesh_of(params):  # whole on every device, wherever training keeps them; all processes do this
        params = jax.device_put(gpt.cast(params, dtype), sharding.replicated(mesh))
    requests = [
        Request(tokenizer.render_for_completion(task[i], max_tokens=model_cfg.sequence_len), seed=seed + i, **settings)
        for i in own
    ]
    if not requests:
        return []
    devices = _devices(params)[: len(requests)]
    slots = slots or _slots_that_fit(model_cfg, dtype)
    wanted = len(requests) * settings["n"]
    with Progress(task.name, wanted) as progress:
        if len(devices) == 1:
            return _run(params, devices[0], model_cfg, tokenizer, requests, slots, dtype, progress)
        # Every device takes each so manieth problem; in threads, as an engine mostly waits for its device.
        share = len(devices)
        with ThreadPoolExecutor(share) as pool:
            parts = [
                pool.submit(_run, params, device, model_cfg, tokenizer, requests[i::share], slots, dtype, progress)
                for i, device in enumerate(devices)
            ]
        results = [part.result() for part in parts]
    return [results[i % share][i // share] for i in range(len(requests))]


def _run(params, device, model_cfg, tokenizer, requests, slots, dtype, progress: Progress) -> list[list[Sample]]:
    """Answers requests on one device."""
    done = 0

    def count(finished: int, _: int) -> None:
        nonlocal done
        progress.advance(finished - done)
        done = finished

    slots = min(slots, sum(request.n for request in requests))
    with jax.default_device(device):
        local = jax.tree.map(lambda x: _on(device, x), params)
        engine = Engine(local, model_cfg, tokenizer, slots=slots, dtype=dtype)
        try:
            return engine.run(requests, progress=count)
        finally:
            engine.close()


def _on(device, x: jax.Array) -> jax.Array:
    """The copy of the array that is on a device."""
    return next(s.data for s in x.addressable_shards if s.device == device)


def _devices(params: gpt.Params) -> list:
    """This process's devices that hold the parameters."""
    local = jax.local_devices()
    there = params["wte"].devices() if isinstance(params["wte"], jax.Array) else set(local[:1])
    return [device for device in local if device in there]


def _slots_that_fit(model_cfg: GPTConfig, dtype) -> int:
    """As many rows of a full context as a third of the free memory holds, a power of two; the rest is for copies."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats:
        return 8
    size = jnp.dtype(dtype).itemsize
    row = 2 * model_cfg.n_layer * model_cfg.n_kv_head * model_cfg.head_dim * model_cfg.sequence_len * size
    free = 0.9 * stats["bytes_limit"] - stats["bytes_in_use"] - size * model_cfg.num_params
    return min(MAX_SLOTS, 2 ** int(math.log2(max(1.0, free / 3 / row))))


def _judge(tokenizer, task: Task, own: range, samples: list[list[Sample]]) -> list[dict]:
    """Texts and verdicts. In threads, since judging a program means waiting for it to end."""

    def one(i: int, group: list[Sample]) -> dict:
        problem = task[i]
        texts = [tokenizer.decode(sample.content) for sample in group]
        right = any(task.evaluate(problem, text) for text in texts)  # stops at the first
        reasons = [s.finish_reason for s in group]
        return {"problem": i, "answers": texts, "finish_reasons": reasons, "right": bool(right)}

    answers = []
    with Progress(f"{task.name}, judging", len(samples)) as progress, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for answer in pool.map(one, own, samples):
            answers.append(answer)
            progress.advance()
    return answers
