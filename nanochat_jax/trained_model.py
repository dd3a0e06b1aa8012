"""Finds the checkpoint of a trained model, and loads the model for evaluation and chat."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_jax import files, run_log
from nanochat_jax.checkpoint import MANIFEST, damage, latest, read_meta, restore_params, run_dir, step_dir, steps
from nanochat_jax.config import REPOSITORY, STAGES, GPTConfig, UserError, base_dir

if TYPE_CHECKING:  # importing these at run time would slow down --help
    from nanochat_jax.model import gpt
    from nanochat_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class TrainedModel:
    """A model from a checkpoint, with float32 parameters on one device."""

    params: "gpt.Params"
    model_cfg: GPTConfig
    tokenizer: "Tokenizer"
    stage: str
    tag: str
    step: int
    run_dir: Path
    meta: dict

    @property
    def name(self) -> str:
        """The model's id in the API, such as nanochat-d20-sft."""
        return f"nanochat-{self.tag}-{self.stage}"

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks that the run trained on, as written in --mixture. A base model has none."""
        return list(self.meta.get("config", {}).get("mixture", {}))


def find(stage: str, tag: str = "", step: int = -1, preset: str = "", *, as_parent: bool = False) -> tuple[Path, int]:
    """Finds a checkpoint, and returns (the folder of its run, its step).

    Without a tag, chooses the run that the preset names. Without a preset, chooses the stage's most recently saved run.
    Without a step, chooses the run's latest undamaged checkpoint. Raises UserError if no checkpoint is found, or if the
    checkpoint of the given step is damaged. With `as_parent`, the errors name the flags that choose a run's parent.
    """
    tag_flag, step_flag = ("--source_tag", "--source_step") if as_parent else ("--model_tag", "--step")
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}: must be one of {', '.join(STAGES)}")
    tag = tag or preset
    if not (existing := tags(stage)) or (tag and tag not in existing):
        raise _nothing_saved(stage, tag, preset, tag_flag)
    run = run_dir(stage, tag) if tag else last_saved([run_dir(stage, name) for name in existing], tag_flag)
    only_for_training = ("optimizer/", "data.json")
    if step >= 0:
        if step not in steps(run):
            there = ", ".join(map(str, steps(run)))
            raise UserError(f"{step_flag}={step}: no checkpoint of this step in {run}; available: {there}")
        if problem := damage(step_dir(run, step), only_for_training):
            raise UserError(f"{step_dir(run, step)}: {problem}")
        return run, step
    newest = latest(run, only_for_training)
    if newest is None:
        raise _nothing_saved(stage, run.name, preset, tag_flag)
    return run, newest


def tags(stage: str) -> list[str]:
    """The names of the stage's runs that have a complete checkpoint. Runs that were moved aside are left out."""
    folder = run_dir(stage, "")
    try:
        names = sorted(p.name for p in folder.iterdir() if p.name[0] != ".") if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): make it readable") from None
    return [name for name in names if steps(folder / name)]


def last_saved(runs: Sequence[Path], tag_flag: str = "--model_tag") -> Path:
    """Returns the run that was saved last, and prints the choice. `runs` must hold runs of one stage, at least one.
    The error below names `tag_flag` as the flag that chooses a run.

    If several runs share the last time, they are a run and its copies. Of these, returns the original, which is the run
    whose config.json records its own name. Raises UserError if no run, or more than one, is the original.
    """
    if len(runs) == 1:
        return runs[0]
    stage = runs[0].parent.name.removesuffix("_checkpoints")
    times = {run: saved_time(run) for run in runs}
    last = [run for run in runs if times[run] == max(times.values())]
    if len(last) > 1:  # these are copies, because no two checkpoints are saved in the same millisecond
        names = " and ".join(run.name for run in last)
        last = [run for run in last if files.read_json(run / "config.json").get("tag") == run.name]
        if len(last) != 1:
            raise UserError(f"the {stage} runs {names} were saved at the same time: name one of them with {tag_flag}")
        print(f"{stage}: {names} are copies of one run; {last[0].name} is the original")
    others = ", ".join(run.name for run in runs if run != last[0])
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(times[last[0]][1]))
    print(f"{stage}: {last[0].name} is the run that was saved last ({when}); there are also {others}")
    return last[0]


