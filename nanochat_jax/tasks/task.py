"""The interface of a task. A task is a sequence of conversations. A task for evaluation can also check answers.

A conversation is a dict {"messages": [{"role": str, "content": ...}, ...]}. A task may add other keys that it needs to
check an answer. The content of a message is a string. In an assistant message, it can also be a list of parts
{"type": str, "text": str}. The type of a part is "text", "python" or "python_output".
"""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np


class Task:
    """A sequence of conversations. Subclasses define `__len__` and `example`, and `evaluate` if they set `eval_type`.

    eval_type: how an answer is checked. "generative": the model generates an answer, and `evaluate` checks its text.
        "categorical": the logits of the conversation's "letters" are compared. None: the task is for training only.
    baseline: the score of guessing.
    has_val: whether the task has a val split, for evaluations during training and for choosing settings. For a
        task without one, "val" means the test split.
    suggestions: questions to suggest to a person who talks to a model that has learned this task. They are worded like
        the training questions. A task has none if nobody would type its questions, as with multiple choice.
    split: the split of these conversations. `tasks.load` sets it. Without `tasks.load`, it may be "".
    """

    name: str = ""
    eval_type: str | None = None
    baseline: float = 0.0
    has_val: bool = False
    suggestions: tuple[str, ...] = ()
    split: str = ""

    def __init__(self, split: str = "", data_dir: str | Path | None = None):
        """`data_dir` is the folder with task data. A task that reads no data ignores it."""
        self.split = split

    def __len__(self) -> int:
        raise NotImplementedError

    def example(self, index: int) -> dict:
        """Returns the conversation at `index`, a number from 0 to len(self) - 1."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> dict: ...

    @overload
    def __getitem__(self, index: slice) -> "View": ...

    def __getitem__(self, index: int | slice) -> "dict | View":
        if isinstance(index, slice):  # slice.indices() clips a slice to the length, as a list does
            return View(self, range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a task with {len(self)} rows")
        return self.example(int(index) % len(self))

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Whether `completion`, the text of an answer, is right."""
        raise NotImplementedError(f"{self.name or type(self).__name__} is for training only")

    def reward(self, conversation: dict, completion: str) -> float:
        """Returns the reward in reinforcement learning: 1.0 for a right answer, else 0.0.

        A subclass may reward more answers than `evaluate` accepts, such as a right number in another format.
        """
        return float(self.evaluate(conversation, completion))


class View(Task):
    """The rows of `task` at `indices`, in that order. An index may occur more than once."""

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
    """Returns the first `count` rows of `task`, or all rows if `count` is 0. Repeats rows if `task` has too few.

    For the rows [a, b, c], a count of 2 gives [a, b], and a count of 5 gives [a, b, c, a, b].
    """
    return task if count in (0, len(task)) else View(task, np.arange(count) % len(task))


class Mixture(Task):
    """The rows of several tasks in one random order. If a task is listed twice, its rows occur twice.

    If `seed` is None, the rows are not shuffled: the tasks stay in order, one after the other.

    Each conversation gets a key "task", which holds the index of its task in `tasks`. `evaluate` and `reward` call the
    methods of that task. For example, task 0 has the rows [s0, s1, s2], and task 1 has the rows [i0, i1]. Their mixture
    may be [i0, s1, s2, i1, s0], with the "task" values 1, 0, 0, 1, 0.
    """

    def __init__(self, tasks: Sequence[Task], seed: int | None = 42):
        self.tasks = list(tasks)
        self.name = "+".join(task.name for task in self.tasks)
        self.eval_type = "generative" if all(t.eval_type == "generative" for t in self.tasks) else None
        self.starts = np.cumsum([0] + [len(task) for task in self.tasks])
        self.order = list(range(self.starts[-1]))
        if seed is not None:
            random.Random(seed).shuffle(self.order)

    def __len__(self) -> int:
        return len(self.order)

    def describe(self) -> str:
        """Describes the tasks: their names, their numbers of rows, and which of them use the test split.

        Example: "SmolTalk 24,229 (test split), Sums 200".
        """
        return ", ".join(
            f"{task.name} {len(task):,}" + (" (test split)" if task.split == "test" else "") for task in self.tasks
        )

    def hash(self) -> str:
        """Returns a hash that detects changed data.

        To save time, the hash covers at most 127 equally spaced conversations per task.
        """
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
