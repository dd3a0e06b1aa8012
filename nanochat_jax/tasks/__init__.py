"""Tasks: conversations to train on, and problems to evaluate a model on, behind one small interface.

`load` returns a `Task`, which is a sequence of conversations. If the task has a score, its `evaluate` method checks an
answer. Downloaded tasks, such as GSM8K, read their data from the Hugging Face hub or a local folder. Generated tasks,
such as Sums, compute each conversation from its split and its index.

    task = tasks.load("GSM8K", "test", rows=100)
    task[0]["messages"]; task.evaluate(task[0], "... #### 18")

To add a task, write a subclass of `Task` in a new file in this folder. The class needs a `name`, a `__len__`, and an
`example` method that returns the conversation at an index. If the data is stored in rows, write a subclass of
`task_data.RowTask` instead. This class needs a `name`, its `rows`, and a `conversation` method that converts one row.
Add the class to `_CLASSES` below. After that, --mixture accepts the task's name, in any letter case. To give the task a
score, also set `eval_type` and `baseline`, and define `evaluate`. Then chat_eval -a accepts the task too.

To have chat_cli and the web page suggest questions from the task, also set `suggestions`.

For the same split, index and data, `example` must always return the same conversation. A checkpoint records a hash of
the run's conversations, and the run resumes only if this hash is unchanged.

Besides one file per task, this folder has:

    task.py              the interface of a task, and mixtures of tasks
    task_data.py         reads rows from a local folder or the Hugging Face hub
    multiple_choice.py   the prompt format of multiple-choice tasks
    chat_folder.py       which files of a folder of conversations are held out
    messages.py          checks conversations from files
    published.py         downloads the word list and the identity conversations of the original nanochat
    stories.py           the texts of the generated arithmetic problems
    words.py             the words of the spelling tasks
    sandbox.py           starts judge.py with limits on time, memory, files and output
    judge.py             runs a generated program, and tests it
"""

import itertools
from collections.abc import Iterable
from pathlib import Path

from nanochat_jax.config import UserError, did_you_mean, user_path
from nanochat_jax.tasks.arc import ARCChallenge, ARCEasy
from nanochat_jax.tasks.arithmetic import Sums, TwoStep
from nanochat_jax.tasks.customjson import CustomJSON
from nanochat_jax.tasks.generated_choice import GeneratedChoice
from nanochat_jax.tasks.gsm8k import GSM8K, Socratic
from nanochat_jax.tasks.humaneval import HumanEval
from nanochat_jax.tasks.identity import Identity
from nanochat_jax.tasks.mmlu import MMLU
from nanochat_jax.tasks.smoltalk import SmolTalk
from nanochat_jax.tasks.spellingbee import SimpleSpelling, SpellingBee
from nanochat_jax.tasks.task import Mixture, Task, View, first_rows
from nanochat_jax.tasks.task_data import RowTask

__all__ = [
    "TASKS", "CustomJSON", "Mixture", "Task", "View", "first_rows", "key", "load", "mixture", "suggestions",
    "task_class",
]  # fmt: skip

_CLASSES: tuple[type[Task], ...] = (
    MMLU,
    ARCEasy,
    ARCChallenge,
    GSM8K,
    Socratic,
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
    """Returns the class of a task: "arc-easy" -> ARCEasy, "CustomJSON:my.jsonl" -> CustomJSON. Letter case is ignored.

    Raises UserError if the task is unknown.
    """
    cls = TASKS.get(name.partition(":")[0].strip().lower())
    if cls is None:
        known = ", ".join(c.name for c in TASKS.values())
        raise UserError(f"unknown task {name!r}: must be one of {known}{did_you_mean(name.strip(), TASKS)}")
    return cls


def key(name: str) -> str:
    """Returns one name for all spellings of a task: "CustomJSON:./a.jsonl" -> "customjson:/here/a.jsonl".

    Raises UserError if the task is unknown.
    """
    cls = task_class(name)
    path = name.partition(":")[2] if cls is CustomJSON else ""
    return cls.name.lower() + (f":{user_path(path).resolve()}" if path else "")


def load(
    name: str, split: str, *, data_dir: str | Path | None = None, rows: int = 0, task_files: str = "generated"
) -> Task:
    """Returns one split of a task: "train", "val" or "test". If the task has no val split, "val" gives the test split.

    data_dir: a local folder with task data, used instead of the Hugging Face hub.
    rows: how many rows to take, or 0 for all rows. If the task has too few, rows are repeated, and a note is printed.
    task_files: "published" downloads the word list and the identity conversations of the original nanochat.

    Raises UserError if the data is missing or empty, or if a row is malformed.
    """
    if split not in ("train", "val", "test"):
        raise UserError(f"split {split!r} of {name}: must be train, val or test")
    if rows < 0:
        raise UserError(f"{name}={rows}: the number of rows must be 0 (all) or more")
    cls = task_class(name)
    if data_dir and not (data_dir := user_path(data_dir)).is_dir():
        raise UserError(f"--task_data_dir={data_dir}: no such folder")
    if split == "val" and not cls.has_val:
        split = "test"
    if cls is CustomJSON:
        path = name.partition(":")[2]
        if not path:
            raise UserError("customjson needs a file: customjson:PATH")
        task = CustomJSON(path)
    elif cls in (Identity, SpellingBee, SimpleSpelling):
        task = cls(split, data_dir or None, download=task_files == "published")
    else:
        task = cls(split, data_dir or None)
    task.split = split
    if isinstance(task, RowTask):
        task.check()
    if rows > len(task):
        print(f"{task.name}: {rows:,} rows asked for, {len(task):,} here: rows are repeated", flush=True)
    return first_rows(task, rows)


def mixture(
    counts: dict[str, int],
    split: str,
    data_dir: str | Path | None = None,
    seed: int | None = 42,
    *,
    task_files: str = "generated",
) -> Mixture:
    """Returns a mixture of tasks. `counts` maps the name of each task to a number of rows, or to 0 for all rows.

    The conversations are shuffled with `seed`. If `seed` is None, the tasks stay in order, one after the other.
    """
    if not counts:
        raise UserError("an empty mixture: name at least one task, as name=rows")
    seen: dict[str, str] = {}
    for name in counts:
        if other := seen.get(key(name)):
            raise UserError(f"{other} and {name} are the same task: name it once, as {name}=rows")
        seen[key(name)] = name
    loaded = [load(name, split, data_dir=data_dir, rows=n, task_files=task_files) for name, n in counts.items()]
    return Mixture(loaded, seed)


def suggestions(names: Iterable[str]) -> list[str]:
    """Returns questions that a model can answer after training on the tasks named in `names`.

    The first questions of all tasks come first, then the second questions, and so on. CustomJSON suggests no questions,
    because your conversations may be private. Unknown names are ignored, since they may come from a checkpoint of
    another version.
    """
    classes = [TASKS[task] for name in names if (task := name.partition(":")[0].strip().lower()) in TASKS]
    rounds = itertools.zip_longest(*(cls.suggestions for cls in classes))
    return list(dict.fromkeys(question for questions in rounds for question in questions if question))
