"""Saves, verifies and restores checkpoints. No other module uses Orbax.

The folder of a run is <base>/<stage>_checkpoints/<tag>. It contains one folder per saved step:

    step_000250/params, optimizer    Orbax items; params can be restored without optimizer
    step_000250/data.json            the data pipeline's position
    step_000250/meta.json            the step, the configuration, the versions of packages, the metrics so far
    step_000250/manifest.json        the SHA-256 of every file above; the manifest is written last

The state of random generators is not saved, because all random numbers are derived from the seed (a setting) and from
the step or the epoch.

The name of a step's folder is `step_` and at least six ASCII digits. Users may keep other files and folders beside it,
such as step_000250-hf or step_000250.bak. This module never reads, moves or removes them.

A checkpoint is complete once it has a manifest. A step's folder without a manifest is half-written, because the process
ended during the save. A checkpoint is damaged if its files do not match its manifest. The manifest holds hashes
because Orbax does not notice a flipped bit in a file. `latest` skips half-written and damaged checkpoints, and prints a
line for each.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import threading
import time
from dataclasses import asdict
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nanochat_jax import files
from nanochat_jax.config import GPTConfig, UserError, base_dir, first_line
from nanochat_jax.parallel import processes

if TYPE_CHECKING:
    from orbax.checkpoint import v1 as ocp

MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step_([0-9]{6}|[1-9][0-9]{6,})")  # matches only names that `step_dir` returns
ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax writes to a folder with this suffix, then renames the folder
PyTree = Any  # nested containers of arrays, or of ShapeDtypeStructs with shardings


class SaveState(IntEnum):
    """The progress of a save on one process. The values are integers, so that processes can all-gather them."""

    UNDER_WAY = 0
    COMPLETE = 1
    FAILED = 2


def run_dir(stage: str, tag: str) -> Path:
    """The folder of the run called `tag`.

    Raises UserError if `tag` contains a slash or begins with a dot. A leading dot marks a run that was moved aside.
    """
    if "/" in tag or os.sep in tag or tag.startswith("."):
        raise UserError(f"--model_tag={tag}: must be a name without / that does not begin with a dot")
    return base_dir() / f"{stage}_checkpoints" / tag


def step_dir(run: Path, step: int) -> Path:
    """The folder of a step, such as <run>/step_000250 for step 250."""
    return run / f"step_{step:06d}"


def step_folders(run: Path) -> dict[int, Path]:
    """Returns {step: folder} for all steps, complete or half-written, in ascending order.

    Raises UserError if the run's folder cannot be read.
    """
    try:
        names = [entry.name for entry in run.iterdir() if entry.is_dir()] if run.is_dir() else []
    except OSError as error:
        raise UserError(f"{run} cannot be read ({error.strerror}): make it readable") from None
    found = {int(match[1]): run / match[0] for match in map(STEP_NAME.fullmatch, names) if match}
    return dict(sorted(found.items()))


# -----------------------------------------------------------------------------
# Saving


class WeightsId(NamedTuple):
    """Identifies the weights of a checkpoint. A run records its parent's WeightsId as a string."""

    stage: str
    tag: str
    step: int
    digest: str  # the first 16 hexadecimal digits of the SHA-256 of the checkpoint's manifest

    @classmethod
    def read(cls, stage: str, run: Path, step: int) -> "WeightsId":
        """Identifies the weights of a saved checkpoint."""
        manifest = (step_dir(run, step) / MANIFEST).read_bytes()
        return cls(stage, run.name, step, hashlib.sha256(manifest).hexdigest()[:16])

    @classmethod
    def latest(cls, stage: str, run: Path) -> "WeightsId":
        """Identifies the weights of the last complete checkpoint. Raises UserError if there is none.

        Unlike `checkpoint.latest`, does not read the weights, so a damaged checkpoint is not noticed.
        """
        if saved := steps(run):
            return cls.read(stage, run, saved[-1])
        raise UserError(f"{run} has no complete checkpoint")

    @classmethod
    def parse(cls, text: object) -> "WeightsId | None":
        """Converts str(weights_id) back to a WeightsId. Returns None for anything else."""
        match = re.fullmatch(r"(\w+) (.+) step ([0-9]+) ([0-9a-f]+)", text) if isinstance(text, str) else None
        return cls(match[1], match[2], int(match[3]), match[4]) if match else None

    def __str__(self) -> str:
        """Example: "base d20 step 21400 0123456789abcdef"."""
        return f"{self.where} {self.digest}"

    @property
    def where(self) -> str:
        """The checkpoint without its hash, such as "base d20 step 21400"."""
        return f"{self.stage} {self.tag} step {self.step}"


