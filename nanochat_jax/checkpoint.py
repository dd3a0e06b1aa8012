"""Checkpoints: save, restore, find. Nothing else touches Orbax.

A run lives in <base>/<stage>_checkpoints/<tag>, with a folder a step:

    step_000250/params, optimizer    Orbax items; params can be restored alone
    step_000250/data.json, meta.json the data pipeline's position; step, configuration, versions, metrics so far
    step_000250/manifest.json        SHA-256 of every file above, written last

There is no state of random numbers to save: all are drawn from the seed, which is a setting, and the step or the epoch.

The manifest is the completion marker: a folder without it was being written when the process ended, and one whose
files do not match it is damaged. Orbax alone loads a flipped bit without a word, hence the hashes. Either is passed
over, with a line that says so, and the step before it is used.
"""

import contextlib
import errno
import itertools
import json
import os
import shutil
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_jax import files
from nanochat_jax.config import REPOSITORY, STAGES, GPTConfig, UserError, base_dir
from nanochat_jax.parallel import processes

if TYPE_CHECKING:
    from nanochat_jax.tokenizer import Tokenizer

MANIFEST = "manifest.json"
UNDER_WAY, COMPLETE, FAILED = range(3)  # how far a process is with its part of a save


def run_dir(stage: str, tag: str) -> Path:
    """The folder of the run called `tag`. UserError for a name that leads elsewhere, or to what was moved aside."""
    if "/" in tag or os.sep in tag or tag.startswith("."):
        raise UserError(f"--model_tag={tag}: must be a name, without / and not beginning with a dot")
    return base_dir() / f"{stage}_checkpoints" / tag


def step_dir(run: Path, step: int) -> Path:
    return run / f"step_{step:06d}"


# -----------------------------------------------------------------------------
# Saving


class Saver:
    """Writes checkpoints of one run in the background and keeps the last few, and for good those of every
    `keep_every`-th step (-1: none). One save at a time is under way.

    Of several processes each writes its arrays, the first one the rest. All call `save` and `wait` at the same point:
    there a save that has failed on one of them ends all. Until then only that one knows: `failed` is to be told.
    """

    def __init__(self, run: Path, keep_last: int, keep_every: int = -1, process: int = 0, processes: int = 1):
        self.run, self.keep_last, self.keep_every = run, keep_last, keep_every
        self.first, self.together = process == 0, processes > 1
        self._thread: threading.Thread | None = None
        self._target: Path | None = None  # the folder it writes
        self._error: BaseException | None = None

    def save(self, step: int, params, opt_state, data: dict, meta: dict) -> None:
        """Returns once the arrays are copied from the devices, so that the caller may donate them to the next step."""
        from orbax.checkpoint import v1 as ocp

        self.wait()
        target = self._target = step_dir(self.run, step)
        # What is there is torn, damaged or from before a resume: it does not count.
        processes.broadcast_from_0(lambda: shutil.rmtree(target) if target.exists() else None)
        meta = json.dumps(meta, indent=1)  # now: the caller goes on changing what it holds
        try:
            writing = ocp.save_checkpointables_async(target.resolve(), {"params": params, "optimizer": opt_state})
        except OSError as error:  # no room even for its folder
            self._give_up(error)
            return self.check()
        self._thread = threading.Thread(target=self._finish, args=(writing, target, data, meta), name="checkpoint")
        self._thread.start()

    def _finish(self, writing, target: Path, data: dict, meta: str) -> None:
        try:
            writing.result()
            if not self.first:
                return
            files.write_text(target / "data.json", json.dumps(data))
            files.write_text(target / "meta.json", meta)
            _write_manifest(target)
            self._prune(int(target.name.removeprefix("step_")))
        except BaseException as error:
            self._give_up(error)

    def _prune(self, saved: int) -> None:
        """Removes steps before the one just saved, as far as they are not to be kept."""
        earlier = [step for step in steps(self.run) if step < saved]
        for old in earlier[: max(0, len(earlier) + 1 - self.keep_last)]:
            if self.keep_every < 1 or old % self.keep_every:
                (step_dir(self.run, old) / MANIFEST).unlink()  # first: what is left after a kill is incomplete
                shutil.rmtree(step_dir(self.run, old))

    def _give_up(self, error: BaseException) -> None:
        """Keeps the error for `wait`, and makes room, unless other processes may be writing there."""
        self._error = error
        if not self.together:
            self._make_room()

    def _make_room(self) -> None:
        """Removes what was written of a step: it is of no use."""
        for folder in self.run.glob(f"{self._target.name}*"):  # Orbax's own temporary one too
            if not (folder / MANIFEST).exists():
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def failed(self) -> bool:
        """Whether a save has failed on this process, and nobody has been told."""
        return self._error is not None

    def check(self) -> None:
        """The error of a save that has failed meanwhile, as `wait` raises it; does not wait for one under way. Of
        several processes none may go alone: there it does nothing."""
        if not self.together and not (self._thread and self._thread.is_alive()):
            self.join()

    def wait(self) -> None:
        """Until the save under way is complete, on all processes. Where it has failed, a UserError on each of them."""
        if self.together:
            self._wait_together()
        self.join()

    def join(self) -> None:
        """Until this process has done its part of the save under way. Its error, if it had one, as a UserError."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            reason = self._reason(error)
            raise UserError(f"could not save a checkpoint in {self.run} ({reason}); {self._last()}") from error

    def _wait_together(self) -> None:
        while UNDER_WAY in (states := processes.all_gather(self._state())) and FAILED not in states:
            if self._thread:
                self._thread.join(0.1)
        if FAILED not in states:
            return
        error = self._error
        # The thread may wait up to 20 minutes for what another process should have done.
        processes.disconnect()
        if self._thread:
            self._thread.join()
        self._thread, self._error = None, error
        if self.first:
            self._make_room()
        if error is None:
            raise UserError(f"another process could not save a checkpoint in {self.run}; {self._last()}")

    def _state(self) -> int:
        if self._thread and self._thread.is_alive():
            return UNDER_WAY
        return FAILED if self._error else COMPLETE

    def _last(self) -> str:
        kept = steps(self.run)
        return f"the last good checkpoint is step {kept[-1]}" if kept else "there is no earlier checkpoint"

    def _reason(self, error: BaseException) -> str:
        said = str(error).strip() or type(error).__name__
        if os.strerror(errno.ENOSPC) not in said and os.strerror(errno.EDQUOT) not in said:
            return said.splitlines()[0]
        free = f"{shutil.disk_usage(self.run).free / 1e6:,.0f} MB free"
        kept = steps(self.run)
        size = sum(p.stat().st_size for p in step_dir(self.run, kept[-1]).rglob("*")) if kept else 0
        return f"the disk is full: {free}" + (f", the last one takes {size / 1e6:,.0f} MB" if size else "")


def _write_manifest(folder: Path) -> None:
    hashes = {str(p.relative_to(folder)): files.sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    files.write_text(folder / MANIFEST, json.dumps(hashes, indent=1))


# -----------------------------------------------------------------------------
# Finding and restoring


def steps(run: Path) -> list[int]:
    """Steps whose saving was completed, ascending."""
    return sorted(int(p.parent.name.removeprefix("step_")) for p in run.glob(f"step_*/{MANIFEST}"))


def damage(folder: Path, without: tuple[str, ...] = ()) -> str | None:
    """What is wrong with a step's folder, None if its files are those that were saved. Those whose names begin with
    one of `without` are not looked at."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "half-written"
    except ValueError:
        return f"{MANIFEST} is damaged"
    for name, digest in manifest.items():
        if name.startswith(without):
            continue
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if files.sha256(path) != digest:
            return f"{name} is damaged"
    return None


