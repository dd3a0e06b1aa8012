"""Generates multiple-choice questions in MMLU's format.

The questions are about first letters, the largest or smallest number, kinds of things, opposites and plurals. A tiny
model can learn all of these from its training text.

Each question compares the right answer with each of three wrong answers. A hash assigns every comparison to one split,
so training never contains a comparison from val or test. All splits use the same words, because a model can compare
only words that it knows.
"""

import random
import zlib
from collections.abc import Iterator, Sequence

from nanochat_jax.tasks import multiple_choice
from nanochat_jax.tasks.task import Task

TRAIN_ROWS, HELD_OUT_ROWS = 100_000, 1_000
HOLD_OUT = 4  # about one in HOLD_OUT comparisons is only for validation, and as many are only for the test
LETTERS = "ABCD"

_KINDS = {
    "an animal": "dog cat horse cow sheep pig bird fish mouse lion bear rabbit goat duck frog",
    "a color": "red blue green yellow black white brown orange pink gray purple",
    "a day of the week": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "a month": "January February March April June July August September October November December",
    "a fruit": "apple pear banana cherry lemon grape peach plum",
    "a part of the body": "hand foot head arm leg eye ear nose finger knee",
    "a number": "one two three four five six seven eight nine ten",
    "something to wear": "hat shirt coat shoe sock dress glove scarf",
    "something to read": "book letter newspaper story poem",
    "a person": "man woman child boy girl mother father teacher doctor farmer",
}
KINDS = {kind: members.split() for kind, members in _KINDS.items()}
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("long", "short"), ("old", "new"), ("fast", "slow"), ("high", "low"),
    ("open", "closed"), ("true", "false"), ("left", "right"), ("up", "down"), ("first", "last"), ("good", "bad"),
    ("empty", "full"), ("start", "end"), ("before", "after"), ("yes", "no"), ("always", "never"), ("day", "night"),
    ("hard", "easy"), ("light", "dark"), ("early", "late"), ("same", "different"), ("more", "less"), ("on", "off"),
)  # fmt: skip
PLURALS = (
    ("mouse", "mice"), ("foot", "feet"), ("child", "children"), ("man", "men"), ("woman", "women"), ("tooth", "teeth"),
    ("box", "boxes"), ("city", "cities"), ("leaf", "leaves"), ("key", "keys"), ("dog", "dogs"), ("book", "books"),
    ("class", "classes"), ("index", "indices"), ("file", "files"), ("word", "words"), ("list", "lists"),
    ("value", "values"), ("wife", "wives"), ("country", "countries"), ("table", "tables"), ("house", "houses"),
)  # fmt: skip
_WORDS = """apple after about above bread black button blue class could color clear desk dream drive down earth every
    early find fire four field garden green great glass house happy heart island inside idea jacket join jump kitchen
    keep kind letter light large morning many money never night name ocean open order paper people place queen quick
    quiet river round right school small stone table three today under until uncle value very village water winter
    world year young yellow zero"""
WORDS = _WORDS.split()


class GeneratedChoice(Task):
    name = "Choice"
    eval_type = "categorical"
    baseline = 0.25
    has_val = True

    def __len__(self) -> int:
        return TRAIN_ROWS if self.split == "train" else HELD_OUT_ROWS

    def example(self, index: int) -> dict:
        rng = random.Random(f"{self.name} {self.split} {index}")
        question, answer, others = self.problem(rng)
        choices = [answer, *others]
        rng.shuffle(choices)
        return multiple_choice.conversation(question, choices, LETTERS, LETTERS[choices.index(answer)])

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return multiple_choice.evaluate(conversation, completion)

    def problem(self, rng: random.Random) -> tuple[str, str, list[str]]:
        """Returns (question, right answer, three wrong answers). All three comparisons belong to the task's split."""
        make = rng.choice((_first_letter, _largest, _smallest, _kind, _opposite, _plural))
        while True:
            question, answer, candidates = make(rng)
            others = []
            for other in candidates:  # the candidates are distinct and in random order
                if split_of(question, answer, other) == self.split:
                    others.append(other)
                if len(others) == len(LETTERS) - 1:
                    return question, answer, others


def split_of(question: str, answer: str, other: str) -> str:
    """Returns the split of the comparison between `answer` and `other`: "train", "val" or "test"."""
    return {0: "val", 1: "test"}.get(zlib.crc32(f"{question}|{answer}|{other}".encode()) % HOLD_OUT, "train")


def _shuffled(items: Sequence[str], rng: random.Random) -> list[str]:
    return rng.sample(items, len(items))


def _first_letter(rng: random.Random) -> tuple[str, str, list[str]]:
    answer = rng.choice(WORDS)
    others = [word for word in WORDS if word[0] != answer[0]]
    return f"Which word begins with the letter {answer[0]}?", answer, _shuffled(others, rng)


def _largest(rng: random.Random) -> tuple[str, str, Iterator[str]]:
    answer = rng.randint(20, 999)
    return "Which number is the largest?", str(answer), _numbers(0, answer - 1, rng)


def _smallest(rng: random.Random) -> tuple[str, str, Iterator[str]]:
    answer = rng.randint(0, 979)
    return "Which number is the smallest?", str(answer), _numbers(answer + 1, 999, rng)


def _numbers(low: int, high: int, rng: random.Random) -> Iterator[str]:
    """Returns up to 40 different numbers from `low` to `high`, in random order."""
    return map(str, rng.sample(range(low, high + 1), min(high - low + 1, 40)))


def _kind(rng: random.Random) -> tuple[str, str, list[str]]:
    kind = rng.choice(list(KINDS))
    others = [word for other, members in KINDS.items() if other != kind for word in members if word not in KINDS[kind]]
    return f"Which of these is {kind}?", rng.choice(KINDS[kind]), _shuffled(others, rng)


def _opposite(rng: random.Random) -> tuple[str, str, list[str]]:
    pair = rng.choice(OPPOSITES)
    word, answer = _shuffled(pair, rng)
    others = [other for another in OPPOSITES if another != pair for other in another]
    return f"Which word is the opposite of {word}?", answer, _shuffled(others, rng)


def _plural(rng: random.Random) -> tuple[str, str, list[str]]:
    singular, plural = rng.choice(PLURALS)
    others = [singular, *(other for pair in PLURALS if pair[0] != singular for other in pair)]
    return f"Which word is the plural of {singular}?", plural, _shuffled(others, rng)
