"""Decides how a training run starts: where it is stored, what it starts from, and whether it resumes.

The first of these cases that applies decides how a run starts:

1. If the run has an undamaged checkpoint, the run resumes from the latest one. Resuming is refused if one of these has
   changed: the data (see `pins.py`), the parent's weights, or a setting outside `FREE`.
   Resuming is allowed if the parent no longer exists. If nothing that is compared here has changed and the run is
   finished, only a message is printed.
2. A new mid, sft or rl run starts from the weights of its parent, which is usually a run of the previous stage.
3. A new base run starts from random weights.
"""

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax import checkpoint, config, run_log, trained_model
from nanochat_jax.checkpoint import WeightsId
from nanochat_jax.config import GPTConfig, LaterStage, Train, UserError

# Settings that may change when a run resumes. They do not affect what the model learns, or something else is compared
# instead.
FREE = {
    "preset", "run", "model_tag", "resume", "device_type", "device_batch_size", "core_dir", "eval_every",
    "eval_tokens", "save_every", "keep_last", "keep_every", "core_metric_every", "core_metric_max_per_task",
    "sample_every", "eval_metrics_every", "eval_metrics_tasks", "eval_metrics_max_problems", "eval_examples",
    "eval_samples", "max_epochs",
    "dry_run", "mesh", "shard", "attention", "remat", "scan_layers", "coordinator", "num_processes", "process_id",
    "source_tag", "source_step",  # they name the parent; its weights are compared instead
    "task_files",  # it says where conversations come from; the conversations are compared instead
}  # fmt: skip

# Advice for a user whose settings do not match the run in the folder.
INSTEAD = "choose another --model_tag, or move the run aside with --resume=never"


Parent = tuple[Path, int]  # (the parent's folder, the step of the parent's checkpoint)


@dataclass(frozen=True)
class StartPlan:
    """How a run starts. Process 0 makes the plan and broadcasts it to the other processes."""

    tag: str  # name of the run's folder
    step: int | None  # the step of the checkpoint to resume from; None for a fresh start
    finished: bool  # whether `step` is the last step of a finished run
    parent_id: str  # identifies the parent's weights (see `checkpoint.WeightsId`); "" for base
    parent_dir: str | None = None  # the parent's folder; None for a base run, and for a run that resumes
    parent_step: int | None = None  # the step of the parent's checkpoint

    @property
    def parent(self) -> Parent | None:
        """The parent's folder and step. None for a base run, and for a run that resumes."""
        return (Path(self.parent_dir), self.parent_step) if self.parent_dir and self.parent_step is not None else None


def make_plan(cfg: Train, lock: ExitStack) -> StartPlan:
    """Decides how the run starts, and locks the run's folder. With --dry_run, the folder is not locked."""
    parent, refusal = None, None
    if isinstance(cfg, LaterStage):
        try:
            parent = _find_parent(cfg)
        except UserError as error:
            refusal = error  # a run can resume without its parent
    if not (tag := cfg.model_tag or cfg.preset):
        tag = f"d{cfg.depth}" if isinstance(cfg, config.Base) else parent[0].name if parent else ""
    if refusal and not tag:
        raise refusal
    folder = checkpoint.run_dir(cfg.stage, tag)
    if parent and parent[0] == folder:
        raise UserError(f"the run {folder} cannot start from itself: choose another --model_tag")
    if not cfg.dry_run:
        lock.enter_context(checkpoint.exclusive(folder))
        checkpoint.clear_unfinished(folder)
    step = _step_to_resume(cfg, folder)
    if step is not None:
        meta = checkpoint.read_meta(folder, step)
        if isinstance(cfg, LaterStage):
            cfg.check_shape(GPTConfig(**meta["model"]))
            if other := _other_parent(cfg, parent, meta["parent"]):
                raise UserError(f"{folder} holds a run started {other}")
        if changed := _changed_settings(cfg, meta["config"]):
            names = ", ".join(changed[:4])
            raise UserError(f"{folder} holds a run started with different settings ({names}): {INSTEAD}")
        finished = trained_model.finished_at(run_log.read(folder)) == step
        return StartPlan(tag, step, finished, parent_id=meta["parent"])
    if refusal:
        raise refusal
    if not isinstance(cfg, LaterStage):
        return StartPlan(tag, None, finished=False, parent_id="")
    assert parent is not None, f"stage {cfg.stage} has neither a parent nor a refusal"
    parent_dir, parent_step = parent
    cfg.check_shape(GPTConfig(**checkpoint.read_meta(parent_dir, parent_step)["model"]))
    parent_id = WeightsId.read(cfg.source, parent_dir, parent_step)
    return StartPlan(tag, None, False, str(parent_id), str(parent_dir), parent_step)


