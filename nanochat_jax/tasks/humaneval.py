"""HumanEval (Chen et al., 2021): the model writes a Python function, given its signature and docstring.

An answer is right if the function passes the unit tests.
"""

import functools
import re
import textwrap
from pathlib import Path

from nanochat_jax.config import UserError
from nanochat_jax.tasks import sandbox, task_data

REPO = "openai/openai_humaneval"

# The first line of a fenced block: "```python", also in a list ("1. ```python") or after text ("Answer: ```python").
_FENCE = re.compile(r"(?P<before>[^`~]*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^`]*)")
_PYTHON = re.compile(r"[{.]*i?py(thon)?[\d.]*\b|\s*$", re.IGNORECASE)  # the info strings: python, py3, {.python}, none


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Returns the fenced code blocks of a Markdown text, as pairs (info string, code).

    Fences are three or more backticks or tildes. An indented block loses its indentation, and a block without a closing
    fence reaches to the end. The closing fence may follow the last line of code instead of having a line of its own.
    """
    blocks = []
    lines = iter(text.splitlines())
    for line in lines:
        opening = _FENCE.fullmatch(line)
        if not opening:
            continue
        fence, code = opening["fence"], []
        for line in lines:
            rest = line.rstrip()
            if rest.endswith(fence) and not rest.strip(fence[0] + " \t"):
                break
            if rest.endswith(fence) and rest.count(fence) == 1:
                code.append(rest.removesuffix(fence))
                break
            code.append(line)
        # In a list, the code is indented as far as the fence. A docstring may be indented less.
        indented = re.compile(rf"[ \t]{{0,{len(opening['before'])}}}")
        blocks.append((opening["info"], textwrap.dedent("\n".join(indented.sub("", row, count=1) for row in code))))
    return blocks


def extract_code(completion: str, function: str = "") -> str:
    """Returns the code of an answer: one of its fenced blocks, or the whole answer if it has no block.

    Takes the first Python block that defines `function`, else the first block that defines it, else the first Python
    block, else the first block. A block without a language counts as Python. (The specification takes the first block
    that is marked "python" or not marked, in exactly this spelling.)
    """
    if not (blocks := fenced_blocks(completion)):
        return completion.strip()
    defines = re.compile(rf"^(async\s+def|def|class)\s+{re.escape(function)}\b|^{re.escape(function)}\s*=", re.MULTILINE)
    _, code = max(blocks, key=lambda block: (bool(defines.search(block[1])), bool(_PYTHON.match(block[0]))))
    return code.strip()


def preamble(prompt: str, function: str) -> str:
    """Returns what stands before `function` in a prompt: imports, constants and helpers.

    An answer may rely on these without repeating them, and so may the tests. (The specification keeps only the imports,
    and fails such answers if they use a helper.)
    """
    match = re.search(rf"^(async\s+)?def\s+{re.escape(function)}\b", prompt, re.MULTILINE)
    return prompt[: match.start()].strip() if match else ""


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
        announce()

    @staticmethod
    def conversation(row: dict) -> dict:
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
        """Whether the function passes the tests.

        The prompt's helpers stand before the answer, so an answer that defines a helper itself uses its own. The tests
        always use the prompt's: with the answer's, `encode` and `decode` that both do nothing would be right.
        """
        function = conversation["entry_point"]
        given = preamble(conversation["messages"][0]["content"], function)
        program = f"{given}\n\n{extract_code(completion, function)}\n"
        tests = f"{given}\n\n{conversation['test']}\n\ncheck({function})\n"
        return sandbox.execute(program, tests, function).success


@functools.cache
def announce() -> None:
    """Prints, once, how the sandbox runs programs on this system."""
    print(f"HumanEval: programs run {sandbox.describe()}", flush=True)
