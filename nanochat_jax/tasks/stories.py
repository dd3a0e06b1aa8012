"""Writes the texts of the generated arithmetic problems. phrasings.txt lists and explains the grammar of these texts.

Some phrasings are for all splits, some only for validation, and some only for the test. Every validation or test
problem contains at least one phrasing that is only for its split. So the wording of these problems never occurs in
training. While you tune a recipe, you may look at validation problems, but not at test problems.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

SYMBOL = re.compile(r"<(\w+)>")


@dataclass(frozen=True)
class Phrasings:
    """Ways to say one thing. All splits use `train`. Only validation uses `val`, and only the test uses `test`."""

    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    def held_out(self, split: str) -> tuple[str, ...]:
        """Returns the phrasings that only `split` uses. For train, returns ()."""
        return () if split == "train" else getattr(self, split)

    def with_symbols(self, **symbols: str) -> "Phrasings":
        """Returns a copy with renamed symbols.

        Example: with_symbols(E="gain") turns "Then <E>." into "Then <gain>."
        """

        def rename(text: str) -> str:
            return SYMBOL.sub(lambda match: f"<{symbols.get(match[1], match[1])}>", text)

        return Phrasings(*(tuple(map(rename, texts)) for texts in (self.train, self.val, self.test)))

    def __add__(self, other: "Phrasings") -> "Phrasings":
        return Phrasings(self.train + other.train, self.val + other.val, self.test + other.test)


@dataclass(frozen=True)
class Story:
    """A kind of problem. `steps` are the operations that solve it, such as ("x*y", "r+z"). `unit` is the unit of the
    result. In a problem with two steps, most numbers are at most `largest`."""

    phrasings: Phrasings
    steps: tuple[str, ...]
    unit: str = ""
    largest: int = 300


def tell(story: Story, split: str, rng: random.Random) -> str:
    """Returns a text of `story` with all symbols expanded. A val or test text has a phrasing that no other split uses.

    Example for the step x+y: "{n} has {} {t} and gets another {} from {m}. How many {t} does {n} end up with?"
    """
    while True:
        held_out = False

        def choose(phrasings: Phrasings) -> str:
            nonlocal held_out
            of_split = phrasings.held_out(split)
            # If this split has phrasings of its own, choose one of them half of the time. A problem told mostly in
            # training phrasings would test little.
            if of_split and (not phrasings.train or rng.random() < 0.5):
                held_out = True
                return rng.choice(of_split)
            return rng.choice(phrasings.train)

        text = choose(story.phrasings)
        while match := SYMBOL.search(text):
            text = text[: match.start()] + choose(GRAMMAR[match[1]]) + text[match.end() :]
        if held_out or split == "train":
            return text


def stories_for(split: str, stories: list[Story]) -> list[Story]:
    """Returns the stories for `split`. For val and test, a story must have a phrasing that no other split uses."""
    return [story for story in stories if split == "train" or _has_held_out(story.phrasings, split)]


def _has_held_out(phrasings: Phrasings, split: str) -> bool:
    """Whether `phrasings`, or the symbols in them, include a phrasing that only `split` uses."""
    symbols = {name for text in phrasings.train for name in SYMBOL.findall(text)}
    return bool(phrasings.held_out(split)) or any(_has_held_out(GRAMMAR[name], split) for name in symbols)


# -----------------------------------------------------------------------------
# phrasings.txt


def _sections() -> list[tuple[str, Phrasings]]:
    """Returns (heading, phrasings) for each section, in the order of the file."""
    sections: list[tuple[str, dict[str, list[str]]]] = []
    content = Path(__file__).with_name("phrasings.txt").read_text(encoding="utf-8")
    for line in filter(None, map(str.strip, content.splitlines())):
        if line.startswith("["):
            sections.append((line[1:-1], {"train": [], "val": [], "test": []}))
        elif not line.startswith("#"):
            split, text = _take_prefix(r"(val|test): ", line)
            times, text = _take_prefix(r"(\d+)\* ", text)
            sections[-1][1][split or "train"] += [text] * int(times or 1)
    return [(heading, Phrasings(*(tuple(texts) for texts in by_split.values()))) for heading, by_split in sections]


def _take_prefix(pattern: str, line: str) -> tuple[str, str]:
    """Splits off the beginning of `line` that matches `pattern`.

    Returns (captured group, rest of the line), or ("", line) if the beginning does not match.

    Example: r"(\\d+)\\* ", "3* {n} has {} {t}." -> ("3", "{n} has {} {t}.")
    """
    match = re.match(pattern, line)
    return (match[1], line[match.end() :]) if match else ("", line)


def _story(heading: str, phrasings: Phrasings) -> Story:
    """Makes a story from its phrasings and its heading, such as "x*y r+z | dollars | largest 40"."""
    steps, unit, *rest = (part.strip() for part in heading.split("|"))
    return Story(phrasings, tuple(steps.split()), unit, *(int(part.removeprefix("largest ")) for part in rest))


def _read() -> tuple[dict[str, Phrasings], dict[str, Story], list[Story]]:
    """Reads phrasings.txt. Returns (phrasings by symbol, plain questions by operator, stories)."""
    single = {heading: phrasings for heading, phrasings in _sections() if not heading.startswith("story ")}
    grammar = {h.removeprefix("symbol "): phrasings for h, phrasings in single.items() if h.startswith("symbol ")}
    one, two = single["one event"], single["two events"]
    grammar |= {"gained": one.with_symbols(E="gain"), "lost": one.with_symbols(E="lose")}
    grammar |= {f"{a}_{b}": two.with_symbols(A=a, B=b) for a in ("gain", "lose") for b in ("gain", "lose")}
    verbs = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
    plain = {
        op: Story(single["ask"].with_symbols(E=verb) + single[f"plain x{op}y"], (f"x{op}y",))
        for op, verb in verbs.items()
    }
    stories = [_story(h.removeprefix("story "), phrasings) for h, phrasings in _sections() if h.startswith("story ")]
    return grammar, plain, stories


GRAMMAR, PLAIN, _STORIES = _read()
ONE_STEP = {op: [story for story in _STORIES if story.steps == (f"x{op}y",)] for op in "+-*"}
TWO_STEP = [story for story in _STORIES if len(story.steps) == 2]
