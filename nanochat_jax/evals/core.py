"""CORE (Li et al., 2024, arXiv:2406.11794): 22 in-context learning tasks, scored without generating anything.

The metric is the mean over tasks of (accuracy - baseline) / (1 - baseline), the baseline being the score of guessing.
Three kinds of task:

    multiple_choice     one context, several continuations: the one with the lowest mean loss a token is the answer
    schema              several contexts, one continuation: the context that makes it likeliest is the answer
    language_modeling   every token of the continuation must be the model's first choice

Items are shuffled with Random(1337) and cut to `max_per_task`; the few-shot examples of item i are drawn from the
others with Random(1234 + i). Numbers of the same model from elsewhere differ where these differ.
"""

import functools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.config import GPTConfig
from nanochat_jax.evals.batching import fetch, fixed_rows, num_rows, padded, put
from nanochat_jax.evals.bundle import CoreTask, find_bundle, read_tasks
from nanochat_jax.evals.score import Score, centered_mean
from nanochat_jax.model import gpt
from nanochat_jax.progress import Progress

__all__ = ["CoreResult", "CoreScore", "CoreTask", "evaluate", "evaluate_task", "find_bundle", "prompts", "read_tasks"]

WINDOW = 1024  # items that are tokenized, sorted by length and batched together
LOGITS_AT_ONCE = 1 << 26  # float32 elements, 256 MB


@dataclass(frozen=True)
class CoreScore(Score):
    """Accuracy on one task."""

    truncated: int  # prompts longer than the context, which lost their beginning


@dataclass(frozen=True)
class CoreResult:
    """The scores of all tasks and CORE, their centered mean."""

    tasks: list[CoreScore]

    @property
    def core(self) -> float:
        return centered_mean(self.tasks)[0]

    @property
    def stderr(self) -> float:
        return centered_mean(self.tasks)[1]

    @property
    def n(self) -> int:
        return sum(task.n for task in self.tasks)


def evaluate(
    params: gpt.Params,
    model_cfg: GPTConfig,
    tokenizer,
    bundle: Path,
    *,
    dtype: jnp.dtype = jnp.float32,
    batch_size: int = 32,
    max_per_task: int = -1,
    report: Callable[[CoreScore], object] = lambda score: None,
) -> CoreResult:
    """CORE of a model on the bundle in the folder `bundle` (see `find_bundle`).

    batch_size: prompts a device takes at once. max_per_task: items a task (-1: all). `report` is called with each
    task's score.
    """
    tasks, scores = read_tasks(bundle), []
    for i, task in enumerate(tasks, 1):
        name = f"CORE {i}/{len(tasks)} {task.label}"
        scores.append(evaluate_task(params, model_cfg, tokenizer, task, dtype, batch_size, max_per_task, name))
        report(scores[-1])
    return CoreResult(scores)


def evaluate_task(
    params: gpt.Params, model_cfg: GPTConfig, tokenizer, task: CoreTask, dtype: jnp.dtype = jnp.float32,
    batch_size: int = 32, max_per_task: int = -1, label: str = "",
) -> CoreScore:  # fmt: skip
    """The score of one task."""
    start = time.monotonic()
    items = task.items()
    random.Random(1337).shuffle(items)
    if max_per_task > 0:
        items = items[:max_per_task]
    rows = num_rows(params, batch_size)
    right = truncated = 0
    with Progress(label or task.label, len(items)) as progress:
        judged = None
        for first in range(0, len(items), WINDOW):
            window = range(first, min(first + WINDOW, len(items)))
            spans = _spans(tokenizer, task, items, window, model_cfg.sequence_len)
            truncated += sum(span.truncated for options in spans for span in options)
            scores = _dispatch(params, model_cfg, [s for options in spans for s in options], dtype, rows, tokenizer.bos)
            # Read one window late: the next one is tokenized while the devices compute.
            if judged is not None:
                right += _count_right(task, items, *judged)
                progress.advance(len(judged[0]))
            judged = (window, spans, scores)
        right += _count_right(task, items, *judged)
        progress.advance(len(judged[0]))
    seconds = time.monotonic() - start
    return CoreScore(task.label, right / len(items), len(items), task.baseline, seconds, truncated)


# -----------------------------------------------------------------------------
# Prompts


