"""Sets up pretraining, midtraining and finetuning: their data, number of steps and learning-rate schedule."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nanochat_jax import checkpoint, config, progress, tasks
from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.data import dataloader, sources, token_cache
from nanochat_jax.parallel import sharding
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.training import optim
from nanochat_jax.training.batch_shape import (
    BatchShape,
    rows_of_examples,
    rows_that_fit,
    shape_for_rows,
    shape_for_tokens,
)
from nanochat_jax.training.run import INSTEAD, Run, compiled_memory


@dataclass
class Stage:
    """A stage (base, mid or sft) that is set up for one run."""

    batch_shape: BatchShape
    steps: int | None  # the number of optimizer steps, or None to train until the loader ends
    epochs: int  # if `steps` is None, the loader ends after this many passes over the data
    loader: dataloader.Loader
    validation: Callable[[], dataloader.Loader]  # opens the held-out data
    lr_mult: Callable[[int, float], float]  # (step, progress from 0 to 1) -> factor for all learning rates
    expected_steps: float  # `steps`, or an estimate if `steps` is None
    facts: dict[str, str] = field(default_factory=dict)  # printed before the first step

    def progress(self, step: int) -> float:
        """Returns the fraction of the stage that is done, from 0 to 1.

        If the number of steps is known, this is the fraction of steps taken. Otherwise, it is the fraction of the data
        read, including the batch that the loader returned last.
        """
        return step / self.steps if self.steps else self.loader.info["progress"] / self.epochs


def _batch_limits(run: Run) -> tuple[int, int, int, Callable[[int], int]]:
    """Returns the last four arguments of `shape_for_tokens` and `shape_for_rows`."""
    fit = functools.partial(rows_that_fit, run.model_cfg, need=functools.partial(compiled_memory, run))
    return run.cfg.device_batch_size, run.model_cfg.sequence_len, sharding.replicas(run.layout.mesh), fit


def base_stage(run: Run, cfg: config.Base) -> Stage:
    """Sets up pretraining with packed documents, a fixed number of steps and a trapezoidal learning rate."""
    model_cfg, tokenizer = run.model_cfg, run.tokenizer
    shape = shape_for_tokens(cfg.total_batch_size, *_batch_limits(run))
    steps = horizon(cfg, model_cfg, shape.tokens)
    source = pin_text(run, sources.open(cfg.data, cfg.data_dir))
    cache_dir = token_cache.folder_of(source, tokenizer)
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

    def lr_mult(step: int, _: float) -> float:
        return optim.trapezoid(step, steps, cfg.warmup_ratio, cfg.warmdown_ratio, cfg.final_lr_frac)

    facts = {
        "text": describe_data(source, steps * shape.tokens, tokenizer, cache_dir),
        "tokens per parameter": f"{steps * shape.tokens / model_cfg.num_params:.2f}",
    }
    return Stage(shape, steps, 1, loader, validation, lr_mult, steps, facts)


def chat_stage(run: Run, cfg: config.Mid | config.Sft) -> Stage:
    """Sets up midtraining or finetuning.

    Midtraining may split a conversation over several rows, and every token is a target. Finetuning keeps conversations
    whole, and only the assistant's tokens are targets. If --num_iterations is given, training ends after that many
    steps. Otherwise, training ends with the data.
    """
    model_cfg, tokenizer = run.model_cfg, run.tokenizer
    if isinstance(cfg, config.Mid):
        supervise, epochs, decay = "all", 1, optim.late_decay
    else:
        supervise, epochs, decay = "mask", cfg.num_epochs, optim.linear_decay
    steps = cfg.num_iterations if cfg.num_iterations > 0 else None
    task = tasks.mixture(cfg.mixture, "train", cfg.task_data_dir)
    pin_tasks(run, task)
    held_out = tasks.mixture(cfg.val_mixture, "val", cfg.task_data_dir)
    mean_length = dataloader.mean_tokens(task, tokenizer)
    if isinstance(cfg, config.Mid) or cfg.total_batch_size:
        shape = shape_for_tokens(cfg.total_batch_size, *_batch_limits(run))
    else:
        rows = rows_of_examples(cfg.target_examples_per_step, mean_length, model_cfg.sequence_len)
        shape = shape_for_rows(rows, *_batch_limits(run))
    process_index, process_count = sharding.process_rows(run.layout.mesh)

    loader = dataloader.chat_loader(
        task, tokenizer, shape.total_rows, model_cfg.sequence_len, supervise=supervise,
        epochs=None if steps else epochs, seed=cfg.seed, padding=shape.padding, process_index=process_index,
        process_count=process_count,
    )  # fmt: skip

    def validation() -> dataloader.Loader:
        return dataloader.chat_loader(
            held_out, tokenizer, shape.rows * shape.replicas, model_cfg.sequence_len, supervise=supervise, epochs=1,
            max_rows=max(1, cfg.eval_tokens // model_cfg.sequence_len), process_index=process_index,
            process_count=process_count,
        )  # fmt: skip

    def lr_mult(_: int, progress: float) -> float:
        return cfg.init_lr_frac * decay(progress)

    steps_per_epoch = len(task) * mean_length / shape.tokens
    facts = {
        "conversations": f"{len(task):,} of {mean_length:.0f} tokens on average ({', '.join(cfg.mixture)})",
        "steps per epoch, about": f"{steps_per_epoch:,.0f}",
    }
    return Stage(shape, steps, epochs, loader, validation, lr_mult, steps or epochs * steps_per_epoch, facts)


def pin_text(run: Run, source: sources.Source) -> sources.Source:
    """Records in the run's checkpoints which text it trains on.

    Returns `source` without the files that were added after the run began. Otherwise, these files would change the
    order of files in later epochs. Raises UserError if the run resumes from a checkpoint that was trained on another
    text.
    """
    text = {"source": source.name, "hash": source.hash, "validation": source.val_hash()}
    count = len(source.train_files)
    if run.data is not None:
        folder = checkpoint.step_dir(run.dir, run.step)
        saved = checkpoint.read_meta(run.dir, run.step).get("text", text)
        if changed := ", ".join(key for key in text if text[key] != saved.get(key)):
            raise UserError(f"the text is not the one that {folder} was trained on (different {changed}): {INSTEAD}")
        count = saved.get("files", count)
        if count > len(source.train_files):
            raise UserError(
                f"{folder} was trained on {count} files of {source.name}, but only {len(source.train_files)} are here: "
                f"get all of them with python -m nanochat_jax.dataset --data={source.name} -n {count}"
            )
    run.identity["text"] = text | {"files": count}
    return dataclasses.replace(source, train_files=source.train_files[:count])


def pin_tasks(run: Run, task: tasks.Mixture) -> None:
    """Records in the run's checkpoints which conversations it trains on.

    The record contains the name and size of each task, and a hash of some conversations. The tasks are recorded in the
    order of the mixture, because the shuffle depends on this order. Raises UserError if the run resumes from a
    checkpoint that was trained on other conversations.
    """
    conversations = {"rows": [[part.name, len(part)] for part in task.tasks], "hash": task.hash()}
    if run.data is not None:
        saved = checkpoint.read_meta(run.dir, run.step).get("tasks", conversations)
        if saved != conversations:
            changed = "mixture" if saved["rows"] != conversations["rows"] else "content"
            folder = checkpoint.step_dir(run.dir, run.step)
            raise UserError(
                f"the conversations are not the ones that {folder} was trained on (different {changed}): {INSTEAD}"
            )
    run.identity["tasks"] = conversations


def describe_data(source: sources.Source, tokens: int, tokenizer: Tokenizer, cache_dir: Path) -> str:
    """Describes `source`, and how much of it a run of `tokens` tokens will read.

    Example: "fineweb-edu, 240 files of about 54.0M tokens; this run needs 208, 0.86 epochs"
    """
    files = source.train_files
    available = dataloader.epoch_tokens(files, tokenizer, cache_dir)
    if none_here := math.isnan(available):  # assume that training files are as large as validation files
        available = dataloader.epoch_tokens(source.val_files, tokenizer, cache_dir) / len(source.val_files) * len(files)
    epochs = tokens / max(1.0, available)
    shards = min(len(files), math.ceil(epochs * len(files)))
    per_file = progress.short(available / len(files))
    text = f"{source.name}, {progress.count_of(len(files), 'file')} of about {per_file} tokens"
    text += ", none of them here yet" if none_here else ""
    if made := token_cache.num_cached(files, cache_dir):
        text += f", {made} of them already tokenized"
    text += f"; this run needs {shards}, {epochs:.2f} epochs"
    # Up to 4 epochs of the same text are about as good as new text (Muennighoff et al. 2023, arXiv:2305.16264).
    return text + (" (more than 4: new text would teach more)" if epochs > 4 else "")


def horizon(cfg: config.Base, model_cfg: GPTConfig, tokens: int) -> int:
    """Returns the number of optimizer steps, with `tokens` tokens per step.

    If --num_iterations is set, it decides. Otherwise, --target_flops decides if it is set. If neither is set,
    --target_param_data_ratio decides. Raises UserError if the result is below 1.
    """
    if cfg.num_iterations > 0:
        steps = cfg.num_iterations
    elif cfg.target_flops > 0:
        steps = round(cfg.target_flops / (model_cfg.flops_per_token * tokens))
    else:
        steps = int(cfg.target_param_data_ratio * model_cfg.num_params) // tokens
    if steps < 1:
        raise UserError(f"the horizon comes to {steps} steps of {tokens:,} tokens: raise --num_iterations")
    return steps
