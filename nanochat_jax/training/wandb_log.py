"""The run's log on Weights & Biases, for those who want it there too."""

import os
from pathlib import Path

from nanochat_jax import files
from nanochat_jax.run_log import LOG

WANDB_ID = "wandb_id"


class Wandb:
    """A run on wandb, where one is asked for and wandb is installed; otherwise nothing. Its id is kept in the run's
    folder, so that a run that goes on is one run there too. For process 0 alone."""

    def __init__(self, run_dir: Path, stage: str, name: str, config: dict):
        self.run = None
        name = name or os.environ.get("WANDB_RUN", "")
        if name in ("", "dummy"):
            return
        try:
            import wandb
        except ImportError:
            print(f"wandb is not installed: run {name!r} is logged to {LOG} alone (pip install wandb)")
            return
        project = "nanochat" if stage == "base" else f"nanochat-{stage}"
        kept = run_dir / WANDB_ID
        known = kept.read_text(encoding="utf-8").strip() if kept.exists() else None
        # Settings that change nothing may differ after a resume, hence allow_val_change.
        self.run = wandb.init(
            project=project, name=name, id=known, resume="allow", config=config, allow_val_change=True
        )
        files.write_text(kept, self.run.id)

    def log(self, step: int, **fields) -> None:
        if self.run:
            self.run.log({"step": step} | fields)

    def finish(self) -> None:
        if self.run:
            self.run.finish()
