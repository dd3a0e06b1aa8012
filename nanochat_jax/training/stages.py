"""What sets pretraining, midtraining and finetuning apart: where rows come from, how many steps, how the rate falls."""

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
from nanochat_jax.training import optim
from nanochat_jax.training.batch_shape import (
    BatchShape,
    batch_shape,
    batch_shape_of_rows,
    rows_of_examples,
    rows_that_fit,
)
from nanochat_jax.training.run import INSTEAD, Run, compiled_memory


@dataclass
class Stage:
    """One of base, mid and sft, for a run."""

    batch_shape: BatchShape
    steps: int | None  # optimizer steps, None: until the loader ends
    loader: dataloader.Loader
    validation: Callable[[], dataloader.Loader]
    lr_mult: Callable[[int, float], float]  # (step, progress in [0, 1]) -> factor on the learning rates
    facts: dict = field(default_factory=dict)  # derived numbers to print


def _process(run: Run) -> dict:
    index, count = sharding.process_rows(run.layout.mesh)
    return {"process_index": index, "process_count": count}


def _how_cut(run: Run) -> tuple:
    """What `geometry` and `geometry_of_rows` want to know besides the batch."""
    fit = functools.partial(rows_that_fit, run.model_cfg, need=functools.partial(compiled_memory, run))
    return run.cfg.device_batch_size, run.model_cfg.sequence_len, sharding.replicas(run.layout.mesh), fit


def base_stage(run: Run) -> Stage:
    cfg, model_cfg = run.cfg, run.model_cfg
    shape = batch_shape(cfg.total_batch_size, *_how_cut(run))
    steps = horizon(cfg, model_cfg, shape.tokens)
    source = pin_text(run, sources.open(cfg.data, cfg.data_dir))
    text = {"packing": cfg.packing, "cache_dir": token_cache.folder_of(source, run.tokenizer), **_process(run)}
    return Stage(
        batch_shape=shape,
        steps=steps,
        loader=dataloader.base_loader(
            source.train_files, run.tokenizer, shape.total_rows, model_cfg.sequence_len, seed=cfg.seed, **text
        ),
        validation=lambda: dataloader.val_batches(
            source.val_files,
            run.tokenizer,
            shape.rows * shape.replicas,
            model_cfg.sequence_len,
            cfg.eval_tokens,
            **text,
        ),
        lr_mult=lambda step, _: optim.trapezoid(step, steps, cfg.warmup_ratio, cfg.warmdown_ratio, cfg.final_lr_frac),
        facts={
            "text": describe_data(source, steps * shape.tokens, run.tokenizer, text["cache_dir"]),
            "tokens a parameter": f"{steps * shape.tokens / model_cfg.num_params:.2f}",
        },
    )


def pin_text(run: Run, source: sources.Source) -> sources.Source:
    """The text to read, which is recorded with the checkpoints: the files a run began with, since in later epochs their
    order depends on how many there are. UserError where it is not that of the checkpoint the run goes on from."""
    text = {"source": source.name, "hash": source.hash, "validation": source.val_hash()}
    count = len(source.train_files)
    if run.data is not None:
        folder = checkpoint.step_dir(run.dir, run.step)
        then = checkpoint.read_meta(run.dir, run.step).get("text", text)
        if changed := ", ".join(key for key in text if text[key] != then.get(key)):
            raise UserError(f"the text is not that of {folder} (other {changed}): {INSTEAD}")
        count = then.get("files", count)
        if count > len(source.train_files):
            raise UserError(
                f"{folder} is of {count} files of {source.name}, there are {len(source.train_files)}: get all of them "
                f"with python -m nanochat_jax.dataset --data={source.name} -n {count}"
            )
    run.identity["text"] = text | {"files": count}
    return dataclasses.replace(source, train_files=source.train_files[:count])


