"""Copies the run's log to Weights & Biases, for users who also want it there."""

import os
from pathlib import Path

from nanochat_jax import files
from nanochat_jax.run_log import LOG

WANDB_ID = "wandb_id"


class Wandb:
    """A run on wandb if one is asked for and wandb is installed, else a stand-in that does nothing.

    The wandb id is kept in the run's folder, so that a resumed run continues its run on wandb. For process 0 only.
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
        # allow_val_change: settings that do not change what is computed may differ after a resume.
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
