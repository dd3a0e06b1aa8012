"""CORE (Li et al., 2024, arXiv:2406.11794): 22 in-context learning tasks, scored without generating text.

Used by scripts.base_eval, and by training every --core_metric_every steps.

CORE is the mean of (accuracy - baseline) / (1 - baseline) over the tasks. The baseline is the accuracy of random
guessing. There are three kinds of task:

    multiple_choice     one context, several continuations: the answer is the continuation with the lowest mean loss
    schema              several contexts, one continuation: the answer is the context that gives the lowest mean loss
    language_modeling   the answer is right if greedy decoding would produce exactly the continuation

The items of a task are shuffled with Random(1337), and only the first `max_per_task` items are used. The few-shot
examples of item i are drawn from the other items with Random(1234 + i). With other seeds, the same model would get
another score.
"""

import functools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.engine.slots import common_prefix_length
from nanochat_jax.evals.batching import fetch, fixed_rows, num_rows, padded, put
from nanochat_jax.evals.bundle import CoreTask, find_bundle, read_tasks
from nanochat_jax.evals.model import NOT_FINITE, EvalModel
from nanochat_jax.evals.score import Score, centered_mean, list_notes, with_error
from nanochat_jax.model import gpt
from nanochat_jax.parallel import sharding
from nanochat_jax.progress import Progress
from nanochat_jax.tokenizer import Tokenizer

__all__ = ["CoreResult", "CoreScore", "CoreTask", "evaluate", "evaluate_task", "find_bundle", "prompts", "read_tasks"]

WINDOW = 1024  # items are tokenized, sorted by length and batched in groups of this size
LOGITS_AT_ONCE = 1 << 26  # at most this many logits are in a device's memory at once: 256 MiB in float32


@dataclass(frozen=True)
class CoreScore(Score):
    """Accuracy on one task. `cut` counts prompts, not items: an item has one prompt for each option."""

    prompts: int  # the number of prompts that were scored
    shots: int  # the number of few-shot examples in each prompt
    num_fewshot: int  # how many examples the task asks for; fewer are used if there are too few other items


@dataclass(frozen=True)
class CoreResult:
    """The scores of all tasks. CORE is the mean of their centered scores."""

    tasks: list[CoreScore]
    seconds: float

    @property
    def core(self) -> float:
        return centered_mean(self.tasks)[0]

    @property
    def stderr(self) -> float:
        return centered_mean(self.tasks)[1]

    @property
    def n(self) -> int:
        """The number of items in all tasks together."""
        return sum(task.n for task in self.tasks)

    @property
    def cut(self) -> int:
        """The number of prompts that were cut to fit in the context, in all tasks together."""
        return sum(task.cut for task in self.tasks)

    def __str__(self) -> str:
        score = with_error(self.core, self.stderr, f"n={self.n:,}")
        notes = list_notes(self.cut, sum(task.prompts for task in self.tasks))
        return ", ".join([f"CORE {score}", f"{len(self.tasks)} tasks", *notes])


def evaluate(
    model: EvalModel,
    bundle: Path,
    *,
    batch_size: int = 32,
    max_per_task: int = -1,
    report: Callable[[CoreScore], object] = lambda score: None,
) -> CoreResult:
    """Returns a model's scores on all tasks of the CORE bundle in the folder `bundle`.

    `batch_size` is the number of prompts per batch on each device. At most `max_per_task` items of each task are used
    (-1: all). After each task, `report` is called with the task's score.
    """
    start = time.monotonic()
    tasks, scores = read_tasks(bundle), []
    for i, task in enumerate(tasks, 1):
        label = f"CORE {i}/{len(tasks)} {task.label}"
        scores.append(evaluate_task(model, task, batch_size=batch_size, max_per_task=max_per_task, label=label))
        report(scores[-1])
    return CoreResult(scores, time.monotonic() - start)


def evaluate_task(
    model: EvalModel, task: CoreTask, *, batch_size: int = 32, max_per_task: int = -1, label: str = ""
) -> CoreScore:
    """Returns the score of one task. `label` names the progress bar (default: the task's label)."""
    start = time.monotonic()
    items = task.items()
    random.Random(1337).shuffle(items)
    if max_per_task > 0:
        items = items[:max_per_task]
    rows = num_rows(model.params, model.model_cfg, batch_size)
    right = cut = count = 0
    with Progress(label or task.label, len(items)) as progress:
        pending: list[_Window] = []
        for first in range(0, len(items), WINDOW):
            indices = range(first, min(first + WINDOW, len(items)))
            spans = _spans(model.tokenizer, task, items, indices, model.model_cfg.sequence_len)
            count += sum(map(len, spans))
            cut += sum(span.cut for options in spans for span in options)
            pending.append(_Window(indices, spans, _dispatch(model, [s for options in spans for s in options], rows)))
            # The results of a window are read only after the next window is dispatched. So the devices score one window
            # while the host tokenizes the next.
            if len(pending) > 1:
                right += _count_right(task, items, pending.pop(0), progress)
        right += _count_right(task, items, pending.pop(0), progress)
    n, seconds = len(items), time.monotonic() - start
    return CoreScore(task.label, right / n, n, task.baseline, seconds, cut, count, num_shots(task, n), task.num_fewshot)