def described(run: Path, step: int) -> str:
    """Returns text such as "base_checkpoints/d20, step 60", with a note if this is not the end of a finished run."""
    text, records = f"{run.relative_to(base_dir())}, step {step}", run_log.read(run)
    end = finished_at(records)
    if end == step or not records:  # without a log, nothing is known
        return text
    if end is None or end < step:
        return f"{text} (this run is not finished)"
    return f"{text} (this run finished at step {end})"


def finished_at(records: Sequence[dict]) -> int | None:
    """Returns the last step at which a run was finished, or None if its log `records` hold no such step."""
    notes = [r for r in records if r["kind"] == "note" and r.get("text") == "finished"]
    return notes[-1]["step"] if notes else None


def saved_time(run: Path) -> tuple[bool, float]:
    """Returns when a run was last saved, as (True, Unix time).

    For a run without a checkpoint, returns (False, the time of the last log record), or (False, 0.0) without a log.

    The time of a checkpoint comes from its metadata or else from the run's log. If both lack it, prints a line and uses
    the time of the manifest file. This is the last resort, because copying a folder changes the times of its files.
    """
    records, saved = run_log.read(run), steps(run)
    if not saved:
        return False, max(map(_time, records), default=0.0)
    folder = step_dir(run, saved[-1])
    logged = [r for r in records if (r["kind"], r["step"]) == ("checkpoint", saved[-1])]
    for source in (files.read_json(folder / "meta.json"), *reversed(logged)):
        if when := _time(source):
            return True, when
    print(f"{folder}: neither its metadata nor the log says when it was saved; using the time of its files")
    return True, (folder / MANIFEST).stat().st_mtime


def _time(record: dict) -> float:
    """Returns the time in a log record or in meta.json, or 0.0 if there is none."""
    value = record.get("time")
    return value if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _nothing_saved(stage: str, tag: str, preset: str, tag_flag: str) -> UserError:
    """Returns an error that lists the existing runs and the command to train the missing run."""
    others = [other for other in tags(stage) if other != tag]
    existing = f"choose one that exists with {tag_flag} ({', '.join(others)}), or " if others else ""
    name = f" --model_tag={tag}" if tag != preset else ""  # commandline.py adds the --config that the user gave
    if (REPOSITORY / "configs" / f"{tag}.toml").is_file():
        name = f" --config={tag}"
    command = f"run python -m scripts.train --stage={stage}{name}"
    if not any(tags(stage) for stage in STAGES):
        command += " (bash speedrun_jax.sh runs all stages)"
    return UserError(f"no {stage} checkpoint under {run_dir(stage, tag)}: {existing}{command}")


def load(stage: str, tag: str = "", step: int = -1, preset: str = "") -> TrainedModel:
    """Finds and verifies a checkpoint (see `find`), and loads its parameters onto the first device."""
    import jax

    from nanochat_jax.model import gpt

    if jax.process_count() > 1:
        raise UserError("evaluation and chat run in one process, on all devices of one host: start a single process")
    run, step = find(stage, tag, step, preset)
    meta = read_meta(run, step)
    model_cfg = GPTConfig(**meta["model"])
    tokenizer = load_tokenizer(meta, run)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.eval_shape(lambda: gpt.init(model_cfg))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
    params = restore_params(run, step, abstract)
    print(f"model: {described(run, step)}, {model_cfg.num_params / 1e6:,.1f}M parameters")
    return TrainedModel(params, model_cfg, tokenizer, stage, run.name, step, run, meta)


def load_tokenizer(meta: dict, run: Path) -> "Tokenizer":
    """Returns the tokenizer that the run was trained with.

    This is either the current tokenizer or an older one that tok_train has moved aside. Raises UserError if neither has
    the hash that `meta` records.
    """
    from nanochat_jax.tokenizer import Tokenizer

    wanted = meta["tokenizer"]
    for folder in (base_dir() / "tokenizer", base_dir() / f"tokenizer-{wanted[:8]}"):
        if folder.is_dir() and (tokenizer := Tokenizer.load(folder)).hash == wanted:
            return tokenizer
    raise UserError(
        f"{run} was trained with a tokenizer ({wanted[:8]}) that is not under {base_dir()}: copy its folder to "
        f"{base_dir() / f'tokenizer-{wanted[:8]}'}"
    )
