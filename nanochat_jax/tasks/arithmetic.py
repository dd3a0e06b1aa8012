"""Generates arithmetic problems in GSM8K's format. Problems of Sums have one step, and problems of TwoStep have two.

A problem depends only on the task, the split and the index. Some number pairs, some names and some phrasings (see
stories.py) never occur in training. They are reserved for validation or for the test. A hash of the operator and the
two operands assigns each number pair to one split. A problem uses only number pairs of its own split.

Every step of an answer calls the calculator. The text before a call states the operation but not the result, so that
the model need not compute anything itself. The calculator's expression has no spaces, so that a number always becomes
the same tokens.
"""

import random
import zlib
from pathlib import Path

from nanochat_jax.engine.calculator import use_calculator
from nanochat_jax.tasks import gsm8k
from nanochat_jax.tasks.stories import ONE_STEP, PLAIN, TWO_STEP, Story, stories_for, tell
from nanochat_jax.tasks.task import Task

TRAIN_ROWS, HELD_OUT_ROWS = 100_000, 1_000
HOLD_OUT = 10  # about one in HOLD_OUT number pairs is only for validation, and as many are only for the test

# The share of divisions among the training problems that tell no story. Training includes divisions because users ask
# for them. The val and test splits have no divisions.
DIVISIONS = 0.1

_WOMEN = """Ann Mary Lisa Emma Sarah Anna Julia Laura Kate Jane Alice Maria Nina Rose Grace Lucy Ella Mia Zoe Eva Amy
    Helen Linda Susan Karen"""
_MEN = """Tom Ben Sam John Peter Paul Mark David James Jack Max Leo Adam Bob Jim Tim Dan Alex Nick Luke Henry Frank
    George Mike Carl"""
_THINGS = """apples pears plums lemons oranges cakes cookies eggs nuts books pens pencils cards coins stamps stickers
    balls toys dolls marbles beads shells stones flowers roses trees cups plates spoons keys buttons boxes candles
    photos letters tickets hats shirts socks blocks"""
WOMEN = {
    "train": _WOMEN.split(),
    "val": ["Clara", "Diana", "Olivia", "Sofia", "Ruth", "Nora", "Ida"],
    "test": ["Hannah", "Martha", "Irene", "Judith", "Paula", "Tina", "Vera", "Sally"],
}
MEN = {
    "train": _MEN.split(),
    "val": ["Oscar", "Felix", "Hugo", "Victor", "Simon", "Ryan", "Ivan"],
    "test": ["Arthur", "Martin", "Eric", "Roger", "Walter", "Toby", "Bruno", "Owen"],
}
THINGS = _THINGS.split()
BOXES = (
    ("box", "boxes"),
    ("bag", "bags"),
    ("basket", "baskets"),
    ("pack", "packs"),
    ("jar", "jars"),
    ("tray", "trays"),
)
SCENES = (
    "It is a sunny day.",
    "It is a cold morning.",
    "School is over for today.",
    "Here is a small problem.",
    "It is late.",
    "Read this with care.",
    "This is an easy one.",
    "Listen to this story.",
)
OPENINGS = ("Hi!", "Hello,", "Question:", "A quick question:", "Please help me.", "Now this:", "Next:", "And then?")
UNRELATED = 0.2  # share of problems that begin with unrelated words, which the model must learn to ignore


def split_of(a: int, op: str, b: int) -> str:
    """Returns the split of the operation `a op b`: "train", "val" or "test". 3+4 and 4+3 belong to the same split."""
    if op in "+*" and a > b:
        a, b = b, a
    return {0: "val", 1: "test"}.get(zlib.crc32(f"{a}{op}{b}".encode()) % HOLD_OUT, "train")


class _Arithmetic(Task):
    eval_type = "generative"
    has_val = True

    def __init__(self, split: str, data_dir: str | Path | None = None):
        super().__init__(split, data_dir)
        self.one_step = {op: stories_for(split, stories) for op, stories in ONE_STEP.items()}
        self.two_step = stories_for(split, TWO_STEP)

    def __len__(self) -> int:
        return TRAIN_ROWS if self.split == "train" else HELD_OUT_ROWS

    def problem(self, rng: random.Random) -> tuple[str, Story, list[int]]:
        """Returns (text, story, numbers). The text tells the story, with {} in place of each number."""
        raise NotImplementedError

    def example(self, index: int) -> dict:
        rng = random.Random(f"{self.name} {self.split} {index}")
        text, story, numbers = self.problem(rng)
        words = _characters(self.split, rng)
        parts = _answer_parts(story.steps, numbers, story.unit.format(**words))
        return {
            "messages": [
                {"role": "user", "content": text.format(*numbers, **words)},
                {"role": "assistant", "content": parts},
            ]
        }

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return gsm8k.is_right(conversation, completion)

    def reward(self, conversation: dict, completion: str) -> float:
        return gsm8k.reward(conversation, completion)


