"""Decides how a training run starts: where it is stored, what it starts from, and whether it resumes.

The first of these four cases that applies decides how a run starts:

1. If the run is finished, only a message is printed.
2. If the run has an undamaged checkpoint, the run resumes from the latest one. Resuming is refused if the data
   (`stages.pin_text`, `stages.pin_tasks`), the parent's weights or a setting outside `FREE` has changed. Resuming is
   allowed if the parent no longer exists.
3. A new mid, sft or rl run starts from the weights of its parent, a run of another stage.
4. A new base run starts from random weights.
"""

import dataclasses
import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax import checkpoint, config, run_log, trained_model
from nanochat_jax.config import Train, UserError

# Settings that may change when a run resumes, because they do not affect what the model learns.
FREE = {
    "preset", "run", "model_tag", "resume", "device_type", "device_batch_size", "core_dir", "eval_every",
    "eval_tokens", "save_every", "keep_last", "keep_every", "core_metric_every", "core_metric_max_per_task",
    "sample_every", "eval_metrics_every", "eval_metrics_tasks", "eval_metrics_max_problems", "eval_examples",
    "eval_samples",
    "mesh", "shard", "attention", "remat", "scan_layers", "coordinator", "num_processes", "process_id",
}  # fmt: skip

# Advice to a user whose settings do not match the run in the folder.
INSTEAD = "choose another --model_tag, or move the run aside with --resume=never"


Parent = tuple[Path, int]  # (the parent's folder, the step of the parent's checkpoint)
LaterStage = config.Mid | config.Sft | config.Rl  # the stages that start from a parent


@dataclass(frozen=True)
class StartPlan:
    """How a run starts. Process 0 makes the plan and broadcasts it to the other processes."""

    tag: str  # name of the run's folder
    step: int | None  # the step of the checkpoint to resume from; None for a fresh start
    finished: bool  # whether `step` is the last step of a finished run
    parent_id: str  # identifies the parent's weights (see `_identify`); "" for base
    parent_dir: str | None = None  # the parent's folder; None for base or if the run resumes
    parent_step: int | None = None  # the step of the parent's checkpoint

    @property
    def parent(self) -> Parent | None:
        """The parent's folder and step, or None for base or if the run resumes."""
        return (Path(self.parent_dir), self.parent_step) if self.parent_dir and self.parent_step is not None else None


def make_plan(cfg: Train, lock: ExitStack) -> StartPlan:
    """Decides how the run starts, and locks its folder."""
    tag = cfg.model_tag or cfg.preset or _default_tag(cfg)
    folder = checkpoint.run_dir(cfg.stage, tag)
    lock.enter_context(checkpoint.exclusive(folder))
    checkpoint.clear_unfinished(folder)
    step = _step_to_resume(cfg, folder)
    if step is not None:
        meta = checkpoint.read_meta(folder, step)
        _check_same_run(cfg, folder, meta)
        return StartPlan(tag, step, finished=_is_finished(folder, step), parent_id=meta["parent"])
    parent = _find_parent(cfg)
    if parent is None:
        return StartPlan(tag, None, finished=False, parent_id="")
    parent_dir, parent_step = parent
    return StartPlan(tag, None, False, _identify(cfg, parent), str(parent_dir), parent_step)


def _default_tag(cfg: Train) -> str:
    """Returns the tag of a run without --model_tag and without a preset.

    A base run of depth 20 gets the tag "d20". A run of a later stage gets its parent's tag.
    """
    if isinstance(cfg, config.Base):
        return f"d{cfg.depth}"
    parent = _find_parent(cfg)
    assert parent is not None, f"stage {cfg.stage} has no parent"
    return parent[0].name


def _find_parent(cfg: Train) -> Parent | None:
    """Returns the folder and step of the parent, or None for base.

    If --model_tag names a run of the stage `cfg.source`, that run is the parent. Otherwise, the parent is the run that
    the preset names. Without a preset, the parent is the stage's latest run.
    """
    if not isinstance(cfg, LaterStage):
        return None
    if cfg.model_tag and checkpoint.steps(checkpoint.run_dir(cfg.source, cfg.model_tag)):
        return trained_model.find(cfg.source, cfg.model_tag)
    return trained_model.find(cfg.source, cfg.preset)


def _identify(cfg: Train, parent: Parent | None) -> str:
    """Returns a string that identifies the parent's weights, or "" without a parent.

    Example: "base d20 step 21400 0123456789abcdef", which ends with a hash of the checkpoint's manifest.
    """
    if parent is None or not isinstance(cfg, LaterStage):
        return ""
    parent_dir, step = parent
    manifest = (checkpoint.step_dir(parent_dir, step) / checkpoint.MANIFEST).read_bytes()
    return f"{cfg.source} {parent_dir.name} step {step} {hashlib.sha256(manifest).hexdigest()[:16]}"


def _step_to_resume(cfg: Train, folder: Path) -> int | None:
    """Returns the step to resume from, or None for a fresh start."""
    if cfg.resume == "never":
        return None
    if cfg.resume == "auto":
        return checkpoint.latest(folder)
    if not cfg.resume.isdigit():
        raise UserError(f"--resume={cfg.resume}: must be auto, never or a step")
    step = int(cfg.resume)
    if step not in (saved := checkpoint.steps(folder)):
        steps = ", ".join(map(str, saved)) or "none"
        raise UserError(f"--resume={step}: no checkpoint of this step in {folder}; available: {steps}")
    if damage := checkpoint.damage(checkpoint.step_dir(folder, step)):
        raise UserError(f"--resume={step}: {checkpoint.step_dir(folder, step)}: {damage}")
    return step


def _check_same_run(cfg: Train, folder: Path, meta: dict) -> None:
    """Raises UserError if the run in `folder` does not match `cfg`."""
    difference = "from different weights" if _parent_differs(cfg, meta["parent"]) else ""
    if changed := _changed_settings(cfg, meta["config"]):
        difference = f"with different settings ({', '.join(changed[:4])})"
    if difference:
        raise UserError(f"{folder} holds a run started {difference}: {INSTEAD}")


def _parent_differs(cfg: Train, parent_id: str) -> bool:
    """Whether the parent's weights differ from those that `parent_id` identifies.

    If the parent no longer exists, returns False, so that the run can still resume.
    """
    try:
        return _identify(cfg, _find_parent(cfg)) != parent_id
    except UserError:
        return False


def _changed_settings(cfg: Train, saved: dict) -> list[str]:
    """Returns the settings outside `FREE` that have changed, such as "matrix_lr: 0.02, now 0.03".

    If a setting did not exist when the run was saved, its default counts as the saved value. Saved settings that no
    longer exist are printed and ignored.
    """
    now, default = dataclasses.asdict(cfg), dataclasses.asdict(type(cfg)())
    if gone := sorted(saved.keys() - now.keys()):
        print(f"settings of this run that no longer exist are ignored: {', '.join(gone)}")
    names = [k for k in now if k not in FREE and now[k] != saved.get(k, default[k])]
    return [f"{k}: {saved.get(k, default[k])!r}, now {now[k]!r}" for k in names]


def _is_finished(folder: Path, step: int) -> bool:
    notes = [r for r in run_log.read(folder) if r["kind"] == "note" and r.get("text") == "finished"]
    return any(r["step"] == step for r in notes)
