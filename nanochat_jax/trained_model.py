"""Finds the checkpoint of a trained model, and loads the model for evaluation and chat."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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


def find(stage: str, tag: str = "", step: int = -1) -> tuple[Path, int]:
    """Finds a checkpoint, and returns (the folder of its run, its step).

    Without a tag, chooses the stage's most recently saved run. Without a step, chooses the run's latest undamaged
    checkpoint. Raises UserError if no checkpoint is found, or if the checkpoint of the given step is damaged.
    """
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}: must be one of {', '.join(STAGES)}")
    run = run_dir(stage, tag)
    if not tag:
        if not (saved := _saved(stage)):
            raise _nothing_saved(stage, tag)
        run = max(saved, key=lambda p: p.stat().st_mtime).parents[1]
    only_for_training = ("optimizer/", "data.json")
    if step >= 0:
        if step not in steps(run):
            existing = ", ".join(map(str, steps(run))) or "none"
            raise UserError(f"no checkpoint of step {step} in {run}; available: {existing}")
        if problem := damage(step_dir(run, step), only_for_training):
            raise UserError(f"{step_dir(run, step)}: {problem}")
        return run, step
    newest = latest(run, only_for_training)
    if newest is None:
        raise _nothing_saved(stage, tag)
    return run, newest


def _saved(stage: str) -> list[Path]:
    """The manifests of a stage's checkpoints, except those in runs that were moved aside."""
    return [p for p in run_dir(stage, "").glob(f"*/step_*/{MANIFEST}") if not p.parents[1].name.startswith(".")]


def _nothing_saved(stage: str, tag: str) -> UserError:
    """Returns an error that lists the existing runs and the command to train the missing run."""
    others = sorted({p.parents[1].name for p in _saved(stage)} - {tag})
    existing = f"choose one that exists ({', '.join(others)}), or " if others else ""
    preset = f" --config={tag}" if (REPOSITORY / "configs" / f"{tag}.toml").is_file() else ""
    command = f"run python -m scripts.train --stage={stage}{preset}"
    return UserError(f"no {stage} checkpoint under {run_dir(stage, tag)}: {existing}{command}")


def load(stage: str, tag: str = "", step: int = -1) -> TrainedModel:
    """Finds and verifies a checkpoint, and loads its parameters onto the first device."""
    import jax

    from nanochat_jax.model import gpt

    if jax.process_count() > 1:
        raise UserError("evaluation and chat run in one process, on all devices of one host: start a single process")
    run, step = find(stage, tag, step)
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
