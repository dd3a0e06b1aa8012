"""How a multiple-choice question is shown to the model, for every task that asks one.

The letter comes after its choice, directly after the "=". Without a space before it, the letter in the prompt is the
same token as the answer; and a small model more easily binds a letter to a choice that precedes it.
"""

from collections.abc import Sequence


def conversation(question: str, choices: Sequence[str], letters: Sequence[str], answer: str) -> dict:
    """The question with its lettered choices; the answer is the letter alone.

    "Which is hot?", ["ice", "fire"], "AB", "B" -> the user asks

        Multiple Choice question: Which is hot?
        - ice=A
        - fire=B

        Respond only with the letter of the correct answer.

    and the assistant answers "B".
    """
    assert answer in letters and len(choices) == len(letters), f"{answer!r} of {letters} for {len(choices)} choices"
    listed = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
    user = f"Multiple Choice question: {question}\n{listed}\nRespond only with the letter of the correct answer."
    return {
        "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}],
        "letters": list(letters),
    }


def evaluate(conversation: dict, completion: str) -> bool:
    """Whether `completion` is the right letter."""
    return completion.strip() == conversation["messages"][-1]["content"]