def pin_tasks(run: Run, task: tasks.Mixture) -> None:
    """Records with the checkpoints what conversations are learnt from: names and rows in their order, which shuffles
    them, and a hash of samples of them. UserError where the run goes on from a checkpoint of others."""
    learnt = {"rows": [[part.name, len(part)] for part in task.tasks], "hash": task.hash()}
    if run.data is not None:
        then = checkpoint.read_meta(run.dir, run.step).get("tasks", learnt)
        if then != learnt:
            what = "mixture" if then["rows"] != learnt["rows"] else "content"
            folder = checkpoint.step_dir(run.dir, run.step)
            raise UserError(f"the conversations are not those of {folder} (other {what}): {INSTEAD}")
    run.identity["tasks"] = learnt


def describe_data(source: sources.Source, tokens: int, tokenizer, cache_dir: Path) -> str:
    """How much of a source a run will read."""
    files = source.train_files
    there = dataloader.epoch_tokens(files, tokenizer, cache_dir)
    if none := math.isnan(there):  # the validation shard is, and about as large
        there = dataloader.epoch_tokens(source.val_files, tokenizer, cache_dir) / len(source.val_files) * len(files)
    epochs = tokens / max(1.0, there)
    shards = min(len(files), math.ceil(epochs * len(files)))
    said = f"{source.name}, {len(files)} files of about {progress.short(there / len(files))} tokens"
    said += ", none of them here yet" if none else ""
    if made := token_cache.num_cached(files, cache_dir):
        said += f", {made} of them tokenized before"
    said += f"; this run needs {shards}, {epochs:.2f} epochs"
    # Up to 4, reading text again is about as good as new text (Muennighoff et al. 2023, arXiv:2305.16264).
    return said + (" (more than 4: new text would teach more)" if epochs > 4 else "")


def horizon(cfg: config.Base, model_cfg: GPTConfig, tokens: int) -> int:
    """Steps of `tokens` tokens: as many as given, else FLOPs if given, else tokens in proportion to the parameters."""
    if cfg.num_iterations > 0:
        steps = cfg.num_iterations
    elif cfg.target_flops > 0:
        steps = round(cfg.target_flops / (model_cfg.flops_per_token * tokens))
    else:
        steps = int(cfg.target_param_data_ratio * model_cfg.num_params) // tokens
    if steps < 1:
        raise UserError(f"the horizon comes to {steps} steps of {tokens:,} tokens: raise --num_iterations")
    return steps


def chat_stage(run: Run) -> Stage:
    """Midtraining: packed conversations, loss on all tokens. Finetuning: whole ones, loss on the assistant's."""
    cfg, model_cfg, mid = run.cfg, run.model_cfg, run.cfg.stage == "mid"
    task = tasks.mixture(cfg.mixture, "train", cfg.task_data_dir)
    pin_tasks(run, task)
    held_out = tasks.mixture(cfg.val_mixture, "val", cfg.task_data_dir)
    length = dataloader.mean_tokens(task, run.tokenizer)
    if cfg.total_batch_size:
        shape = batch_shape(cfg.total_batch_size, *_how_cut(run))
    else:  # finetuning alone has no default
        rows = rows_of_examples(cfg.target_examples_per_step, length, model_cfg.sequence_len)
        shape = batch_shape_of_rows(rows, *_how_cut(run))
    steps = cfg.num_iterations if cfg.num_iterations > 0 else None
    epochs = None if steps else (1 if mid else cfg.num_epochs)
    loader = functools.partial(dataloader.chat_loader, supervise="all" if mid else "mask", **_process(run))
    return Stage(
        batch_shape=shape,
        steps=steps,
        loader=loader(
            task, run.tokenizer, shape.total_rows, model_cfg.sequence_len, epochs=epochs, seed=cfg.seed,
            padding=shape.padding,
        ),
        validation=lambda: loader(
            held_out, run.tokenizer, shape.rows * shape.replicas, model_cfg.sequence_len, epochs=1,
            max_rows=max(1, cfg.eval_tokens // model_cfg.sequence_len),
        ),
        lr_mult=lambda step, progress: cfg.init_lr_frac * (optim.late_decay if mid else optim.linear_decay)(progress),
        facts={
            "conversations": f"{len(task):,} of {length:.0f} tokens ({', '.join(cfg.mixture)})",
            "steps an epoch, about": f"{len(task) * length / shape.tokens:,.0f}",
        },
    )  # fmt: skip
