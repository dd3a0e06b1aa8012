"""Sets up pretraining, midtraining and finetuning: their data, number of steps and learning-rate schedule."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from nanochat_jax import config, tasks
from nanochat_jax.data import dataloader, documents, sources, token_cache
from nanochat_jax.model import attention
from nanochat_jax.parallel import sharding
from nanochat_jax.training import optim
from nanochat_jax.training.batch_shape import (
    BatchShape,
    rows_of_examples,
    shape_for_rows,
    shape_for_tokens,
)
from nanochat_jax.training.batch_trial import choose_rows
from nanochat_jax.training.held_out import check_held_out, check_overlap
from nanochat_jax.training.passes import Amount, check_epochs, describe_epochs, horizon
from nanochat_jax.training.pins import pin_rows, pin_tasks, pin_text
from nanochat_jax.training.run import Run


@dataclass
class Stage:
    """A stage (base, mid or sft) that is set up for one run."""

    batch_shape: BatchShape
    steps: int | None  # the number of optimizer steps, or None to train until the loader ends
    epochs: int  # if `steps` is None, the loader ends after this many passes over the data
    loader: dataloader.Loader
    validation: Callable[[], dataloader.Loader]  # opens the held-out data
    lr_mult: Callable[[int], float]  # number of steps taken -> factor for all learning rates in the next step
    expected_steps: float  # `steps`, or an estimate if `steps` is None
    facts: dict[str, str] = field(default_factory=dict)  # printed before the first step

    def describe_truncated(self) -> str:
        """Says how many of the conversations read so far were longer than a row. Returns "" if there were none."""
        info = self.loader.info
        if not info.get("truncated"):
            return ""
        text = f"{info['truncated']:,} conversations were longer than a row, and ended after their last whole answer"
        return text + (f"; {info['skipped']:,} without a whole answer were skipped" if info["skipped"] else "")


def _batch_limits(run: Run, tokens: float) -> tuple[int, int, int, Callable[[int], int]]:
    """Returns the last four arguments of `shape_for_tokens` and `shape_for_rows`.

    `tokens` is how many tokens the whole run trains on, roughly.

    Raises UserError if the attention kernel cannot compute --device_batch_size rows on one device.
    """
    attention.check_rows(run.cfg.device_batch_size, run.model_cfg)
    fit = functools.partial(choose_rows, run, tokens=tokens)
    return run.cfg.device_batch_size, run.model_cfg.sequence_len, sharding.replicas(run.layout.mesh), fit


def base_stage(run: Run, cfg: config.Base) -> Stage:
    """Sets up pretraining with packed documents, a fixed number of steps and a trapezoidal learning rate."""
    model_cfg, tokenizer = run.model_cfg, run.tokenizer
    steps = horizon(cfg, model_cfg, cfg.total_batch_size)
    shape = shape_for_tokens(cfg.total_batch_size, *_batch_limits(run, steps * cfg.total_batch_size))
    pin_rows(run, shape)
    source = pin_text(run, sources.open(cfg.data, cfg.data_dir))
    cache_dir = token_cache.folder_of(source, tokenizer)
    text = Amount.of(source, tokenizer, cache_dir)
    text.check(cfg.max_epochs, steps, shape.tokens)
    process_index, process_count = sharding.process_rows(run.layout.mesh)

    loader = dataloader.base_loader(
        source.train_files, tokenizer, shape.total_rows, model_cfg.sequence_len, packing=cfg.packing, seed=cfg.seed,
        cache_dir=cache_dir, process_index=process_index, process_count=process_count,
    )  # fmt: skip

    def validation() -> dataloader.Loader:
        return dataloader.val_batches(
            source.val_files, tokenizer, shape.rows * shape.replicas, model_cfg.sequence_len, cfg.eval_tokens,
            packing=cfg.packing, cache_dir=cache_dir, process_index=process_index, process_count=process_count,
        )  # fmt: skip

    def lr_mult(step: int) -> float:
        return optim.trapezoid(step, steps, cfg.warmup_ratio, cfg.warmdown_ratio, cfg.final_lr_frac)

    facts = {
        "text": text.describe(steps * shape.tokens),
        "tokens per parameter": f"{steps * shape.tokens / model_cfg.num_params:.2f}",
    }
    return Stage(shape, steps, 1, loader, validation, lr_mult, steps, facts)


def chat_stage(run: Run, cfg: config.Mid | config.Sft) -> Stage:
    """Sets up midtraining or finetuning.

    Midtraining may split a conversation over several rows, and every token is a target. Finetuning does not split
    conversations, and only the assistant's tokens are targets. If --num_iterations is given, training ends after that
    many steps. Otherwise, training ends when the data ends.
    """
    model_cfg, tokenizer = run.model_cfg, run.tokenizer
    if isinstance(cfg, config.Mid):
        supervise, epochs, decay = "all", 1, optim.late_decay
    else:
        supervise, epochs, decay = "mask", cfg.num_epochs, optim.linear_decay
    steps = cfg.num_iterations if cfg.num_iterations > 0 else None
    is_new = run.data is None
    check_held_out(cfg, is_new)
    in_order = cfg.task_order == "sequence"
    task = tasks.mixture(
        cfg.mixture, "train", cfg.task_data_dir, seed=None if in_order else 42, task_files=cfg.task_files
    )
    pin_tasks(run, task)
    held_out = tasks.mixture(cfg.val_mixture, "val", cfg.task_data_dir, task_files=cfg.task_files)
    check_overlap(task, held_out, is_new)
    lengths = documents.token_counts(task, tokenizer)
    mean_length = float(np.mean(lengths))
    # In finetuning, a conversation fills at most one row.
    read = lengths if isinstance(cfg, config.Mid) else np.minimum(lengths, model_cfg.sequence_len + 1)
    tokens_per_epoch = len(task) * float(np.mean(read))
    by_rows = isinstance(cfg, config.Sft) and not cfg.total_batch_size
    rows = rows_of_examples(cfg.target_examples_per_step, mean_length, model_cfg.sequence_len) if by_rows else 0
    tokens = steps * (rows * model_cfg.sequence_len or cfg.total_batch_size) if steps else epochs * tokens_per_epoch
    if by_rows:
        shape = shape_for_rows(rows, *_batch_limits(run, tokens))
    else:
        shape = shape_for_tokens(cfg.total_batch_size, *_batch_limits(run, tokens))
    pin_rows(run, shape)
    process_index, process_count = sharding.process_rows(run.layout.mesh)

    loader = dataloader.chat_loader(
        task, tokenizer, shape.total_rows, model_cfg.sequence_len, supervise=supervise,
        epochs=None if steps else epochs, seed=None if in_order else cfg.seed, padding=shape.padding,
        process_index=process_index, process_count=process_count,
    )  # fmt: skip

    # Every validation reads the same held-out conversations, on any number of devices. In midtraining, it stops after
    # about --eval_tokens tokens. In finetuning, it stops after --eval_examples conversations.
    is_mid = isinstance(cfg, config.Mid)
    asked = held_out if is_mid else held_out[: cfg.eval_examples]
    max_rows = max(1, cfg.eval_tokens // model_cfg.sequence_len) if is_mid else None

    def validation() -> dataloader.Loader:
        return dataloader.chat_loader(
            asked, tokenizer, shape.rows * shape.replicas, model_cfg.sequence_len, supervise=supervise, epochs=1,
            max_rows=max_rows, process_index=process_index, process_count=process_count,
        )  # fmt: skip

    def lr_mult(step: int) -> float:
        # If training ends with the data, the schedule follows the data that was read before the current batch. With the
        # batch, the last step would have a learning rate of 0, and a run of one step would train nothing.
        return cfg.init_lr_frac * decay(step / steps if steps else loader.info["progress_before"] / epochs)

    amount = f"at most {cfg.eval_tokens:,} tokens" if is_mid else f"{len(asked):,} conversations"
    order = "one task after the other" if in_order else "shuffled"
    steps_per_epoch = tokens_per_epoch / shape.tokens
    if steps:
        check_epochs(cfg, steps / steps_per_epoch, len(task))
    facts = {
        "conversations": f"{len(task):,} of {mean_length:.0f} tokens on average, {order}: {task.describe()}",
        "steps per epoch, about": f"{steps_per_epoch:,.{1 if steps_per_epoch < 10 else 0}f}",
        "epochs": describe_epochs(steps / steps_per_epoch if steps else epochs, cfg),
        "validation": f"{amount} of {held_out.describe()}",
    }
    if not is_mid and (too_long := float(np.mean(lengths > model_cfg.sequence_len + 1))):
        facts["longer than a row"] = f"about {too_long:.1%} of the conversations; each ends after its last whole answer"
    return Stage(shape, steps, epochs, loader, validation, lr_mult, steps or epochs * steps_per_epoch, facts)
