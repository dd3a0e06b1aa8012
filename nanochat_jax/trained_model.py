"""Finds the checkpoint of a trained model, and loads the model for evaluation and chat."""

import math
import time
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


def find(stage: str, tag: str = "", step: int = -1, preset: str = "") -> tuple[Path, int]:
    """Finds a checkpoint, and returns (the folder of its run, its step).

    Without a tag, chooses the run that the preset names. Without a preset, chooses the stage's most recently saved run.
    Without a step, chooses the run's latest undamaged checkpoint. Raises UserError if no checkpoint is found, or if the
    checkpoint of the given step is damaged.
    """
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}: must be one of {', '.join(STAGES)}")
    tag = tag or preset
    run = run_dir(stage, tag) if tag else most_recent(stage)
    if run is None or not steps(run):
        raise _nothing_saved(stage, tag, preset)
    only_for_training = ("optimizer/", "data.json")
    if step >= 0:
        if step not in steps(run):
            existing = ", ".join(map(str, steps(run)))
            raise UserError(f"no checkpoint of step {step} in {run}; available: {existing}")
        if problem := damage(step_dir(run, step), only_for_training):
            raise UserError(f"{step_dir(run, step)}: {problem}")
        return run, step
    newest = latest(run, only_for_training)
    if newest is None:
        raise _nothing_saved(stage, tag, preset)
    return run, newest


def tags(stage: str) -> list[str]:
    """The names of the stage's runs that have a complete checkpoint. Runs that were moved aside do not count."""
    folder = run_dir(stage, "")
    try:
        names = sorted(p.name for p in folder.iterdir() if p.name[0] != ".") if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): make it readable") from None
    return [name for name in names if steps(folder / name)]


def most_recent(stage: str) -> Path | None:
    """Returns the folder of the stage's most recently saved run, or None if there is no run. Prints the choice.

    Of a run and its copies, chooses the run whose name is recorded in its config.json. Raises UserError if several runs
    were saved at the same time and none of them, or more than one, is the original.
    """
    runs = [run_dir(stage, tag) for tag in tags(stage)]
    if len(runs) < 2:
        return runs[0] if runs else None
    times = {run: saved_time(run, steps(run)[-1]) for run in runs}
    last = [run for run in runs if times[run] == max(times.values())]
    if len(last) > 1:  # copies, because no two checkpoints are saved in the same millisecond
        names = " and ".join(run.name for run in last)
        last = [run for run in last if files.read_json(run / "config.json").get("tag") == run.name]
        if len(last) != 1:
            raise UserError(f"the {stage} runs {names} were saved at the same time: name one of them")
        print(f"{stage}: {names} are copies of one run; {last[0].name} is the original")
    others = ", ".join(run.name for run in runs if run != last[0])
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(times[last[0]]))
    print(f"{stage}: {last[0].name} is the run that was saved last ({when}); there are also {others}")
    return last[0]


def saved_time(run: Path, step: int) -> float:
    """Returns the Unix time at which a checkpoint was saved, from its metadata or from the run's log.

    File times are not used, because copying a folder changes them. They are the last resort, which is printed.
    """
    folder = step_dir(run, step)
    records = [r for r in run_log.read(run) if (r["kind"], r["step"]) == ("checkpoint", step)]
    for source in (files.read_json(folder / "meta.json"), *reversed(records)):
        saved = source.get("time")
        if isinstance(saved, int | float) and math.isfinite(saved):
            return saved
    print(f"{folder}: neither its metadata nor the log says when it was saved; using the time of its files")
    return (folder / MANIFEST).stat().st_mtime


def _nothing_saved(stage: str, tag: str, preset: str) -> UserError:
    """Returns an error that lists the existing runs and the command to train the missing run."""
    others = [other for other in tags(stage) if other != tag]
    existing = f"choose one that exists with --model_tag ({', '.join(others)}), or " if others else ""
    name = f" --model_tag={tag}" if tag != preset else ""  # the command line adds the --config that the user gave
    if (REPOSITORY / "configs" / f"{tag}.toml").is_file():
        name = f" --config={tag}"
    command = f"run python -m scripts.train --stage={stage}{name}"
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
    print(f"model: {run.relative_to(base_dir())}, step {step} ({model_cfg.num_params / 1e6:,.1f}M parameters)")
    return TrainedModel(params, model_cfg, tokenizer, stage, run.name, step, run, meta)


def load_tokenizer(meta: dict, run: Path) -> "Tokenizer":
    """Returns the tokenizer that the run was trained with.

    This is either the current tokenizer or an older one that tok_train has moved aside. Raises UserError if neither of
    them has the hash in `meta`.
    """
    from nanochat_jax.tokenizer import Tokenizer

    wanted = meta["tokenizer"]
    for folder in (base_dir() / "tokenizer", base_dir() / f"tokenizer-{wanted[:8]}"):
        if folder.is_dir() and (tokenizer := Tokenizer.load(folder)).hash == wanted:
            return tokenizer
    raise UserError(f"{run} was trained with a tokenizer ({wanted[:8]}) that is not under {base_dir()}")
