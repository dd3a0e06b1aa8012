"""Finds the runs that belong together for a report: a run, its ancestors and its descendants.

Every checkpoint of mid, sft and rl records the run's parent: the checkpoint from which the run started. A run that
records no parent belongs together with the runs of the same name.
"""

from dataclasses import dataclass, field
from pathlib import Path

from nanochat_jax import checkpoint, run_log, trained_model
from nanochat_jax.checkpoint import WeightsId
from nanochat_jax.config import STAGES
from nanochat_jax.files import read_json


@dataclass
class Lineage:
    """The runs of a report, at most one per stage."""

    runs: dict[str, Path] = field(default_factory=dict)  # stage -> folder of the run
    remarks: list[str] = field(default_factory=list)  # what a reader of the report has to know about the choice of runs


def find(tag: str = "") -> Lineage:
    """Returns the runs called `tag`. Without a tag, returns the run that was saved last, and its lineage.

    Raises UserError if the run that was saved last has copies, and the original is not known.
    """
    logged = {stage: _logged(stage) for stage in STAGES}
    lineage = Lineage()
    if tag:
        lineage.runs = {stage: run for stage, runs in logged.items() for run in runs if run.name == tag}
        for stage, run in lineage.runs.items():
            _check_parent(lineage, stage, run)
        return lineage
    times = {(stage, run): trained_model.saved_time(run) for stage, runs in logged.items() for run in runs}
    if not times:
        return lineage
    stage, latest = max(times, key=lambda key: times[key])
    copies = [run for run in logged[stage] if times[stage, run] == times[stage, latest]]  # `latest` is one of them
    lineage.runs[stage] = trained_model.last_saved(copies)
    _add_ancestors(lineage, stage, logged)
    _add_descendants(lineage, stage, logged)
    lineage.runs = {stage: lineage.runs[stage] for stage in STAGES if stage in lineage.runs}
    for stage, run in lineage.runs.items():
        _check_parent(lineage, stage, run)
    chosen = lineage.runs.values()
    if others := [f"{stage} {run.name}" for stage in STAGES for run in logged[stage] if run not in chosen]:
        lineage.remarks.append(f"Runs of other lineages are left out ({', '.join(others)}): --model_tag reports them.")
    return lineage


def _logged(stage: str) -> list[Path]:
    """The stage's runs that have a log, in the order of their names. Runs that were moved aside are left out."""
    root = checkpoint.run_dir(stage, "")
    return sorted(path.parent for path in root.glob(f"*/{run_log.LOG}") if path.parent.name[0] != ".")


def parent_of(run: Path) -> WeightsId | None:
    """Returns the parent that a run records in its last checkpoint or else in config.json, or None."""
    recorded = [read_json(checkpoint.step_dir(run, step) / "meta.json") for step in checkpoint.steps(run)[-1:]]
    for source in (*recorded, read_json(run / "config.json")):
        if parent := WeightsId.parse(source.get("parent")):
            return parent
    return None


def _add_ancestors(lineage: Lineage, stage: str, logged: dict[str, list[Path]]) -> None:
    """Adds the parent of the stage's run, the parent's parent, and so on.

    If a run does not record its parent, the parent is the run of the same name in the nearest earlier stage.
    """
    while stage != STAGES[0]:
        run = lineage.runs[stage]
        parent = parent_of(run)
        earlier = [(before, run.name) for before in reversed(STAGES[: STAGES.index(stage)])]
        places = [(parent.stage, parent.tag)] if parent else earlier
        found = [(before, each) for before, tag in places for each in logged.get(before, []) if each.name == tag]
        if not found or found[0][0] in lineage.runs:
            return
        stage, parent_run = found[0]
        lineage.runs[stage] = parent_run


def _add_descendants(lineage: Lineage, stage: str, logged: dict[str, list[Path]]) -> None:
    """Adds one run of each later stage: the run that was saved last of those that belong to the lineage."""

    def belongs(run: Path) -> bool:
        parent = parent_of(run)
        if parent is None:
            return any(run.name == other.name for other in lineage.runs.values())
        return parent.stage in lineage.runs and lineage.runs[parent.stage].name == parent.tag

    for later in STAGES[STAGES.index(stage) + 1 :]:
        if runs := [run for run in logged[later] if belongs(run)]:
            lineage.runs[later] = trained_model.last_saved(runs)


def _check_parent(lineage: Lineage, stage: str, run: Path) -> None:
    """Adds a remark if the run's parent is not in the report, or was trained again after the run started from it."""
    parent = parent_of(run)
    if parent is None:
        return
    shown = lineage.runs.get(parent.stage)
    name = f"{stage} {run.name} started from {parent.where}"
    if shown is None or shown.name != parent.tag:
        lineage.remarks.append(f"{name}, which is not in this report.")
    elif parent.step in checkpoint.steps(shown) and WeightsId.read(parent.stage, shown, parent.step) != parent:
        lineage.remarks.append(f"{name}, but {parent.stage} {parent.tag} was trained again after that.")
