"""Folders that look like saved runs but hold no weights, for tests that only find and choose runs."""

import dataclasses
import json
from pathlib import Path

from nanochat_jax import checkpoint, run_log
from nanochat_jax.config import TRAINING, GPTConfig

MODEL = GPTConfig(n_layer=4, n_head=4, n_kv_head=4, n_embd=256, vocab_size=4096, sequence_len=256)


def save(stage: str, tag: str, step: int = 10, time: float | None = None, parent: str = "", **settings) -> Path:
    """Adds a checkpoint to a run, and returns the run's folder. `time` is recorded in the checkpoint's metadata."""
    run = checkpoint.run_dir(stage, tag)
    folder = checkpoint.step_dir(run, step)
    folder.mkdir(parents=True)
    config = dataclasses.asdict(TRAINING[stage](**settings))
    meta = checkpoint.model_meta(MODEL) | {"stage": stage, "step": step, "parent": parent, "config": config}
    (folder / "meta.json").write_text(json.dumps(meta if time is None else meta | {"time": time}))
    checkpoint._write_manifest(folder)
    (run / "config.json").write_text(json.dumps(config | {"tag": tag, "parent": parent}))
    run_log.append(run, "config", stage, 0)
    return run


def weights_id(stage: str, tag: str, step: int = 10) -> str:
    """What a run that starts from this checkpoint records as its parent."""
    return str(checkpoint.WeightsId.read(stage, checkpoint.run_dir(stage, tag), step))