class Sums(_Arithmetic):
    """One-step problems. Half of them are plain, such as "What is 3 + 4?", and half tell a story.

    Operands of + and - are at most 999, and operands of * are between 2 and 99.
    """

    name = "Sums"
    suggestions = ("What is 28 times 13?", "What is 120 + 72?")

    def problem(self, rng: random.Random) -> tuple[str, Story, list[int]]:
        plain = rng.random() < 0.5
        op = rng.choice("+-*")
        if plain and self.split == "train" and rng.random() < DIVISIONS:
            op = "/"
        story = PLAIN[op] if plain else rng.choice(self.one_step[op])
        text = tell(story, self.split, rng)
        if rng.random() < UNRELATED:
            text = f"{rng.choice(OPENINGS if plain else SCENES)} {text}"
        if plain:
            text = _carelessly_typed(text, rng)
        while True:
            a, b = _pair(op, rng)
            # In a story, both numbers are at least 2, to avoid "1 apples", and a difference is more than 0.
            sensible = plain or (min(a, b) >= 2 and (op != "-" or a > b))
            if sensible and split_of(a, op, b) == self.split:
                return text, story, [a, b]


class TwoStep(_Arithmetic):
    """Word problems with two steps. The second step uses the result of the first."""

    name = "TwoStep"
    suggestions = (
        "How many eggs remain if a farmer has 44, eats 15 and gives away 5?",
        "If a farm has 12 cows, 20 pigs and 41 hens, how many animals are there?",
    )

    def problem(self, rng: random.Random) -> tuple[str, Story, list[int]]:
        story = rng.choice(self.two_step)
        text = tell(story, self.split, rng)
        if rng.random() < UNRELATED:
            text = f"{rng.choice(SCENES)} {text}"
        while True:
            numbers = _draw_numbers(story, rng)
            if all(
                (op != "-" or a > b) and (op != "*" or a * b < 2000) and split_of(a, op, b) == self.split
                for a, op, b in _operations(story.steps, numbers)
            ):
                return text, story, numbers[: text.count("{}")]


def _pair(op: str, rng: random.Random) -> tuple[int, int]:
    if op == "*":
        return rng.randint(2, 99), rng.randint(2, 99)
    if op == "/":  # divisions leave no remainder
        divisor = rng.randint(2, 30)
        return divisor * rng.randint(2, 30), divisor
    digits = (100, 1000)  # half of the operands are drawn from 0 to 99, because users mostly ask about small numbers
    return rng.randrange(rng.choice(digits)), rng.randrange(rng.choice(digits))


def _draw_numbers(story: Story, rng: random.Random) -> list[int]:
    """Draws the numbers x, y and z for a story. The caller checks the numbers, and draws again if necessary."""
    numbers = []
    for name in "xyz":
        if any(name in step and "*" in step for step in story.steps):
            numbers.append(rng.randint(2, 30))
        elif f"{name}-r" in story.steps:  # the second step subtracts the first step's result from this number
            numbers.append(rng.randint(2, 999))
        else:
            numbers.append(rng.randint(2, min(story.largest, rng.choice((99, 300)))))
    return numbers


def _operations(steps: tuple[str, ...], numbers: list[int]) -> list[tuple[int, str, int]]:
    """Returns (left number, operator, right number) for each step. In `steps`, r is the previous step's result.

    Example: ("x+y", "r-z"), [3, 4, 2] -> [(3, "+", 4), (7, "-", 2)]
    """
    values = dict(zip("xyz", numbers, strict=False))
    operations = []
    for left, op, right in steps:  # a step has three characters, such as "x+y"
        a, b = values[left], values[right]
        values["r"] = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[op]
        operations.append((a, op, b))
    return operations


def _answer_parts(steps: tuple[str, ...], numbers: list[int], unit: str) -> list[dict]:
    """Returns the answer as a list of parts.

    Each step gives three parts: the operation, the calculator call and the calculator's output. The last part ends with
    #### and the result.

    Example: ("x+y",), [3, 4], "apples" -> text "3 + 4 = ", python "3+4", python_output "7", text "7 apples.\\n#### 7"
    """
    parts, before = [], ""
    for a, op, b in _operations(steps, numbers):
        result = use_calculator(f"{a}{op}{b}")
        parts.append({"type": "text", "text": f"{before}{a} {op} {b} = "})
        parts.append({"type": "python", "text": f"{a}{op}{b}"})
        parts.append({"type": "python_output", "text": result})
        before = f"{result}.\n"
    parts.append({"type": "text", "text": f"{result} {unit}".rstrip() + f".\n#### {result}"})
    return parts


def _characters(split: str, rng: random.Random) -> dict[str, str]:
    """Draws the people and things of a story, as {placeholder: word}. phrasings.txt explains the placeholders."""
    woman = rng.random() < 0.5
    people = rng.sample(WOMEN[split] + MEN[split], 3)
    name = rng.choice((WOMEN if woman else MEN)[split])
    others = [person for person in people if person != name]
    he, him, his = ("she", "her", "her") if woman else ("he", "him", "his")
    box, boxes = rng.choice(BOXES)
    things = rng.choice([thing for thing in THINGS if thing != boxes])
    return {
        "n": name,
        "m": others[0],
        "k": others[1],
        "he": he,
        "He": he.capitalize(),
        "him": him,
        "his": his,
        "t": things,
        "box": box,
        "boxes": boxes,
    }


def _carelessly_typed(text: str, rng: random.Random) -> str:
    """Returns the text as people type it: sometimes without capitals or final punctuation."""
    if rng.random() < 0.15:
        text = text.lower()
    if rng.random() < 0.15:
        text = text.rstrip("?.")
    return text
