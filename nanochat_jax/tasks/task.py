"""The interface of a task, which is a sequence of conversations and may also check answers.

A conversation is {"messages": [{"role", "content"}, ...]}, plus whatever else the task needs to check an answer. The
content of an assistant message is a string, or a list of parts {"type": "text" | "python" | "python_output", "text":
str}. Views (slices, repetitions) and mixtures are tasks too.
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
    has a val split besides train and test, for use during training and tuning. Most tasks have no val split; for these
    tasks, "val" means the test split. split: the split that these conversations belong to. It is set by `tasks.load`,
    and may be "" in a task that was made without it.
    """

    name: str = ""
    eval_type: str | None = None
    baseline: float = 0.0
    has_val: bool = False
    split: str = ""

    def __init__(self, split: str = "", data_dir: str | Path | None = None):
        """data_dir: folder with the data of downloaded tasks. A task that needs no data ignores it."""
        self.split = split

    def __len__(self) -> int:
        raise NotImplementedError

    def example(self, index: int) -> dict:
        """The conversation at 0 <= index < len(self)."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> dict: ...

    @overload
    def __getitem__(self, index: slice) -> "View": ...

    def __getitem__(self, index: int | slice) -> "dict | View":
        if isinstance(index, slice):  # slice.indices() clips a slice to the length, as for lists
            return View(self, range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a task with {len(self)} rows")
        return self.example(int(index) % len(self))

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Whether `completion`, the text of the assistant's answer, is right."""
        raise NotImplementedError(f"{self.name or type(self).__name__} is for training only")

    def reward(self, conversation: dict, completion: str) -> float:
        """1.0 for a right answer, else 0.0."""
        return float(self.evaluate(conversation, completion))


class View(Task):
    """Some rows of a task, in the order of `indices`."""

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
    """The first `count` rows of a task (0: all of them). If the task has fewer, its rows are repeated, in order.

    2 of [a, b, c] -> [a, b];  5 of [a, b, c] -> [a, b, c, a, b]
    """
    return task if count in (0, len(task)) else View(task, np.arange(count) % len(task))


class Mixture(Task):
    """The rows of several tasks, shuffled once. If a task is listed twice, each of its rows occurs twice.

    Each conversation gets a field "task": the index of the task that it comes from, which also checks the answer:

        Sums [s0, s1, s2], Identity [i0, i1] -> [i0, s1, s2, i1, s0] with "task" 1, 0, 0, 1, 0
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
        """Hashes up to 127 equally spaced conversations per task, to detect changed data without reading everything."""
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