def latest(run: Path, without: tuple[str, ...] = ()) -> int | None:
    """The newest step that verifies, None if there is none. Says which ones it passes over and why."""
    torn = [p for p in run.glob("step_*") if not (p / MANIFEST).exists()]
    for path in torn:
        print(f"ignoring {path}: half-written")
    for step in reversed(steps(run)):
        wrong = damage(step_dir(run, step), without)
        if wrong is None:
            return step
        print(f"ignoring {step_dir(run, step)}: {wrong}; trying the one before it")
    return None


def read_meta(run: Path, step: int) -> dict:
    return json.loads((step_dir(run, step) / "meta.json").read_text(encoding="utf-8"))


def restore(run: Path, step: int, params, opt_state):
    """(params, opt_state, data, meta) of a step, with the shardings and dtypes of the trees given."""
    from orbax.checkpoint import v1 as ocp

    folder = step_dir(run, step)
    _check_shapes(folder, params=params, optimizer=opt_state)
    items = ocp.load_checkpointables(folder.resolve(), {"params": params, "optimizer": opt_state})
    data = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    return items["params"], items["optimizer"], data, read_meta(run, step)


def restore_params(run: Path, step: int, params):
    """The parameters alone, like the tree given (arrays or ShapeDtypeStructs with shardings)."""
    from orbax.checkpoint import v1 as ocp

    _check_shapes(step_dir(run, step), params=params)
    return ocp.load_checkpointables(step_dir(run, step).resolve(), {"params": params})["params"]


def _check_shapes(folder: Path, **wanted) -> None:
    """UserError where the arrays of a checkpoint are not those of the trees; Orbax's own complaint is pages long."""
    import jax
    from orbax.checkpoint import v1 as ocp

    def shapes(tree) -> dict[str, tuple]:
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
        # By names alone: Orbax gives back dicts where there were named tuples.
        return {"/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path): leaf.shape
                for path, leaf in leaves}  # fmt: skip

    found = ocp.checkpointables_metadata(folder.resolve()).metadata
    for item, tree in wanted.items():
        there, here = shapes(found[item]), shapes(tree)
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                told = [str(shape[name]) if name in shape else "missing" for shape in (there, here)]
                raise UserError(
                    f"{folder} is of a model of another shape: {item}/{name} is {told[0]} there and {told[1]} here; "
                    "choose another --model_tag"
                )