def _find_parent(cfg: LaterStage) -> Parent:
    """Returns the folder and step of the parent, a run of the stage `cfg.source`.

    The parent's name is the first of these that is given: --source_tag, --model_tag, the name of the preset. If none is
    given, the parent is the run that was saved last. If no run has the given name, raises UserError.
    """
    tag = cfg.source_tag or cfg.model_tag or cfg.preset
    existing = trained_model.tags(cfg.source)
    if tag and existing and tag not in existing:
        checkpoint.run_dir(cfg.source, tag)  # raises UserError if `tag` is not a valid name
        name = "source_tag" if cfg.source_tag else "model_tag" if cfg.model_tag else "config"
        there = ", ".join(existing)
        train = f", or run python -m scripts.train --stage={cfg.source} --{name}={tag} first"
        raise UserError(
            f"--{name}={tag}: stage {cfg.source} has no run of this name to start from: choose one with --source_tag "
            f"({there}){'' if cfg.source_tag else train}"
        )
    if not existing:
        raise _no_parent(cfg)
    return trained_model.find(cfg.source, tag, cfg.source_step, as_parent=True)


def _no_parent(cfg: LaterStage) -> UserError:
    """Returns an error for a source stage that has no run. It says which stages have runs, and what to train."""
    trained = {stage: tags for stage in config.STAGES if (tags := trained_model.tags(stage))}
    there = "; ".join(f"{stage}: {', '.join(tags)}" for stage, tags in trained.items()) or "none"
    name = f" --model_tag={cfg.model_tag}" if cfg.model_tag else ""
    # A stage that comes later, such as rl for sft, would need a run of this stage first.
    later = config.STAGES.index(cfg.source) >= config.STAGES.index(cfg.stage)
    advice = "choose another --source" if later else f"run python -m scripts.train --stage={cfg.source}{name} first"
    return UserError(f"stage {cfg.source} has no run to start from: {advice} (trained so far: {there})")


def _step_to_resume(cfg: Train, folder: Path) -> int | None:
    """Returns the step to resume from, or None for a fresh start."""
    if cfg.resume == "never":
        return None
    if cfg.resume in ("auto", "-1"):  # -1 is the default of the original's --resume_from_step
        return checkpoint.latest(folder)
    if not (cfg.resume.isascii() and cfg.resume.isdigit()):
        raise UserError(f"--resume={cfg.resume}: must be auto, never or a step")
    step = int(cfg.resume)
    if step not in (saved := checkpoint.steps(folder)):
        steps = ", ".join(map(str, saved)) or "none"
        raise UserError(f"--resume={step}: no checkpoint of this step in {folder}; available: {steps}")
    if damage := checkpoint.damage(checkpoint.step_dir(folder, step)):
        raise UserError(f"--resume={step}: {checkpoint.step_dir(folder, step)}: {damage}")
    return step


def _other_parent(cfg: LaterStage, parent: Parent | None, parent_id: str) -> str:
    """Returns "" if `cfg` asks for the parent that `parent_id` identifies. Else, returns text for an error message.

    Two parents are the same if they have the same weights, whatever their names are. If the parent no longer exists,
    the run can still resume. Then the weights cannot be compared, and only the name and the step that `cfg` gives are
    compared.
    """
    began, missing = WeightsId.parse(parent_id), ""
    if parent is not None:
        now = WeightsId.read(cfg.source, *parent)
        if began.digest == now.digest if began else str(now) == parent_id:
            return ""
    elif began is None:
        return ""
    else:
        step = cfg.source_step if cfg.source_step >= 0 else began.step
        now = began._replace(stage=cfg.source, tag=cfg.source_tag or began.tag, step=step)
        if now == began:
            return ""
        missing = ", which does not exist"
    if began is None:
        return f"from different weights: {INSTEAD}"
    # A parent that was trained again under the same name is gone, so naming it would not help.
    named = f"resume it with --source_tag={began.tag} --source_step={began.step}, " if now.where != began.where else ""
    return f"from different weights ({began.where}, now {now.where}{missing}): {named}{INSTEAD}"


def _changed_settings(cfg: Train, saved: dict) -> list[str]:
    """Returns the settings outside `FREE` that have changed, such as "matrix_lr: 0.02, now 0.03".

    If a setting did not exist when the run was saved, its default counts as the saved value. Saved settings that no
    longer exist are printed and ignored.
    """
    now, default = dataclasses.asdict(cfg), dataclasses.asdict(type(cfg)())
    if gone := sorted(saved.keys() - now.keys()):
        print(f"settings of this run that no longer exist are ignored: {', '.join(gone)}")
    free = FREE
    if isinstance(cfg, LaterStage):  # `LaterStage.check_shape` compares these settings
        free = FREE | {field.name for field in dataclasses.fields(config.ModelFlags)}
    names = [k for k in now if k not in free and now[k] != saved.get(k, default[k])]
    return [f"{k}: {saved.get(k, default[k])!r}, now {now[k]!r}" for k in names]
