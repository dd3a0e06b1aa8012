"""GSM8K (Cobbe et al., 2021): grade-school word problems, solved step by step with the calculator.

In the data, the steps of an answer contain <<expression=result>>. The expression becomes a calculator call, and the
result becomes the call's output. An answer ends with "#### number".

The score is strict: an answer is right only if its number is written exactly as in the reference answer. Commas are
ignored, but 10.0 does not match 10. The reward in reinforcement learning is less strict: it also accepts the same
number in another format, such as $10 or 10.0.

GSM8K-Socratic is the subset `socratic` of the same data set. Local files are gsm8k/train.jsonl, gsm8k/test.jsonl,
gsm8k/train_socratic.jsonl and gsm8k/test_socratic.jsonl.
"""

import re
from decimal import Decimal
from pathlib import Path

from nanochat_jax.tasks import task_data
from nanochat_jax.tasks.messages import BadRow

REPO = "openai/gsm8k"

_CALL = re.compile(r"<<([^>]+)>>")
_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")

# Matches a number, together with Markdown, LaTeX, currency signs, a unit or a period around it.
_FORMATTED = re.compile(
    r"""
    \s* [*_`$]* (?: \\boxed\{ )? (?: =[ ]? )?
    (?P<sign> [-+\u2212]? \\?[$€£¥]? [-+\u2212]? )                           # \u2212 is the minus sign
    (?P<digits> (?: [0-9]{1,3} (?: ,[0-9]{3} )+ | [0-9]+ ) (?: \.[0-9]+ )? | \.[0-9]+ )
    [.]? [*_`$}]*
    (?P<unit> [ ]? \\?[%€£¥°] | [ ]? [^\W\d_]+ (?: [ /][^\W\d_]+ ){0,3} )?  # at most four words
    [*_`$}]* [.]? [*_`$}]* \s*
    """,
    re.VERBOSE,
)
# Words that are not units. After a number, they change its value or announce a second number.
_NOT_UNITS = frozenset(
    """k m b bn mn hundred hundreds thousand thousands million millions billion billions trillion trillions dozen dozens
    half halves third thirds quarter quarters fourth fourths fifth fifths tenth tenths cent cents and or to plus minus
    times divided over point squared cubed x""".split()
)


def extract_answer(text: str) -> str | None:
    """Returns the first number after "#### ", with commas removed. Returns None if no number follows "#### ".

    Example: "2 + 2 = 4\\n#### 1,004" -> "1004".
    """
    match = _ANSWER.search(text)
    return match[1].replace(",", "") if match else None


def is_right(conversation: dict, completion: str) -> bool:
    """Whether `completion` has the same number as the last message of `conversation`, the reference answer."""
    return extract_answer(completion) == _reference(conversation)


def _reference(conversation: dict) -> str:
    content = conversation["messages"][-1]["content"]
    reference = extract_answer(content if isinstance(content, str) else content[-1]["text"])
    assert reference is not None, f"no #### in the reference answer {content!r}"
    return reference


def extract_number(text: str) -> Decimal | None:
    """Returns the number after "####", which may have any usual format. Returns None if "####" does not occur exactly
    once, or if the rest of the line holds anything else, such as a second number.

    Example: "#### $1,004", "#### **1004.00**" and "####1004 dollars." all give 1004. "#### 3 thousand" gives None.
    """
    if text.count("####") != 1:
        return None
    line = text.partition("####")[2].partition("\n")[0]
    match = _FORMATTED.fullmatch(line)
    if match is None:
        return None
    unit = (match["unit"] or "").casefold()
    if _NOT_UNITS.intersection(re.split(r"[ /]", unit)) or any(map(str.isnumeric, unit)):  # such as the ½ in 18½
        return None
    signs = match["sign"].strip("\\$€£¥")
    if len(signs) > 1:  # two signs, such as -$-18
        return None
    minus = "-" if signs in ("-", "\u2212") else ""
    return Decimal(minus + match["digits"].replace(",", ""))


def reward(conversation: dict, completion: str) -> float:
    """Returns 1.0 if `completion` is right, or if it has the right number in another format. Otherwise, returns 0.0."""
    if is_right(conversation, completion):
        return 1.0
    number = extract_number(completion)
    return float(number is not None and number == extract_number(f"#### {_reference(conversation)}"))


class GSM8K(task_data.RowTask):
    name = "GSM8K"
    eval_type = "generative"
    subset = "main"  # the subset's name on the hub
    suffix = ""  # follows the split in the names of local files
    suggestions = (
        "A baker fills 12 trays with 8 rolls each and sells 70 rolls. How many rolls are left?",
        "A train ride takes 45 minutes. How many hours do 8 rides take?",
    )

    def __init__(self, split: str, data_dir: str | Path | None = None):
        if data_dir:
            self.rows = task_data.local(data_dir, f"gsm8k/{split}{self.suffix}")
        else:
            self.rows = task_data.hub(REPO, self.subset, split)

    @staticmethod
    def conversation(row: dict) -> dict:
        """Turns a row {"question": ..., "answer": ...} into a conversation.

        Example: the answer "It is <<2*5=10>>10\\n#### 10" becomes a message with four parts: text "It is ", python
        "2*5", python_output "10", text "10\\n#### 10".
        """
        question, parts = row["question"], []
        if not isinstance(question, str) or not question.strip():
            raise BadRow(f"the question must be text, got {question!r:.40}")
        for i, piece in enumerate(_CALL.split(row["answer"])):  # even i: text, odd i: calculator call
            if i % 2 == 0:
                parts.append({"type": "text", "text": piece})
                continue
            expression, equals, result = piece.rpartition("=")
            parts.append({"type": "python", "text": expression if equals else piece})
            parts.append({"type": "python_output", "text": result if equals else ""})
        if extract_answer(parts[-1]["text"]) is None:
            raise BadRow(f'the answer must end with "#### number", got ...{row["answer"][-40:]!r}')
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": parts},
            ]
        }

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return is_right(conversation, completion)

    def reward(self, conversation: dict, completion: str) -> float:
        return reward(conversation, completion)


class Socratic(GSM8K):
    """GSM8K's problems, but every step of an answer begins with a question, such as "How many are left? **"."""

    name = "GSM8K-Socratic"
    subset = "socratic"
    suffix = "_socratic"