def exclusive(run: Path) -> contextlib.AbstractContextManager[None]:
    """Holds the run's lock file: a second process training the same run is refused."""
    return files.exclusive(run, f"another process is training {run}: end it, or choose another --model_tag")


def clear_unfinished(run: Path) -> None:
    """Removes what a process that was killed while saving has left. Needs the run's lock: so nobody is saving now."""
    for folder in run.glob("step_*"):  # Orbax's own temporary folders among them
        if not (folder / MANIFEST).exists():
            shutil.rmtree(folder)
            print(f"removed {folder}: half-written")
    for part in run.glob("*.part"):
        part.unlink()


def abandon_after(run: Path, step: int) -> None:
    """Renames the checkpoints after `step`: the run goes on from there, and they are of another future."""
    for folder in run.glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            print(f"moved {folder.name} to {_set_aside(folder, f'abandoned_{folder.name}')}")


def move_aside(run: Path) -> None:
    """Renames a run's folder out of the way; nothing is deleted."""
    if run.exists():
        print(f"moved the old run to {_set_aside(run, f'.{run.name}')}")


def _set_aside(folder: Path, name: str) -> Path:
    """Renames a folder to `name` and the time, and a number where that has been taken within the same second."""
    stamp = f"{name}.{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([stamp], (f"{stamp}.{i}" for i in itertools.count(2)))
    aside = next(path for path in map(folder.with_name, names) if not path.exists())
    os.replace(folder, aside)
    return aside


# -----------------------------------------------------------------------------
# Models


@dataclass(frozen=True)
class TrainedModel:
    """A trained model: float32 parameters on one device, its shape, its tokenizer, and where it came from."""

    params: dict
    model_cfg: GPTConfig
    tokenizer: "Tokenizer"
    stage: str
    tag: str
    step: int
    run_dir: Path
    meta: dict

    @property
    def name(self) -> str:
        return f"nanochat-{self.tag}-{self.stage}"


def find(stage: str, tag: str = "", step: int = -1) -> tuple[Path, int]:
    """Folder and step of a checkpoint. No tag: the most recently saved run of the stage; no step: the latest good."""
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}: must be one of {', '.join(STAGES)}")
    run = run_dir(stage, tag)
    if not tag:
        if not (saved := _saved(stage)):
            raise _nothing_saved(stage, tag)
        run = max(saved, key=lambda p: p.stat().st_mtime).parents[1]
    for_training = ("optimizer/", "data.json")
    if step >= 0:
        if step not in steps(run):
            there = ", ".join(map(str, steps(run))) or "none"
            raise UserError(f"no checkpoint of step {step} in {run}; there are: {there}")
        if wrong := damage(step_dir(run, step), for_training):
            raise UserError(f"{step_dir(run, step)}: {wrong}")
        return run, step
    found = latest(run, for_training)
    if found is None:
        raise _nothing_saved(stage, tag)
    return run, found


def _saved(stage: str) -> list[Path]:
    """The manifests of all checkpoints of a stage, but for runs that were moved aside."""
    return [p for p in run_dir(stage, "").glob(f"*/step_*/{MANIFEST}") if not p.parents[1].name.startswith(".")]


def _nothing_saved(stage: str, tag: str) -> UserError:
    """Names the runs there are, and the command that makes the one that is missing."""
    others = sorted({p.parents[1].name for p in _saved(stage)} - {tag})
    there = f"there is {', '.join(others)}; or " if others else ""
    preset = f" --config={tag}" if (REPOSITORY / "configs" / f"{tag}.toml").is_file() else ""
    command = f"run python -m scripts.train --stage={stage}{preset}"
    return UserError(f"no {stage} checkpoint under {run_dir(stage, tag)}: {there}{command}")


def load_model(stage: str, tag: str = "", step: int = -1) -> TrainedModel:
    """Finds a checkpoint, verifies it, and loads its parameters onto the first device. Prints the choice."""
    import jax

    from nanochat_jax.model import gpt

    if jax.process_count() > 1:
        raise UserError("a model is evaluated and talked to in one process, on all devices of one host: start one task")
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
    """The tokenizer the run was trained with: the present one, or an older one that tok_train has moved aside."""
    from nanochat_jax.tokenizer import Tokenizer

    wanted = meta["tokenizer"]
    for folder in (base_dir() / "tokenizer", base_dir() / f"tokenizer-{wanted[:8]}"):
        if folder.is_dir() and (tokenizer := Tokenizer.load(folder)).hash == wanted:
            return tokenizer
    raise UserError(f"{run} was trained with a tokenizer ({wanted[:8]}) that is not under {base_dir()}")


def model_meta(model_cfg: GPTConfig) -> dict:
    """The entry of meta.json that `load_model` builds the GPTConfig from."""
    return {"model": asdict(model_cfg)}
