"""Checks that the user's own validation conversations are not trained on."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from nanochat_jax import config, tasks
from nanochat_jax.config import UserError
from nanochat_jax.files import copies
from nanochat_jax.tasks.identity import Identity

HOLD_OUT = "hold out some conversations in another file"


def check_held_out(cfg: config.Mid | config.Sft, is_new: bool = True) -> None:
    """Raises UserError if a file of the user's own conversations is both in --mixture and in --val_mixture, under the
    same name or as a copy.

    Copies are accepted if the run is not new. Early versions did not compare contents, and a run cannot change its
    mixtures.
    """
    trained = {tasks.key(name): name for name in cfg.mixture}
    for name in cfg.val_mixture:
        if tasks.task_class(name) is not tasks.CustomJSON:
            continue
        if tasks.key(name) in trained:
            raise UserError(f"--val_mixture: {name} is also in --mixture: {HOLD_OUT}")
        for other in cfg.mixture:
            if not is_new or tasks.task_class(other) is not tasks.CustomJSON:
                continue
            if copies([_file_of(name)], [_file_of(other)]):
                raise UserError(f"--val_mixture: {name} is a copy of {other}, which is in --mixture: {HOLD_OUT}")


def _file_of(name: str) -> Path:
    """customjson:~/mine.jsonl -> /home/me/mine.jsonl."""
    return config.user_path(name.partition(":")[2])


def check_overlap(task: tasks.Mixture, held_out: tasks.Mixture, is_new: bool = True) -> None:
    """Prints how many of the user's own validation conversations are also trained on. Raises UserError if all are, and
    the run is new.

    Conversations are compared with those of customjson and identity. The other tasks have their own splits.
    """
    own = [part for part in held_out.tasks if part.name == tasks.CustomJSON.name]
    if not own:
        return
    trained = {
        _digest(c) for part in task.tasks if part.name in (tasks.CustomJSON.name, Identity.name) for c in _rows(part)
    }
    seen = [_digest(c) in trained for part in own for c in _rows(part)]
    if seen and all(seen) and is_new:
        raise UserError(f"--val_mixture: all {len(seen):,} of your own conversations are also in --mixture: {HOLD_OUT}")
    if any(seen):
        many = f"{sum(seen):,} of {len(seen):,} of your own conversations"
        print(f"--val_mixture: {many} are also in --mixture: {HOLD_OUT}", flush=True)


def _rows(task: tasks.Task) -> Iterator[dict]:
    return (task[i] for i in range(len(task)))


def _digest(conversation: dict) -> bytes:
    return hashlib.sha256(json.dumps(conversation["messages"], sort_keys=True).encode()).digest()
