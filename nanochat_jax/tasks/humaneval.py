"""HumanEval (Chen et al., 2021): the model writes a Python function, given its signature and docstring.

An answer is right if the function passes the unit tests.
"""

import re
from pathlib import Path

from nanochat_jax.config import UserError
from nanochat_jax.tasks import sandbox, task_data
from nanochat_jax.tasks.messages import BadRow

REPO = "openai/openai_humaneval"

_FENCED = re.compile(r"```(?:python)?\n(.*?)```", re.DOTALL)


def extract_code(completion: str) -> str:
    """Returns the first fenced code block of an answer, or the whole answer if it has no code block."""
    match = _FENCED.search(completion)
    return (match[1] if match else completion).strip()


def extract_imports(prompt: str) -> str:
    """Returns the import lines at the start of a prompt. An answer may rely on these imports without repeating them."""
    imports = []
    for line in prompt.split("\n"):
        line = line.strip()
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)


def program(conversation: dict, completion: str) -> str:
    """Returns a program that runs the unit tests on `completion`. The program raises an exception if a test fails."""
    imports = extract_imports(conversation["messages"][0]["content"])
    call = f"check({conversation['entry_point']})"
    return f"{imports}\n\n{extract_code(completion)}\n\n{conversation['test']}\n{call}\n"


class HumanEval(task_data.RowTask):
    name = "HumanEval"
    eval_type = "generative"

    def __init__(self, split: str, data_dir: str | Path | None = None):
        if split != "test":
            raise UserError(f"humaneval has no {split} split: it is for evaluation only")
        if data_dir:
            self.rows = task_data.local(data_dir, "humaneval/HumanEval")
        else:
            self.rows = task_data.hub(REPO, "openai_humaneval", "test")

    @staticmethod
    def conversation(row: dict) -> dict:
        if not row["prompt"].strip() or not row["entry_point"].strip() or "def check(" not in row["test"]:
            raise BadRow("expected a prompt, an entry_point and a test that defines check(candidate)")
        solution = row["prompt"] + "\n" + row["canonical_solution"]
        return {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": solution},
            ],
            "entry_point": row["entry_point"],
            "test": row["test"],
        }

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return sandbox.execute(program(conversation, completion)).success
