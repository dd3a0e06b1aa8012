"""How the generated word problems are told: a small grammar, read from phrasings.txt, which explains its notation.

Every list of alternatives has three parts: those that training uses, and those that only validation, or only the test,
adds to them. A problem of these splits contains at least one of its own, so its phrasing never occurred in training.
Validation may be looked at while a recipe is tuned. The test may not.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

SYMBOL = re.compile(r"<(\w+)>")


@dataclass(frozen=True)
class Choices:
    """Ways to say one thing, by split."""

    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    def own(self, split: str) -> tuple[str, ...]:
        """What only this split says."""
        return () if split == "train" else getattr(self, split)

    def filled(self, **symbols: str) -> "Choices":
        """With <A> replaced by the symbol given for A, and so on."""

        def fill(text: str) -> str:
            return SYMBOL.sub(lambda match: f"<{symbols.get(match[1], match[1])}>", text)

        return Choices(*(tuple(map(fill, ways)) for ways in (self.train, self.val, self.test)))

    def __add__(self, other: "Choices") -> "Choices":
        return Choices(self.train + other.train, self.val + other.val, self.test + other.test)


@dataclass(frozen=True)
class Story:
    """Ways to tell one problem, the steps that solve it, what the result counts, and how large its numbers may be."""

    ways: Choices
    steps: tuple[str, ...]
    unit: str = ""
    largest: int = 300


def tell(story: Story, split: str, rng: random.Random) -> str:
    """The text of `story`, all symbols expanded; in val and test some part of it is only for that split."""
    while True:
        held_out = False

        def choose(ways: Choices) -> str:
            nonlocal held_out
            own = ways.own(split)
            # Half of the choices where there is one: a problem in words that are mostly known tests little.
            if own and (not ways.train or rng.random() < 0.5):
                held_out = True
                return rng.choice(own)
            return rng.choice(ways.train)

        text = choose(story.ways)
        while match := SYMBOL.search(text):
            text = text[: match.start()] + choose(GRAMMAR[match[1]]) + text[match.end() :]
        if held_out or split == "train":
            return text


def tellable(stories: list[Story], split: str) -> list[Story]:
    """Those that can be told in words of this split."""
    return [story for story in stories if split == "train" or _has_own(story.ways, split)]


def _has_own(ways: Choices, split: str) -> bool:
    symbols = {name for way in ways.train for name in SYMBOL.findall(way)}
    return bool(ways.own(split)) or any(_has_own(GRAMMAR[name], split) for name in symbols)


# -----------------------------------------------------------------------------
# phrasings.txt


def _sections() -> list[tuple[str, Choices]]:
    """(heading, alternatives) in the order of the file."""
    sections: list[tuple[str, dict[str, list[str]]]] = []
    text = Path(__file__).with_name("phrasings.txt").read_text(encoding="utf-8")
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("["):
            sections.append((line[1:-1], {"train": [], "val": [], "test": []}))
        elif not line.startswith("#"):
            split, way = re.fullmatch(r"(?:(val|test): )?(.+)", line).groups()
            times, way = re.fullmatch(r"(?:(\d+)\* )?(.+)", way).groups()
            sections[-1][1][split or "train"] += [way] * int(times or 1)
    return [(heading, Choices(*(tuple(ways) for ways in by_split.values()))) for heading, by_split in sections]


def _story(heading: str, ways: Choices) -> Story:
    """From "x*y r+z | dollars | largest 40"."""
    steps, unit, *rest = (part.strip() for part in heading.split("|"))
    return Story(ways, tuple(steps.split()), unit, *(int(part.removeprefix("largest ")) for part in rest))


def _read() -> tuple[dict[str, Choices], dict[str, Story], list[Story]]:
    """(symbols, plain questions by operator, stories)."""
    single = {heading: ways for heading, ways in _sections() if not heading.startswith("story ")}
    grammar = {h.removeprefix("symbol "): ways for h, ways in single.items() if h.startswith("symbol ")}
    one, two = single["one event"], single["two events"]
    grammar |= {"gained": one.filled(E="gain"), "lost": one.filled(E="lose")}
    grammar |= {f"{a}_{b}": two.filled(A=a, B=b) for a in ("gain", "lose") for b in ("gain", "lose")}
    written = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
    plain = {
        op: Story(single["ask"].filled(E=symbol) + single[f"plain x{op}y"], (f"x{op}y",))
        for op, symbol in written.items()
    }
    stories = [_story(h.removeprefix("story "), ways) for h, ways in _sections() if h.startswith("story ")]
    return grammar, plain, stories


GRAMMAR, PLAIN, _STORIES = _read()
ONE_STEP = {op: [story for story in _STORIES if story.steps == (f"x{op}y",)] for op in "+-*"}
TWO_STEP = [story for story in _STORIES if len(story.steps) == 2]