# -----------------------------------------------------------------------------
# Prompts


def prompts(task: CoreTask, items: Sequence[dict], index: int) -> list[str]:
    """Returns the prompts of `items[index]`, one for each option. The caller must shuffle `items` first.

    A language-modeling item has two prompts: the context alone, and the context with the continuation.
    """
    others = random.Random(1234 + index).sample(range(len(items) - 1), num_shots(task, len(items)))
    examples = "".join(_solved(task, items[i + (i >= index)]) + "\n\n" for i in others)
    item = items[index]
    if task.kind == "multiple_choice":
        return [f"{examples}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        return [f"{examples}{context}{task.delimiter}{item['continuation']}" for context in item["context_options"]]
    # The first prompt must not end in a space, since the space belongs to the first token of the continuation.
    question = f"{examples}{item['context'].strip()}{task.delimiter}"
    return [question.strip(), question + item["continuation"]]


def num_shots(task: CoreTask, n: int) -> int:
    """Returns the number of few-shot examples in each prompt, if `n` items are used.

    If max_per_task is small, there may be fewer than num_fewshot other items. Then all of them are used as examples.
    """
    return min(task.num_fewshot, n - 1)


def _solved(task: CoreTask, item: dict) -> str:
    """Returns an item together with its answer, for use as a few-shot example."""
    if task.kind == "multiple_choice":
        return f"{item['query']}{task.delimiter}{item['choices'][item['gold']]}"
    if task.kind == "schema":
        return f"{item['context_options'][item['gold']]}{task.delimiter}{item['continuation']}"
    return f"{item['context'].strip()}{task.delimiter}{item['continuation']}"


@dataclass(frozen=True)
class Span:
    """The token ids of a prompt. The tokens from `start` to the end are scored, where 0 < start < len(ids)."""

    ids: np.ndarray
    start: int
    cut: bool  # whether tokens were removed to fit the prompt in the context


def _spans(tokenizer: Tokenizer, task: CoreTask, items: Sequence[dict], indices: range, limit: int) -> list[list[Span]]:
    """Returns the spans to score: for each item in `indices`, a list with one span for each option."""
    texts = [prompts(task, items, i) for i in indices]
    encoded = iter(tokenizer.encode([text for options in texts for text in options], prepend=tokenizer.bos))
    return [_item_spans([next(encoded) for _ in options], task.kind, limit) for options in texts]


def _item_spans(options: list[list[int]], kind: str, limit: int) -> list[Span]:
    """Returns the spans of one item, given the ids of its prompts."""
    shortest = min(map(len, options))
    if kind == "schema":
        # Score the longest common suffix of all options, but at least one token. The first token of a prompt is never
        # scored, because nothing predicts it.
        length = min(max(1, _common_prefix([ids[::-1] for ids in options])), shortest - 1)
        starts = [len(ids) - length for ids in options]
    elif kind == "multiple_choice":
        # Score each option from the first token at which the options differ. The shortest option may be a prefix of all
        # others. Then scoring starts at the shortest option's last token, because the mean loss of zero tokens would be
        # 0/0.
        starts = [min(_common_prefix(options), shortest - 1)] * len(options)
    else:
        # Score the continuation, from the first token at which the two prompts differ. The tokenizer may have
        # merged the end of the context into this token.
        without, options = options[0], options[1:]
        starts = [min(_common_prefix([without, options[0]]), len(options[0]) - 1)]
    return [_fit(np.asarray(ids, np.int32), max(1, start), limit) for ids, start in zip(options, starts, strict=True)]


def _common_prefix(options: list[list[int]]) -> int:
    """Returns the length of the longest common prefix of the options. Example: [1, 2, 3], [1, 2, 4] -> 2."""
    return min(common_prefix_length(options[0], ids) for ids in options)


def _fit(ids: np.ndarray, start: int, limit: int) -> Span:
    """Shortens a prompt to at most `limit` tokens by removing the tokens right after <|bos|>.

    The token <|bos|> itself stays, because every training document begins with it.
    """
    excess = len(ids) - limit
    if excess <= 0:
        return Span(ids, start, False)
    return Span(np.concatenate([ids[:1], ids[1 + excess :]]), max(1, start - excess), True)


# -----------------------------------------------------------------------------
# Scores


class _Batch(NamedTuple):
    """The scores of a batch, as arrays on the devices."""

    positions: list[int]  # each row's index in the list of spans
    loss: jax.Array  # float32 [b]: the mean loss of each row's scored tokens, in nats
    right: jax.Array  # bool [b]: whether every scored token of the row is the most likely token


class _Window(NamedTuple):
    """A group of items with their spans and scores."""

    indices: range
    spans: list[list[Span]]  # for each item, one span for each option
    batches: list[_Batch]


def _dispatch(model: EvalModel, spans: list[Span], rows: int) -> list[_Batch]:
    """Starts scoring the spans on the devices, in batches of spans of similar length."""
    order = sorted(range(len(spans)), key=lambda i: len(spans[i].ids))
    batches, mesh = [], sharding.mesh_of(model.params)
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        ids = padded([spans[i].ids for i in chosen], rows, model.model_cfg.sequence_len, fill=model.tokenizer.bos)
        bounds = fixed_rows([(spans[i].start, len(spans[i].ids)) for i in chosen], rows)
        arrays = put(model.params, ids), put(model.params, bounds)
        batches.append(_Batch(chosen, *_score(model.params, model.model_cfg, *arrays, model.dtype, mesh)))
    return batches


def _count_right(task: CoreTask, items: Sequence[dict], window: _Window, progress: Progress) -> int:
    """Waits for the scores of the window, and returns the number of right answers.

    Raises UserError if a loss is infinite or NaN. `argmin` would take a NaN for the lowest loss.
    """
    count = sum(map(len, window.spans))
    losses, rights = np.empty(count), np.empty(count, bool)
    for positions, loss, right in window.batches:
        losses[positions], rights[positions] = fetch(loss)[: len(positions)], fetch(right)[: len(positions)]
    if not np.isfinite(losses).all():
        raise UserError(f"{task.label}: {NOT_FINITE}")
    progress.advance(len(window.indices))
    if task.kind == "language_modeling":
        return int(rights.sum())
    ends = np.cumsum([len(options) for options in window.spans])
    answers = [int(np.argmin(option)) for option in np.split(losses, ends[:-1])]
    return sum(answer == items[i]["gold"] for i, answer in zip(window.indices, answers, strict=True))


@functools.partial(jax.jit, static_argnames=("model_cfg", "dtype", "mesh"))
def _score(
    params: gpt.Params, model_cfg: GPTConfig, ids: jax.Array, bounds: jax.Array, dtype: DTypeLike, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """In each row i of ids [b,t], scores the tokens ids[i, bounds[i, 0] : bounds[i, 1]].

    The first result, float32 [b], is the mean loss of each row's scored tokens in nats. The second result, bool [b], is
    True for a row if each of its scored tokens is the most likely token.
    """
    loss, right = token_scores(params, model_cfg, ids, jnp.roll(ids, -1, axis=1), dtype, mesh)
    position = jnp.arange(1, ids.shape[1] + 1)[None]  # position of the predicted token
    scored = (bounds[:, :1] <= position) & (position < bounds[:, 1:])
    mean = jnp.where(scored, loss, 0.0).sum(axis=1) / scored.sum(axis=1)
    return mean, jnp.all(right | ~scored, axis=1)


def token_scores(
    params: gpt.Params, model_cfg: GPTConfig, ids: jax.Array, targets: jax.Array, dtype: DTypeLike,
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Scores targets [b,t], where targets[i, j] is the token after ids[i, j].

    Returns the loss of each target in nats (float32 [b,t]), and whether it is the most likely token (bool [b,t]).

    The head is applied to one slice of the time axis at a time, so that only one slice of logits is in memory. The
    head's weights are cast, and all-gathered if they are sharded over replicas, before the first slice. `mesh` is the
    mesh of the parameters.
    """
    b, t = ids.shape
    x = gpt.hidden(params, model_cfg, ids, dtype)
    head = {"lm_head": sharding.gather_weight("lm_head", params["lm_head"].astype(dtype), mesh)}
    rows = b if mesh is None else b // sharding.replicas(mesh)  # on one device
    size = min(t, max(1, LOGITS_AT_ONCE // (rows * model_cfg.vocab_size)))
    slices = -(-t // size)
    pad = slices * size - t
    x, targets = jnp.pad(x, ((0, 0), (0, pad), (0, 0))), jnp.pad(targets, ((0, 0), (0, pad)))

    def score_slice(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = gpt.head(head, model_cfg, jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1))
        y = jax.lax.dynamic_slice_in_dim(targets, i * size, size, axis=1)
        loss = jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, y[..., None], axis=-1)[..., 0]
        return loss, jnp.argmax(z, axis=-1) == y

    def joined(a: jax.Array) -> jax.Array:
        """[slices,b,size] -> [b,t]"""
        return jnp.moveaxis(a, 0, 1).reshape(b, slices * size)[:, :t]

    loss, right = jax.lax.map(score_slice, jnp.arange(slices))
    return joined(loss), joined(right)
