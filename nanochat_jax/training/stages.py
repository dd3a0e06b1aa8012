"""Sets up pretraining, midtraining and finetuning: their data, number of steps and learning-rate schedule."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanochat_jax import checkpoint, config, progress, tasks
from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.data import dataloader, documents, hub, sources, token_cache
from nanochat_jax.model import attention
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
from nanochat_jax.training.held_out import check_held_out, check_overlap
from nanochat_jax.training.run import Run, compiled_memory
from nanochat_jax.training.start_plan import INSTEAD


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

    def describe_truncated(self) -> str:
        """Says how many of the conversations read so far were longer than a row. Returns "" if there were none."""
        info = self.loader.info
        if not info.get("truncated"):
            return ""
        text = f"{info['truncated']:,} conversations were longer than a row, and ended after their last whole answer"
        return text + (f"; {info['skipped']:,} without a whole answer were skipped" if info["skipped"] else "")

    def progress(self, step: int) -> float:
        """Returns the fraction of the stage that is done, from 0 to 1.

        If the number of steps is known, this is the fraction of steps taken. Otherwise, it is the fraction of the data
        read, including the batch that the loader returned last.
        """
        return step / self.steps if self.steps else self.loader.info["progress"] / self.epochs


def _batch_limits(run: Run) -> tuple[int, int, int, Callable[[int], int]]:
    """Returns the last four arguments of `shape_for_tokens` and `shape_for_rows`.

    Raises UserError if the attention kernel cannot compute --device_batch_size rows on one device.
    """
    attention.check_rows(run.cfg.device_batch_size, run.model_cfg)
    fit = functools.partial(rows_that_fit, run.model_cfg, need=functools.partial(compiled_memory, run))
    return run.cfg.device_batch_size, run.model_cfg.sequence_len, sharding.replicas(run.layout.mesh), fit


def base_stage(run: Run, cfg: config.Base) -> Stage:
    """Sets up pretraining with packed documents, a fixed number of steps and a trapezoidal learning rate."""
    model_cfg, tokenizer = run.model_cfg, run.tokenizer
    shape = shape_for_tokens(cfg.total_batch_size, *_batch_limits(run))
    steps = horizon(cfg, model_cfg, shape.tokens)
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

    def lr_mult(step: int, _: float) -> float:
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
    if isinstance(cfg, config.Mid) or cfg.total_batch_size:
        shape = shape_for_tokens(cfg.total_batch_size, *_batch_limits(run))
    else:
        rows = rows_of_examples(cfg.target_examples_per_step, mean_length, model_cfg.sequence_len)
        shape = shape_for_rows(rows, *_batch_limits(run))
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

    def lr_mult(_: int, progress: float) -> float:
        return cfg.init_lr_frac * decay(progress)

    amount = f"at most {cfg.eval_tokens:,} tokens" if is_mid else f"{len(asked):,} conversations"
    order = "one task after the other" if in_order else "shuffled"
    # In finetuning, a conversation fills at most one row.
    read = lengths if is_mid else np.minimum(lengths, model_cfg.sequence_len + 1)
    steps_per_epoch = len(task) * float(np.mean(read)) / shape.tokens
    if steps:
        check_epochs(cfg, steps / steps_per_epoch, len(task))
    facts = {
        "conversations": f"{len(task):,} of {mean_length:.0f} tokens on average, {order}: {task.describe()}",
        "steps per epoch, about": f"{steps_per_epoch:,.0f}",
        "epochs": describe_epochs(steps / steps_per_epoch if steps else epochs, cfg),
        "validation": f"{amount} of {held_out.describe()}",
    }
    if not is_mid and (too_long := float(np.mean(lengths > model_cfg.sequence_len + 1))):
        facts["longer than a row"] = f"about {too_long:.1%} of the conversations; each ends after its last whole answer"
    return Stage(shape, steps, epochs, loader, validation, lr_mult, steps or epochs * steps_per_epoch, facts)


def check_epochs(cfg: config.Mid | config.Sft, epochs: float, count: int) -> None:
    """Raises UserError if --num_iterations asks for too many passes over a mixture of `count` conversations.

    --num_epochs says the number of passes itself, so it may be larger than --max_epochs.
    """
    most = max(cfg.max_epochs, cfg.num_epochs if isinstance(cfg, config.Sft) else 0)
    if epochs <= most:
        return
    fewer = int(cfg.num_iterations * most / epochs)
    shorter = f"train fewer steps (--num_iterations={fewer}), " if fewer else ""
    passes = f"{epochs:,.1f} passes over the {progress.count_of(count, 'conversation')}"
    raise UserError(
        f"--num_iterations={cfg.num_iterations}: {passes} of --mixture are more than --max_epochs={cfg.max_epochs:g}: "
        f"add conversations, {shorter}or allow it (--max_epochs={math.ceil(epochs)})"
    )


def describe_epochs(epochs: float, cfg: config.Mid | config.Sft | config.Rl) -> str:
    """Describes how often a run reads its mixture: "about 0.86". Says so if a value of --num_epochs is not used."""
    if cfg.num_iterations <= 0:
        return f"{epochs:.3g}"
    num_epochs = 1 if isinstance(cfg, config.Mid) else cfg.num_epochs
    unused = f"; --num_epochs={num_epochs} is not used, because --num_iterations is given" if num_epochs != 1 else ""
    return f"about {epochs:,.2f}{unused}"


def pin_text(run: Run, source: sources.Source) -> sources.Source:
    """Records which text the run trains on. The record is saved in the run's checkpoints.

    A run that resumes reads the files that it began with. Files that were added later are left out, because they would
    change the order of the files. Raises UserError if one of the run's files is missing, or if the checkpoint was
    trained on another text.
    """
    text = {"source": source.name, "hash": source.hash, "validation": source.val_hash()}
    train_files = source.train_files
    if run.data is not None:
        folder = checkpoint.step_dir(run.dir, run.step)
        saved = checkpoint.read_meta(run.dir, run.step).get("text", text)
        if changed := ", ".join(key for key in text if text[key] != saved.get(key)):
            raise UserError(f"the text is not the one that {folder} was trained on (different {changed}): {INSTEAD}")
        train_files = _files_of_run(source, saved, folder)
    names = [path.name for path in train_files]
    run.origin["text"] = text | {"files": len(names), "names": names, "data_dir": str(source.folder or "")}
    return dataclasses.replace(source, train_files=train_files)


def _files_of_run(source: sources.Source, saved: dict, folder: Path) -> tuple[Path, ...]:
    """Returns the training files that the checkpoint in `folder` recorded as `saved`. Raises UserError if one is
    missing.

    Shards that are still downloading are not missing. Early versions recorded only the number of files.
    """
    names, here = saved.get("names"), {path.name: path for path in source.train_files}
    if names is None:
        count = wanted = saved.get("files", len(source.train_files))
        files = source.train_files[:count]
        lost = f"only {len(files)} are here" if len(files) < count else ""
    else:
        beside = source.train_files[0].parent  # holds shards that were copied by hand, if fewer were requested later
        files = tuple(here.get(name, beside / name) for name in names)
        gone = [path.name for path in files if path.name not in here and not path.exists()]
        lost = f"{gone[0]} is not here" if len(gone) == 1 else f"{len(gone)} of them are not here" if gone else ""
        # A download of N shards fetches those with the numbers 0 to N-1.
        count, wanted = len(files), max((int(n) + 1 for name in gone for n in re.findall(r"\d+", name)), default=0)
    if lost:
        raise UserError(
            f"{folder} was trained on {count} files of {source.name}, but {lost}: get all of them with "
            f"python -m nanochat_jax.dataset --data={source.name} -n {wanted}"
        )
    return files


def pin_tasks(run: Run, task: tasks.Mixture) -> None:
    """Records which conversations the run trains on. The record is saved in the run's checkpoints.

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
    run.origin["tasks"] = conversations


