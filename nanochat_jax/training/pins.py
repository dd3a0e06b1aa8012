"""Pins a run to what it began with: its text or conversations, so that a resumed run reads the same, and its rows."""

import dataclasses
import re
from pathlib import Path

from nanochat_jax import checkpoint, tasks
from nanochat_jax.config import UserError
from nanochat_jax.data import sources
from nanochat_jax.training.batch_shape import BatchShape
from nanochat_jax.training.run import Run
from nanochat_jax.training.start_plan import INSTEAD


def pin_text(run: Run, source: sources.Source) -> sources.Source:
    """Records which text the run trains on. The record is saved in the run's checkpoints.

    A run that resumes reads the files that it began with. Files that were added later are left out, because they would
    change the order of the files. Raises UserError if one of the run's files is missing, or if the checkpoint was
    trained on another text.
    """
    text = {"source": source.name, "hash": source.hash, "validation": source.val_hash()}
    train_files = source.train_files
    if run.data is not None:
        folder = checkpoint.step_dir(run.dir, run.step)
        saved = checkpoint.read_meta(run.dir, run.step).get("text", text)
        if changed := ", ".join(key for key in text if text[key] != saved.get(key)):
            raise UserError(f"the text is not the one that {folder} was trained on (different {changed}): {INSTEAD}")
        train_files = _files_of_run(source, saved, folder)
    names = [path.name for path in train_files]
    run.origin["text"] = text | {"files": len(names), "names": names, "data_dir": str(source.folder or "")}
    return dataclasses.replace(source, train_files=train_files)


def _files_of_run(source: sources.Source, saved: dict, folder: Path) -> tuple[Path, ...]:
    """Returns the training files that the checkpoint in `folder` recorded as `saved`. Raises UserError if one is
    missing.

    Shards that are still downloading are not missing. Early versions recorded only the number of files.
    """
    names, here = saved.get("names"), {path.name: path for path in source.train_files}
    if names is None:
        count = wanted = saved.get("files", len(source.train_files))
        files = source.train_files[:count]
        lost = f"only {len(files)} are here" if len(files) < count else ""
    else:
        beside = source.train_files[0].parent  # holds shards that were copied by hand, if fewer were requested later
        files = tuple(here.get(name, beside / name) for name in names)
        gone = [path.name for path in files if path.name not in here and not path.exists()]
        lost = f"{gone[0]} is not here" if len(gone) == 1 else f"{len(gone)} of them are not here" if gone else ""
        # A download of N shards fetches those with the numbers 0 to N-1.
        count, wanted = len(files), max((int(n) + 1 for name in gone for n in re.findall(r"\d+", name)), default=0)
    if lost:
        raise UserError(
            f"{folder} was trained on {count} files of {source.name}, but {lost}: get all of them with "
            f"python -m nanochat_jax.dataset --data={source.name} -n {wanted}"
        )
    return files


def pin_tasks(run: Run, task: tasks.Mixture) -> None:
    """Records which conversations the run trains on. The record is saved in the run's checkpoints.

    The record contains the name and size of each task, and a hash of some conversations. The tasks are recorded in the
    order of the mixture, because the shuffle depends on this order. Raises UserError if the run resumes from a
    checkpoint that was trained on other conversations.
    """
    conversations = {"rows": [[part.name, len(part)] for part in task.tasks], "hash": task.hash()}
    if run.data is not None:
        saved = checkpoint.read_meta(run.dir, run.step).get("tasks", conversations)
        if saved != conversations:
            changed = "mixture" if saved["rows"] != conversations["rows"] else "content"
            folder = checkpoint.step_dir(run.dir, run.step)
            raise UserError(
                f"the conversations are not the ones that {folder} was trained on (different {changed}): {INSTEAD}"
            )
    run.origin["tasks"] = conversations


def pin_rows(run: Run, shape: BatchShape) -> None:
    """Records how many rows a replica computes at once. The record is saved in the run's checkpoints.

    A run that resumes without --device_batch_size computes as many (see `batch_trial.choose_rows`).
    """
    run.origin["rows"] = shape.rows
