"""GSM8K (Cobbe et al., 2021): grade-school word problems, solved step by step with the calculator.

In the data, each step of an answer contains <<expression=result>>, which becomes a tool call and its output. An answer
ends with "#### number". It is right only if this number, without commas, is written exactly as in the reference: 10
matches neither 10.0 nor "10.".
"""

import re
from pathlib import Path

from nanochat_jax.tasks import task_data

REPO = "openai/gsm8k"

_CALL = re.compile(r"<<([^>]+)>>")
_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


def extract_answer(text: str) -> str | None:
    """The number after the first "#### ", without commas, or None if there is none.

    "2 + 2 = 4\\n#### 1,004" -> "1004"
    """
    match = _ANSWER.search(text)
    return match[1].replace(",", "") if match else None


def is_right(conversation: dict, completion: str) -> bool:
    """Whether `completion` gives the same number as the conversation's own answer."""
    content = conversation["messages"][-1]["content"]
    reference = extract_answer(content if isinstance(content, str) else content[-1]["text"])
    assert reference is not None, f"no #### in the reference answer {content!r}"
    return extract_answer(completion) == reference


class GSM8K(task_data.RowTask):
    name = "GSM8K"
    eval_type = "generative"

    def __init__(self, split: str, data_dir: str | Path | None = None):
        if data_dir:
            self.rows = task_data.local(data_dir, f"gsm8k/{split}")
        else:
            self.rows = task_data.hub(REPO, "main", split)

    @staticmethod
    def conversation(row: dict) -> dict:
        """{"question", "answer": "It is <<2*5=10>>10\\n#### 10"} -> a conversation. Its answer has these parts:

        text "It is ", python "2*5", python_output "10", text "10\\n#### 10"
        """
        parts = []
        for i, piece in enumerate(_CALL.split(row["answer"])):  # text, call, text, call, ..., text
            if i % 2 == 0:
                parts.append({"type": "text", "text": piece})
                continue
            expression, equals, result = piece.rpartition("=")
            parts.append({"type": "python", "text": expression if equals else piece})
            parts.append({"type": "python_output", "text": result if equals else ""})
        return {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": parts},
            ]
        }

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return is_right(conversation, completion)