@dataclass(frozen=True)
class Amount:
    """How much training text a source has, including the shards that were requested but are not here yet."""

    source: sources.Source
    tokens: float  # estimated number of tokens in all training files
    none_here: bool  # whether all training files are still downloading
    num_cached: int  # number of files whose tokens are in the token cache

    @classmethod
    def of(cls, source: sources.Source, tokenizer: Tokenizer, cache_dir: Path) -> "Amount":
        files = source.train_files
        tokens = documents.epoch_tokens(files, tokenizer, cache_dir)
        if none_here := math.isnan(tokens):  # assume that training files are as large as validation files
            of_val = documents.epoch_tokens(source.val_files, tokenizer, cache_dir)
            tokens = of_val / len(source.val_files) * len(files)
        return cls(source, max(1.0, tokens), none_here, token_cache.num_cached(files, cache_dir))

    def describe(self, tokens: int) -> str:
        """Describes the text, and says how much of it a run of `tokens` tokens will read.

        Example: "fineweb-edu, 240 files of about 54.0M tokens; this run needs 208, 0.86 epochs"
        """
        count, epochs = len(self.source.train_files), tokens / self.tokens
        per_file = progress.short(self.tokens / count)
        text = f"{self.source.name}, {progress.count_of(count, 'file')} of about {per_file} tokens"
        text += ", none of them here yet" if self.none_here else ""
        text += f", {self.num_cached} of them already tokenized" if self.num_cached else ""
        text += f"; this run needs {min(count, math.ceil(epochs * count))}, {epochs:.2f} epochs"
        # Up to 4 epochs of the same text are about as good as new text (Muennighoff et al. 2023, arXiv:2305.16264).
        return text + (" (more than 4: new text would teach more)" if epochs > 4 else "")

    def check(self, max_epochs: float, steps: int, tokens_per_step: int) -> None:
        """Raises UserError if `steps` steps would read the text more than `max_epochs` times."""
        tokens = steps * tokens_per_step
        epochs = tokens / self.tokens
        if epochs <= max_epochs:
            return
        name, count = self.source.name, len(self.source.train_files)
        more = "get more text (python -m nanochat_jax.dataset -n 240, then scripts.tok_train --data=fineweb-edu)"
        if name in hub.SOURCES and self.source.folder is None:
            wanted = min(hub.SOURCES[name][1], math.ceil(epochs * count))
            more = f"download more (python -m nanochat_jax.dataset --data={name} -n {wanted})"
        fewer = int(max_epochs * self.tokens) // tokens_per_step
        shorter = f"train fewer steps (--num_iterations={fewer}), " if fewer else ""
        raise UserError(
            f"{epochs:,.1f} passes over the {progress.short(self.tokens)} tokens of {name} are more than "
            f"--max_epochs={max_epochs:g}: {more}, {shorter}or allow it (--max_epochs={math.ceil(epochs)})"
        )


def horizon(cfg: config.Base, model_cfg: GPTConfig, tokens: int) -> int:
    """Returns the number of optimizer steps, with `tokens` tokens per step.

    The first of these settings that is set decides: --num_iterations, --target_flops, --target_param_data_ratio. Raises
    UserError if the result is below 1.
    """
    if cfg.num_iterations > 0:
        steps = cfg.num_iterations
    elif cfg.target_flops > 0:
        steps = round(cfg.target_flops / (model_cfg.flops_per_token * tokens))
    else:
        steps = int(cfg.target_param_data_ratio * model_cfg.num_params) // tokens
    if steps < 1:
        ratio = "--target_flops" if cfg.target_flops > 0 else "--target_param_data_ratio"
        raise UserError(
            f"the horizon comes to {steps} steps of {tokens:,} tokens: lower --total_batch_size, raise {ratio}, or set "
            "--num_iterations=N"
        )
    return steps
