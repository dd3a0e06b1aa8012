"""Copies a run's log to Weights & Biases if the user asks for it."""

import os
from pathlib import Path

from nanochat_jax import files
from nanochat_jax.run_log import LOG

WANDB_ID = "wandb_id"


class Wandb:
    """A run on wandb. If no run name is given or wandb is not installed, the methods do nothing.

    The wandb id is kept in the run's folder, so that a resumed run continues the same wandb run. Only process 0 uses
    this class.
    """

    def __init__(self, run_dir: Path, stage: str, name: str, config: dict):
        self.run = None
        name = name or os.environ.get("WANDB_RUN", "")
        if name in ("", "dummy"):
            return
        try:
            import wandb  # ty: ignore[import-not-found]  # optional
        except ImportError:
            print(f"wandb is not installed: run {name!r} is logged to {LOG} only (pip install wandb)")
            return
        project = "nanochat" if stage == "base" else f"nanochat-{stage}"
        id_file = run_dir / WANDB_ID
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        # allow_val_change is set because a resumed run may have new values for the settings in `start_plan.FREE`.
        self.run = wandb.init(
            project=project, name=name, id=run_id, resume="allow", config=config, allow_val_change=True
        )
        files.write_text(id_file, self.run.id)

    def log(self, step: int, **fields) -> None:
        if self.run:
            self.run.log({"step": step} | fields)

    def finish(self) -> None:
        if self.run:
            self.run.finish()