def prompts(task: CoreTask, items: Sequence[dict], index: int) -> list[str]:
    """The prompts of the item at `index` of the shuffled items: one an option, or [without, with] the continuation."""
    # Never more examples than there are other items; a smaller max_per_task means fewer shots, not an error.
    shots = min(task.num_fewshot, len(items) - 1)
    others = random.Random(1234 + index).sample(range(len(items) - 1), shots)
    examples = "".join(_solved(task, items[i + (i >= index)]) + "\n\n" for i in others)
    item = items[index]
    if task.kind == "multiple_choice":
        return [f"{examples}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        return [f"{examples}{context}{task.delimiter}{item['continuation']}" for context in item["context_options"]]
    # The prompt must not end in a space: it would be a token of its own, the continuation's first one has its own.
    question = f"{examples}{item['context'].strip()}{task.delimiter}"
    return [question.strip(), question + item["continuation"]]


def _solved(task: CoreTask, item: dict) -> str:
    """A few-shot example: an item with its answer."""
    if task.kind == "multiple_choice":
        return f"{item['query']}{task.delimiter}{item['choices'][item['gold']]}"
    if task.kind == "schema":
        return f"{item['context_options'][item['gold']]}{task.delimiter}{item['continuation']}"
    return f"{item['context'].strip()}{task.delimiter}{item['continuation']}"


@dataclass(frozen=True)
class Span:
    """Token ids of a prompt, of which those from `start` to the end are scored; 0 < start < len(ids)."""

    ids: np.ndarray
    start: int
    truncated: bool


def _spans(tokenizer, task: CoreTask, items: Sequence[dict], window: range, limit: int) -> list[list[Span]]:
    """For each item of the window, what is to be scored: one span an option."""
    texts = [prompts(task, items, i) for i in window]
    encoded = iter(tokenizer.encode([text for options in texts for text in options], prepend=tokenizer.bos))
    return [_item_spans([next(encoded) for _ in options], task.kind, limit) for options in texts]


def _item_spans(options: list[list[int]], kind: str, limit: int) -> list[Span]:
    """The spans of one item from the ids of its prompts."""
    shortest = min(map(len, options))
    if kind == "schema":
        # The common end. At least one token and at most all but the first, which nothing predicts.
        length = min(max(1, _common(ids[::-1] for ids in options)), shortest - 1)
        starts = [len(ids) - length for ids in options]
    elif kind == "multiple_choice":
        # From where the options part. If one of them is the beginning of another, nothing would be left of it and its
        # mean a 0/0; then the comparison begins one token earlier, for all of them.
        starts = [min(_common(options), shortest - 1)] * len(options)
    else:
        # The prompt with its continuation, from where the one without it ends (or is told apart from it by the
        # tokenizer, should that happen earlier).
        without, options = options[0], options[1:]
        starts = [min(_common([without, options[0]]), len(options[0]) - 1)]
    return [_fit(np.asarray(ids, np.int32), max(1, start), limit) for ids, start in zip(options, starts, strict=True)]


def _common(sequences) -> int:
    """Number of leading tokens that all sequences share."""
    sequences = list(sequences)
    together = zip(*sequences, strict=False)
    return next((i for i, tokens in enumerate(together) if len(set(tokens)) > 1), min(map(len, sequences)))


def _fit(ids: np.ndarray, start: int, limit: int) -> Span:
    """Cut from the left to the context; <|bos|> stays, since the model has seen no row without it."""
    cut = len(ids) - limit
    if cut <= 0:
        return Span(ids, start, False)
    return Span(np.concatenate([ids[:1], ids[1 + cut :]]), max(1, start - cut), True)


# -----------------------------------------------------------------------------
# Scores


def _dispatch(params, model_cfg, spans: list[Span], dtype, rows: int, bos: int) -> list[tuple]:
    """Sends the spans to the devices in batches of like length: [(positions in spans, mean losses, all right)]."""
    order = sorted(range(len(spans)), key=lambda i: len(spans[i].ids))
    results = []
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        ids = padded([spans[i].ids for i in chosen], rows, model_cfg.sequence_len, fill=bos)
        bounds = fixed_rows([(spans[i].start, len(spans[i].ids)) for i in chosen], rows)
        loss, right = _score(params, model_cfg, put(params, ids), put(params, bounds), dtype)
        results.append((chosen, loss, right))
    return results


def _count_right(task: CoreTask, items: Sequence[dict], window: range, spans: list[list[Span]], scores) -> int:
    """How many items of the window were answered right."""
    count = sum(map(len, spans))
    losses, rights = np.empty(count), np.empty(count, bool)
    for chosen, loss, right in scores:
        losses[chosen], rights[chosen] = fetch(loss)[: len(chosen)], fetch(right)[: len(chosen)]
    if task.kind == "language_modeling":
        return int(rights.sum())
    ends = np.cumsum([len(options) for options in spans])
    answers = [int(np.argmin(option)) for option in np.split(losses, ends[:-1])]
    return sum(answer == items[i]["gold"] for i, answer in zip(window, answers, strict=True))


@functools.partial(jax.jit, static_argnames=("model_cfg", "dtype"))
def _score(params, model_cfg: GPTConfig, ids: jax.Array, bounds: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """Mean loss [b] in nats over positions bounds[:, 0] <= i < bounds[:, 1] of ids [b,t], and whether each of these
    tokens is the argmax (bool [b])."""
    loss, right = token_scores(params, model_cfg, ids, jnp.roll(ids, -1, axis=1), dtype)
    position = jnp.arange(1, ids.shape[1] + 1)[None]  # of the token that is predicted
    scored = (bounds[:, :1] <= position) & (position < bounds[:, 1:])
    mean = jnp.where(scored, loss, 0.0).sum(axis=1) / scored.sum(axis=1)
    return mean, jnp.all(right | ~scored, axis=1)


def token_scores(
    params: gpt.Params, model_cfg: GPTConfig, ids: jax.Array, targets: jax.Array, dtype: jnp.dtype = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Loss in nats (float32 [b,t]) of targets [b,t] after ids [b,t], and whether each is the argmax (bool [b,t]).

    The head runs over slices of t, so that the logits are never there as a whole.
    """
    b, t = ids.shape
    x = gpt.hidden(params, model_cfg, ids, dtype)
    size = min(t, max(1, LOGITS_AT_ONCE // (b * model_cfg.vocab_size)))
    slices = -(-t // size)
    pad = slices * size - t
    x, targets = jnp.pad(x, ((0, 0), (0, pad), (0, 0))), jnp.pad(targets, ((0, 0), (0, pad)))

    def one(i):
        z = gpt.head(params, model_cfg, jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1))
        y = jax.lax.dynamic_slice_in_dim(targets, i * size, size, axis=1)
        loss = jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, y[..., None], axis=-1)[..., 0]
        return loss, jnp.argmax(z, axis=-1) == y

    loss, right = jax.lax.map(one, jnp.arange(slices))  # [slices,b,size]
    return tuple(jnp.moveaxis(a, 0, 1).reshape(b, slices * size)[:, :t] for a in (loss, right))
