"""Copies a run's log to Weights & Biases if the user asks for it. Errors of wandb never end a run."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat_jax import files
from nanochat_jax.config import first_line
from nanochat_jax.run_log import LOG

WANDB_ID = "wandb_id"
PATIENCE = 60  # seconds that wandb gets to send the rest of the log at the end of a run


class Wandb:
    """A run on wandb. If no run name is given, or wandb does not work, the methods do nothing.

    The wandb id is kept in the run's folder, so that a resumed run continues the same wandb run. Only process 0 uses
    this class.
    """

    def __init__(self, run_dir: Path, stage: str, name: str, config: dict):
        self.run: Any = None
        self.name = name or os.environ.get("WANDB_RUN", "")
        if self.name not in ("", "dummy"):
            self._attempt(lambda: self._init(run_dir, stage, config))

    def _init(self, run_dir: Path, stage: str, config: dict) -> None:
        import wandb  # ty: ignore[import-not-found]  # optional

        # Without the package, Python may import a folder called wandb, such as the one in which wandb keeps its files.
        if not hasattr(wandb, "init"):
            raise ModuleNotFoundError("No module named 'wandb'", name="wandb")
        project = "nanochat" if stage == "base" else f"nanochat-{stage}"
        id_file = run_dir / WANDB_ID
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        # allow_val_change is set because a resumed run may have new values for the settings in `start_plan.FREE`.
        self.run = wandb.init(
            project=project, name=self.name, id=run_id, resume="allow", config=config, allow_val_change=True
        )
        files.write_text(id_file, self.run.id)

    def log(self, step: int, **fields) -> None:
        if self.run:
            self._attempt(lambda: self.run.log({"step": step} | fields))

    def finish(self) -> None:
        """Waits until wandb has sent everything, but not longer than PATIENCE seconds."""
        if not self.run:
            return
        thread = threading.Thread(target=lambda: self._attempt(self.run.finish), daemon=True)
        thread.start()
        thread.join(PATIENCE)
        if thread.is_alive():
            self._give_up(f"it has not finished after {PATIENCE} s")

    def _attempt(self, call: Callable[[], Any]) -> None:
        """Calls wandb. If the call fails, prints one line and does not call wandb again."""
        try:
            call()
        except Exception as error:  # wandb raises many kinds of errors, even at import
            missing = isinstance(error, ModuleNotFoundError) and error.name == "wandb"
            self._give_up("not installed (pip install wandb)" if missing else first_line(error))

    def _give_up(self, reason: str) -> None:
        self.run = None
        print(f"wandb: {reason}: run {self.name!r} goes on, logged to {LOG} only", flush=True)


# The names that the original nanochat gives to our numbers: {stage: {our name: original name}}. Each number is logged
# under both names, so that dashboards made for either project show the run.
_LOOP = {"train/lr_mult": "train/lrm", "train/tok_per_s": "train/tok_per_sec", "core/core": "core_metric"}
ORIGINAL_NAMES = {
    "base": _LOOP,
    "mid": _LOOP,
    "sft": {"train/loss": "train_loss", "train/lr_mult": "lrm", "train/counted": "num_tokens"},
    "rl": {"train/reward": "reward", "train/sequence_length": "sequence_length", "train/lr_mult": "lrm"},
}


def numbers(stage: str, kind: str, fields: dict[str, Any], totals: dict[str, float]) -> dict[str, float]:
    """Returns the numbers of a log record under our names and under those of the original nanochat.

    `totals` holds the seconds, tokens and FLOPs that the run has spent so far.
    """
    ours = {f"{kind}/{name}": value for name, value in fields.items() if isinstance(value, int | float)}
    if kind == "eval" and "score" in fields:  # add the task to the names: several tasks are evaluated at one step
        task = str(fields["task"])
        ours = {f"eval/{task}/{name.removeprefix('eval/')}": value for name, value in ours.items()}
        ours[task.lower().replace("-", "_") + "_acc"] = fields["score"]
    names = ORIGINAL_NAMES[stage]
    theirs: dict[str, Any] = {names[name]: value for name, value in ours.items() if name in names}
    if "centered" in fields:  # CORE's centered score of each task
        theirs["centered_results"] = fields["centered"]
    if stage == "rl" and kind == "val":
        theirs |= {name: value for name, value in fields.items() if name.startswith("pass@")}
    if kind in ("train", "val", "core"):
        theirs |= {"total_training_flops": totals["flops"], "total_training_time": totals["seconds"]}
    return ours | theirs
