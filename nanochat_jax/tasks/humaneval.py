"""HumanEval (Chen et al., 2021): the model writes a Python function, given its signature and docstring.

An answer is right if the function passes the unit tests.
"""

import functools
import re
import textwrap
from pathlib import Path

from nanochat_jax.config import UserError
from nanochat_jax.tasks import sandbox, task_data
from nanochat_jax.tasks.messages import BadRow

REPO = "openai/openai_humaneval"

# Matches the first line of a fenced block. The fence may stand in a list ("1. ```python") or behind other text
# ("Answer: ```python").
_FENCE = re.compile(
    r"^(?P<indent>[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)?)(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^`\r\n]*)\r?$"
    r"|^(?:(?!```)[^\r\n])+(?P<fence_behind_text>`{3,})[ \t]*(?P<python>(?:python3?|py)?)[ \t]*\r?$",
    re.IGNORECASE | re.MULTILINE,
)
_PYTHON = re.compile(r"[{.]*i?py(thon)?[\d.]*\b|\s*$", re.IGNORECASE)  # python, Python3, py, {.python}, or nothing
_MARKDOWN = re.compile(r"(markdown|md)\b", re.IGNORECASE)


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Returns the fenced code blocks of a Markdown text, as pairs (info string, code).

    The info string follows the opening fence, and usually names the language. Fences are three or more backticks or
    tildes, as in CommonMark. Unlike in CommonMark, a block may be indented by any amount, and the closing fence may
    stand right behind the code. A block without a closing fence reaches to the end of the text.
    """
    blocks = []
    lines = iter(re.split(r"\r\n|\r|\n", text))
    for line in lines:
        if not (opening := _FENCE.fullmatch(line)):
            continue
        indent, fence = len(opening["indent"] or ""), opening["fence"] or opening["fence_behind_text"]
        info, code = opening["info"] or opening["python"] or "", []
        for line in lines:
            rest = line.strip()
            deeper = len(line) - len(line.lstrip()) - indent
            if rest.startswith(fence) and not rest.strip(fence[0]) and deeper < 4:  # a deeper fence is in a docstring
                break
            if fence[0] == "`" and rest.endswith(fence) and rest.count(fence) == 1 and rest != fence:
                code.append(line.rstrip().removesuffix(fence))
                break
            code.append(re.sub(rf"^[ \t]{{0,{indent}}}", "", line))
        blocks.append((info, textwrap.dedent("\n".join(code))))
        if _MARKDOWN.match(info):
            blocks += fenced_blocks(blocks[-1][1])
    return blocks


def extract_code(completion: str, function: str) -> str:
    """Returns the code of an answer: one of its fenced blocks, or the whole answer if the code is not in a block.

    Takes the first Python block that defines `function`, else the first block that defines it, else the first Python
    block, else the first block. A block without a language counts as Python. (The original nanochat takes the first
    block that is marked exactly "python" or not marked at all.)
    """
    name = re.escape(function)
    defines = re.compile(rf"^(async\s+)?(def|class)\s+{name}\b|^{name}\s*(:[^=\n]*)?=(?!=)", re.MULTILINE)
    fence = _FENCE.search(completion)
    if not fence or defines.search(completion[: fence.start()]):  # a docstring may have a block
        return completion.strip()
    blocks = fenced_blocks(completion)
    _, code = max(blocks, key=lambda block: (bool(defines.search(block[1])), bool(_PYTHON.match(block[0]))))
    return code.strip()


def preamble(prompt: str, function: str) -> str:
    """Returns what stands before `function` in a prompt: imports, constants and helpers.

    An answer may rely on these without repeating them, and so may the tests. (The original nanochat keeps only the
    imports, so an answer that uses a helper without repeating it fails.)
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
        """Whether the function passes the tests.

        The prompt's helpers stand before the answer, so an answer may replace a helper for its own use. The tests
        always use the prompt's helpers. Otherwise, an answer could define an `encode` and a `decode` that both do
        nothing, and pass.
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