class Saver:
    """Writes the checkpoints of one run in the background, one at a time.

    Keeps the most recent checkpoints, and removes older ones. `keep_last` is the number of checkpoints to keep. Also
    keeps every checkpoint whose step is a multiple of `keep_every`, unless `keep_every` is -1.

    With several processes, each process writes its own shards of the arrays, and only process 0 writes the other files.
    All processes must call `save` and `wait_all` at the same points of the program. If a save fails on one process, the
    next `save` or `wait_all` raises UserError on all processes. Until then, only the failing process knows of the
    failure. If `failed` is true, the caller must therefore tell the other processes to stop.
    """

    def __init__(self, run: Path, keep_last: int, keep_every: int = -1, process_index: int = 0, process_count: int = 1):
        self.run, self.keep_last, self.keep_every = run, keep_last, keep_every
        self.is_process_0, self.multi_process = process_index == 0, process_count > 1
        self._thread: threading.Thread | None = None
        self._target: Path | None = None  # the folder of the current or last save
        self._error: BaseException | None = None

    def save(self, step: int, params: PyTree, opt_state: PyTree, data: dict, meta: dict) -> None:
        """Waits for the previous save, then starts a new one.

        Raises UserError if the previous save failed, or if the new save cannot start. When this method returns, the
        arrays have been copied from the devices. The caller may then donate them to the next step.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait_all()
        target = self._target = step_dir(self.run, step)
        processes.broadcast_from_0(lambda: _make_way(target))
        meta_text = json.dumps(meta, indent=1)  # encoded now, because the caller may change `meta` during the save
        try:
            writing = ocp.save_checkpointables_async(str(target.resolve()), {"params": params, "optimizer": opt_state})
        except OSError as error:  # for example, the disk is too full to create the folder
            self._record_failure(error)
            return self.raise_if_failed()
        args = writing, target, data, meta_text
        self._thread = threading.Thread(target=self._finish, args=args, name="checkpoint")
        self._thread.start()

    def _finish(self, writing: "ocp.AsyncResponse[None]", target: Path, data: dict, meta_text: str) -> None:
        """Waits until the arrays are written, then writes the other files. The manifest is written last. `save`
        runs this method in a thread."""
        try:
            writing.result()
            if not self.is_process_0:
                return
            files.write_text(target / "data.json", json.dumps(data))
            files.write_text(target / "meta.json", meta_text)
            _write_manifest(target)
            self._remove_old(int(target.name.removeprefix("step_")))
        except BaseException as error:
            self._record_failure(error)

    def _remove_old(self, saved: int) -> None:
        """Removes checkpoints before step `saved`, except those that `keep_last` and `keep_every` protect."""
        # If a step's folder is a link, the user has moved the checkpoint to another place. Such checkpoints are kept.
        earlier = [step for step in steps(self.run) if step < saved and not step_dir(self.run, step).is_symlink()]
        for old in earlier[: max(0, len(earlier) + 1 - self.keep_last)]:
            if self.keep_every < 1 or old % self.keep_every:
                # The manifest is removed first. If the process is killed after that, the folder counts as half-written.
                (step_dir(self.run, old) / MANIFEST).unlink()
                shutil.rmtree(step_dir(self.run, old))

    def _record_failure(self, error: BaseException) -> None:
        """Stores the error, so that the next `wait_local` raises a UserError.

        With a single process, also removes the failed checkpoint. With several processes, leaves it, because another
        process may still be writing to it.
        """
        self._error = error
        if not self.multi_process:
            self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """Removes the failed checkpoint: its folder and Orbax's temporary folder, unless they have a manifest."""
        assert self._target is not None, "no save was started"
        for folder in (self._target, _temporary(self._target)):
            if not (folder / MANIFEST).exists():
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def failed(self) -> bool:
        """Whether a save has failed on this process, and its error has not been raised yet."""
        return self._error is not None

    def raise_if_failed(self) -> None:
        """Raises UserError if a save has failed. Does not wait for a running save.

        With several processes, does nothing, because all processes must stop together.
        """
        if not self.multi_process and not (self._thread and self._thread.is_alive()):
            self.wait_local()

    def wait_all(self) -> None:
        """Waits until the save is complete on all processes. If it fails on one process, all raise UserError."""
        if self.multi_process:
            self._wait_for_other_processes()
        self.wait_local()

    def wait_local(self) -> None:
        """Waits until this process has done its part of the save. Raises UserError if this part failed."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            reason = self._describe(error)
            raise UserError(f"could not save a checkpoint in {self.run} ({reason}); {last_good(self.run)}") from error

    def _wait_for_other_processes(self) -> None:
        """Waits until the save is complete on all processes, or has failed on at least one.

        Raises UserError if the save failed on another process but not on this one.
        """
        states = processes.all_gather(self._state())
        while SaveState.UNDER_WAY in states and SaveState.FAILED not in states:
            if self._thread:
                self._thread.join(0.1)
            states = processes.all_gather(self._state())
        if SaveState.FAILED not in states:
            return
        error = self._error
        # The saving thread may wait for another process for up to 20 minutes. Disconnecting ends this wait.
        processes.disconnect()
        if self._thread:
            self._thread.join()
        self._thread, self._error = None, error
        if self.is_process_0:
            self._remove_unfinished()
        if error is None:
            raise UserError(f"another process could not save a checkpoint in {self.run}; {last_good(self.run)}")

    def _state(self) -> SaveState:
        if self._thread and self._thread.is_alive():
            return SaveState.UNDER_WAY
        return SaveState.FAILED if self._error else SaveState.COMPLETE

    def _describe(self, error: BaseException) -> str:
        """Describes an error in one line. If the disk is full, the line includes the free space."""
        message = str(error)
        if os.strerror(errno.ENOSPC) not in message and os.strerror(errno.EDQUOT) not in message:
            return first_line(error)
        free = f"{shutil.disk_usage(self.run).free / 1e6:,.0f} MB free"
        kept = steps(self.run)
        size = sum(p.stat().st_size for p in step_dir(self.run, kept[-1]).rglob("*")) if kept else 0
        return f"the disk is full: {free}" + (f", the last checkpoint takes {size / 1e6:,.0f} MB" if size else "")


def _make_way(target: Path) -> None:
    """Makes the path `target` free for a new checkpoint. Removes a half-written folder, but renames a complete one."""
    if (target / MANIFEST).exists() or target.is_symlink():
        print(f"moved {target.name} to {_set_aside(target, f'abandoned_{target.name}')}")
    elif target.exists():
        shutil.rmtree(target)


def _temporary(folder: Path) -> Path:
    """The temporary folder that Orbax writes to. When the save is done, Orbax renames this folder to `folder`."""
    return folder.with_name(folder.name + ORBAX_TEMPORARY)


def _write_manifest(folder: Path) -> None:
    hashes = {str(p.relative_to(folder)): files.sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    files.write_text(folder / MANIFEST, json.dumps(hashes, indent=1))


# -----------------------------------------------------------------------------
# Finding and restoring


def steps(run: Path) -> list[int]:
    """The steps that have a complete checkpoint, in ascending order."""
    return [step for step, folder in step_folders(run).items() if (folder / MANIFEST).exists()]


def last_good(run: Path) -> str:
    """Returns the end of an error message, which names the last complete checkpoint."""
    kept = steps(run)
    return f"the last good checkpoint is step {kept[-1]}" if kept else "there is no earlier checkpoint"


def damage(folder: Path, without: tuple[str, ...] = ()) -> str | None:
    """Returns what is wrong with a step's folder, or None if its files match the manifest.

    Does not check files whose names begin with one of the prefixes in `without`.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "half-written"
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        return f"{MANIFEST} is damaged"
    if not isinstance(manifest, dict):
        return f"{MANIFEST} is damaged"
    for name, digest in manifest.items():
        if name.startswith(without):
            continue
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            if files.sha256(path) != digest:
                return f"{name} is damaged"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def latest(run: Path, without: tuple[str, ...] = ()) -> int | None:
    """Returns the last step with an undamaged checkpoint, or None. Prints which checkpoints it skips, and why.

    `without` has the same meaning as in `damage`.
    """
    for folder in step_folders(run).values():
        if not (folder / MANIFEST).exists():
            print(f"ignoring {folder}: half-written")
    for step in reversed(steps(run)):
        problem = damage(step_dir(run, step), without)
        if problem is None:
            return step
        print(f"ignoring {step_dir(run, step)}: {problem}; trying the checkpoint before it")
    return None


