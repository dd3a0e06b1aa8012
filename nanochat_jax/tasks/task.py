"""The interface of a task. A task is a sequence of conversations; if it is for evaluation, it can check answers.

A conversation is a dict {"messages": [{"role": str, "content": ...}, ...]}. The task adds other keys if it needs them
to check an answer. The content of an assistant message is a string, or a list of parts {"type": "text" | "python" |
"python_output", "text": str}.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np


class Task:
    """Conversations by index. Subclasses define `__len__` and `example`, and `evaluate` if `eval_type` is set.

    eval_type: "generative" (generate an answer and check its text), "categorical" (compare the logits of the
    conversation's "letters"), or None (for training only). baseline: the score of guessing. has_val: whether the task
    has a val split, for evaluations during training and for choosing settings. Most tasks have no val split; for these
    tasks, "val" means the test split. split: the split of these conversations, as set by `tasks.load`. In a task that
    was made without `tasks.load`, it may be "".
    """

    name: str = ""
    eval_type: str | None = None
    baseline: float = 0.0
    has_val: bool = False
    split: str = ""

    def __init__(self, split: str = "", data_dir: str | Path | None = None):
        """`data_dir` is the folder with downloaded task data. A task that needs no data ignores `data_dir`."""
        self.split = split

    def __len__(self) -> int:
        raise NotImplementedError

    def example(self, index: int) -> dict:
        """Returns the conversation at `index`, which is from 0 to len(self) - 1."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> dict: ...

    @overload
    def __getitem__(self, index: slice) -> "View": ...

    def __getitem__(self, index: int | slice) -> "dict | View":
        if isinstance(index, slice):  # slice.indices() limits a slice to the length, as lists do
            return View(self, range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a task with {len(self)} rows")
        return self.example(int(index) % len(self))

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Returns whether `completion`, the text of the assistant's answer, is right."""
        raise NotImplementedError(f"{self.name or type(self).__name__} is for training only")

    def reward(self, conversation: dict, completion: str) -> float:
        """Returns 1.0 for a right answer, else 0.0."""
        return float(self.evaluate(conversation, completion))


class View(Task):
    """The rows of a task at `indices`, in that order. A row may be repeated."""

    def __init__(self, task: Task, indices: Sequence[int] | np.ndarray):
        self.task = task
        self.indices = indices
        self.name, self.eval_type, self.baseline = task.name, task.eval_type, task.baseline
        self.split = task.split

    def __len__(self) -> int:
        return len(self.indices)

    def example(self, index: int) -> dict:
        return self.task[int(self.indices[index])]

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return self.task.evaluate(conversation, completion)

    def reward(self, conversation: dict, completion: str) -> float:
        return self.task.reward(conversation, completion)


def first_rows(task: Task, count: int) -> Task:
    """Returns the first `count` rows of `task` (0: all rows). If `task` has fewer rows, they are repeated in order.

    For the rows [a, b, c], a count of 2 gives [a, b], and a count of 5 gives [a, b, c, a, b].
    """
    return task if count in (0, len(task)) else View(task, np.arange(count) % len(task))


class Mixture(Task):
    """The rows of several tasks, shuffled once. If a task is listed twice, its rows occur twice.

    The mixture adds a key "task" to each conversation: the index of the task that the conversation comes from.
    `evaluate` and `reward` call this task. For example, the rows [s0, s1, s2] of task 0 and [i0, i1] of task 1 become
    [i0, s1, s2, i1, s0], with the "task" values 1, 0, 0, 1, 0.
    """

    def __init__(self, tasks: Sequence[Task], seed: int = 42):
        self.tasks = list(tasks)
        self.name = "+".join(task.name for task in self.tasks)
        self.eval_type = "generative" if all(t.eval_type == "generative" for t in self.tasks) else None
        self.starts = np.cumsum([0] + [len(task) for task in self.tasks])
        self.order = list(range(self.starts[-1]))
        random.Random(seed).shuffle(self.order)

    def __len__(self) -> int:
        return len(self.order)

    def hash(self) -> str:
        """Returns a hash that detects changed data. It covers at most 127 equally spaced conversations per task,
        to save time."""
        digest = hashlib.sha256()
        for task in self.tasks:
            for index in range(0, len(task), max(1, len(task) // 64)):
                digest.update(json.dumps(task[index], sort_keys=True, default=str).encode())
        return digest.hexdigest()[:16]

    def example(self, index: int) -> dict:
        row = self.order[index]
        which = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.tasks[which][row - int(self.starts[which])] | {"task": which}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return self.tasks[conversation["task"]].evaluate(conversation, completion)

    def reward(self, conversation: dict, completion: str) -> float:
        return self.tasks[conversation["task"]].reward(conversation, completion)
