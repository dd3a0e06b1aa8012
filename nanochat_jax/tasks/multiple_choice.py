"""The prompt format of every multiple-choice task.

Each letter comes after its choice, because a small model connects the two more easily in this order. There is no space
before the letter, so that the letter is the same token in the question and in the answer.
"""

from collections.abc import Sequence

from nanochat_jax.tasks.messages import BadRow


def conversation(question: str, choices: Sequence[str], letters: Sequence[str], answer: str) -> dict:
    """Returns a conversation. The user asks the question, and the assistant answers with only the right letter.

    For the arguments "Which is hot?", ["ice", "fire"], "AB" and "B", the user asks

        Multiple Choice question: Which is hot?
        - ice=A
        - fire=B

        Respond only with the letter of the correct answer.

    and the assistant answers "B".

    Raises BadRow if the arguments do not form a question, for example because the right answer is not published.
    """
    if len(choices) < 2 or len(choices) != len(letters) or len(set(letters)) < len(letters):
        raise BadRow(f"expected 2 or more choices with different letters, got {len(choices)} and {list(letters)}")
    if not all(isinstance(text, str) for text in (question, *choices)):
        raise BadRow(f"question and choices must be text, got {question!r:.40} and {list(choices)!r:.80}")
    if not all(isinstance(letter, str) for letter in letters):
        raise BadRow(f"the letters must be text, got {list(letters)!r:.80}")
    if answer not in list(letters):  # in a string of letters, Python would also find "" and "AB"
        raise BadRow(f"the answer {answer!r} is not one of the letters {', '.join(map(str, letters))}")
    listed = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
    user = f"Multiple Choice question: {question}\n{listed}\nRespond only with the letter of the correct answer."
    return {
        "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}],
        "letters": list(letters),
    }


def evaluate(conversation: dict, completion: str) -> bool:
    """Whether `completion` is the right letter."""
    return completion.strip() == conversation["messages"][-1]["content"]