def read_meta(run: Path, step: int) -> dict:
    """The contents of a step's meta.json."""
    return json.loads((step_dir(run, step) / "meta.json").read_text(encoding="utf-8"))


def model_meta(model_cfg: GPTConfig) -> dict:
    """Returns the part of meta.json that describes the model. `trained_model.load` reads it."""
    return {"model": asdict(model_cfg)}


def restore(run: Path, step: int, params: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree, dict, dict]:
    """Returns (params, opt_state, data, meta) of a step.

    The arrays get the shardings and dtypes of the arguments `params` and `opt_state`. Raises UserError if the arrays
    in the checkpoint have other shapes than the arguments.
    """
    from orbax.checkpoint import v1 as ocp

    folder = step_dir(run, step)
    _check_shapes(folder, params=params, optimizer=opt_state)
    items = ocp.load_checkpointables(str(folder.resolve()), {"params": params, "optimizer": opt_state})
    data = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    return items["params"], items["optimizer"], data, read_meta(run, step)


def restore_params(run: Path, step: int, params: PyTree) -> PyTree:
    """Returns only the parameters of a step, with the shardings and dtypes of the argument `params`.

    Raises UserError if the arrays in the checkpoint have other shapes than the argument.
    """
    from orbax.checkpoint import v1 as ocp

    _check_shapes(step_dir(run, step), params=params)
    return ocp.load_checkpointables(str(step_dir(run, step).resolve()), {"params": params})["params"]


