"""Tasks: conversations to train on, and problems to evaluate a model on, behind one small interface.

`load` takes the name of a task ("GSM8K"), a split (train, val or test) and, for local data, a folder. It returns a
`Task`, which is a sequence of conversations. If the task has a score, its `evaluate` checks answers. Downloaded tasks
read the Hugging Face hub or a local folder. Generated tasks read no data: the task, the split and an index determine a
conversation.

    task = tasks.load("GSM8K", "test", rows=100)
    task[0]["messages"]; task.evaluate(task[0], "... #### 18")

To add a task, write a subclass of `Task` in a new file in this folder. Give the subclass a `name`, a `__len__`, and an
`example` that returns the conversation at an index. If the task reads stored rows, write a subclass of
`task_data.RowTask` instead, with a `name`, its `rows`, and a `conversation` that converts one row. Then add the class
to `_CLASSES` below. The task's name, in any letter case, then works in every --mixture. To give the task a score, set
`eval_type` and `baseline`, and define `evaluate`, which says whether an answer is right. Tasks with a score work in
chat_eval -a. The result of `example` must depend only on the split, the index and the data: a checkpoint records a hash
of the tasks that it was trained on, and a run is not resumed if its tasks have changed.
"""

from pathlib import Path

from nanochat_jax.config import UserError
from nanochat_jax.tasks.arc import ARCChallenge, ARCEasy
from nanochat_jax.tasks.arithmetic import Sums, TwoStep
from nanochat_jax.tasks.customjson import CustomJSON
from nanochat_jax.tasks.generated_choice import GeneratedChoice
from nanochat_jax.tasks.gsm8k import GSM8K
from nanochat_jax.tasks.humaneval import HumanEval
from nanochat_jax.tasks.identity import Identity
from nanochat_jax.tasks.mmlu import MMLU
from nanochat_jax.tasks.smoltalk import SmolTalk
from nanochat_jax.tasks.spellingbee import SimpleSpelling, SpellingBee
from nanochat_jax.tasks.task import Mixture, Task, View, first_rows

__all__ = ["TASKS", "Mixture", "Task", "View", "first_rows", "load", "mixture", "task_class"]

_CLASSES: tuple[type[Task], ...] = (
    MMLU,
    ARCEasy,
    ARCChallenge,
    GSM8K,
    HumanEval,
    SmolTalk,
    SpellingBee,
    SimpleSpelling,
    Identity,
    CustomJSON,
    Sums,
    TwoStep,
    GeneratedChoice,
)
TASKS = {cls.name.lower(): cls for cls in _CLASSES}


def task_class(name: str) -> type[Task]:
    """Returns the class of the task `name`, such as "ARC-Easy" or "customjson:my.jsonl", in any letter case.

    Raises UserError, listing the known names, if there is no such task.
    """
    cls = TASKS.get(name.partition(":")[0].strip().lower())
    if cls is None:
        raise UserError(f"unknown task {name!r}: must be one of {', '.join(c.name for c in TASKS.values())}")
    return cls


def load(name: str, split: str, *, data_dir: str | Path | None = None, rows: int = 0) -> Task:
    """Returns the `split` of a task: "train", "test" or "val" (the test split if the task has no val split).

    data_dir: folder with the data of downloaded tasks, used instead of the hub. rows: how many rows to take (0: all);
    if the task has fewer rows, its rows are repeated. Raises UserError if the data is missing or empty.
    """
    if split not in ("train", "val", "test"):
        raise UserError(f"split {split!r} of {name}: must be train, val or test")
    if rows < 0:
        raise UserError(f"{name}={rows}: the number of rows must be 0 (all) or more")
    cls = task_class(name)
    if split == "val" and not cls.has_val:
        split = "test"
    if cls is CustomJSON:
        path = name.partition(":")[2]
        if not path:
            raise UserError("customjson needs a file: customjson:PATH")
        task = CustomJSON(path)
    else:
        task = cls(split, data_dir or None)
    task.split = split
    return first_rows(task, rows)


def mixture(counts: dict[str, int], split: str, data_dir: str | Path | None = None, seed: int = 42) -> Mixture:
    """Returns a mixture of the tasks in `counts`, which is {name: rows} (see `load`), shuffled by `seed`."""
    if not counts:
        raise UserError("an empty mixture: name at least one task, as name=rows")
    return Mixture([load(name, split, data_dir=data_dir, rows=n) for name, n in counts.items()], seed)