def _check_shapes(folder: Path, **wanted: PyTree) -> None:
    """Raises UserError if the arrays in a checkpoint have other shapes than the `wanted` trees.

    Without this check, Orbax would raise an error with a message of several pages.
    """
    import jax
    from orbax.checkpoint import v1 as ocp

    def shapes(tree: PyTree) -> dict[str, tuple]:
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
        # The paths of leaves are compared as strings, because Orbax returns dicts in place of named tuples.
        return {
            "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path): leaf.shape
            for path, leaf in leaves
        }

    metadata = ocp.checkpointables_metadata(str(folder.resolve())).metadata
    for item, tree in wanted.items():
        saved, expected = shapes(metadata[item]), shapes(tree)
        for name in sorted(saved.keys() | expected.keys()):
            if saved.get(name) != expected.get(name):
                there, here = saved.get(name, "missing"), expected.get(name, "missing")
                raise UserError(
                    f"{folder} holds a model of another shape: {item}/{name} is {there} there, but {here} here; "
                    "choose another --model_tag"
                )


def exclusive(run: Path) -> contextlib.AbstractContextManager[None]:
    """Holds the run's lock file, so that no other process can train this run."""
    return files.exclusive(run, f"another process is training {run}: end it, or choose another --model_tag")


def clear_unfinished(run: Path) -> None:
    """Removes the half-written checkpoints and files of a killed process.

    The caller must hold the run's lock. The lock ensures that no other process is saving.
    """
    half_written = [folder for folder in step_folders(run).values() if not (folder / MANIFEST).exists()]
    temporary = [path for path in run.glob(f"*{ORBAX_TEMPORARY}") if STEP_NAME.fullmatch(path.stem)]
    for folder in half_written + temporary:
        if not folder.is_symlink():
            shutil.rmtree(folder)
            print(f"removed {folder}: half-written")
    for name in ("config.json", "wandb_id"):
        files.remove_parts(run / name)


def abandon_after(run: Path, step: int) -> None:
    """Renames all checkpoints after `step`, because a run that resumes from `step` will save these steps again."""
    for later, folder in step_folders(run).items():
        if later > step:
            print(f"moved {folder.name} to {_set_aside(folder, f'abandoned_{folder.name}')}")


def move_aside(run: Path) -> None:
    """Renames a run's folder, so that a new run can use the old name. Nothing is deleted."""
    if run.exists():
        print(f"moved the old run to {_set_aside(run, f'.{run.name}')}")


def _set_aside(folder: Path, name: str) -> Path:
    """Renames a folder to `name` plus the current time, and returns its new path.

    If the new name is already taken, also adds a number to it.
    """
    stamp = f"{name}.{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([stamp], (f"{stamp}.{i}" for i in itertools.count(2)))
    aside = next(path for path in map(folder.with_name, names) if not path.exists())
    os.replace(folder, aside)
    return aside
