"""The words of the generated word problems: a small grammar, and the stories that are told with it.

A story's text names its numbers as {} in the order x, y, z of its steps; r in a step is the result of the step before.
<symbols> are expanded by GRAMMAR. Every list of alternatives has two parts: those that training uses, and those that
only testing uses. A test question contains at least one of the latter, so its phrasing never occurred in training.

Fields: {n} {he} {He} {him} a person, {m} and {k} two others, {t} things, {box} {boxes} what they come in.
"""

import random
import re
from dataclasses import dataclass

Alternatives = tuple[str, ...]


@dataclass(frozen=True)
class Story:
    """Ways to tell one problem, the steps that solve it, what the result counts, and how large its numbers may be."""

    train: Alternatives
    test: Alternatives
    steps: tuple[str, ...]
    unit: str
    largest: int = 300


_SYMBOL = re.compile(r"<(\w+)>")


def tell(story: Story, split: str, rng: random.Random) -> str:
    """The text of `story` with all symbols expanded; in the test split some part of it is only for testing."""
    while True:
        heard = []  # whether each choice was one that only testing uses

        def choose(train: Alternatives, test: Alternatives, heard=heard) -> str:
            index = rng.randrange(len(train) + (len(test) if split == "test" else 0))
            heard.append(index >= len(train))
            return (train + test)[index]

        text = choose(story.train, story.test)
        while match := _SYMBOL.search(text):
            text = text[: match.start()] + choose(*GRAMMAR[match[1]]) + text[match.end() :]
        if split == "train" or any(heard):
            return text


def _one(event: str) -> tuple[Alternatives, Alternatives]:
    """Sentences in which the event happens to {n}."""
    train = ("{He} <E>.", "Then {he} <E>.", "Today {he} <E>.", "{n} <E>.", "On Monday {he} <E>.")
    test = ("Later {he} <E>.", "After that, {he} <E>.")
    return tuple(s.replace("E", event) for s in train), tuple(s.replace("E", event) for s in test)


def _two(first: str, second: str) -> tuple[Alternatives, Alternatives]:
    """Sentences in which two events happen to {n}, one after the other."""
    train = (
        "{He} <A> and then <B>.", "{He} <A>. Then {he} <B>.", "First {he} <A>. Then {he} <B>.", "{He} <A> and <B>.",
        "{He} <A>, then {he} <B>.", "Today {he} <A> and <B>.", "On Monday {he} <A>. On Tuesday {he} <B>.",
    )  # fmt: skip
    test = ("First {he} <A>, then {he} <B>.", "{He} <A>. Later {he} <B>.", "Today {he} <A> and then <B>.")
    return (
        tuple(s.replace("A", first).replace("B", second) for s in train),
        tuple(s.replace("A", first).replace("B", second) for s in test),
    )


GRAMMAR: dict[str, tuple[Alternatives, Alternatives]] = {
    "start": (
        ("{n} has {} {t}.", "{n} owns {} {t}.", "{n} has {} {t} in a {box}.", "At first, {n} has {} {t}.",
         "{n} has a {box} with {} {t}.", "{n} has {} {t} at home."),
        ("{n} starts with {} {t}.", "At home, {n} has {} {t}."),
    ),
    "packs": (
        ("{n} has {} {boxes} with {} {t} each.", "{n} buys {} {boxes} of {} {t}.", "{n} has {} {boxes} of {} {t} each.",
         "{n} buys {} {boxes}. Each {box} has {} {t} in it.", "{n} gets {} {boxes} with {} {t} in each {box}."),
        ("{n} has {} {boxes}. Each {box} has {} {t} in it.", "{n} gets {} {boxes} of {} {t} each."),
    ),
    "gain": (
        ("buys {} more", "gets {} more", "finds {} more", "gets {} more from {m}", "buys {} more {t}", "makes {} more",
         "gets another {}", "buys another {} {t}"),
        ("finds {} more {t}", "buys another {}", "gets {} more {t} from {m}"),
    ),
    "lose": (
        ("gives {} to {m}", "gives away {}", "loses {}", "sells {} of them", "gives {} of them to {m}", "sells {} {t}",
         "loses {} of them", "gives away {} of them"),
        ("gives away {} {t}", "gives {m} {} of them", "sells {} of them to {m}"),
    ),
    "now": (
        ("How many {t} does {n} have now?", "How many {t} does {he} have now?",
         "How many {t} does {n} have in the end?", "Now how many {t} does {n} have?",
         "How many {t} does {he} have then?"),
        ("How many {t} does {he} have in the end?", "How many {t} does {n} have then?"),
    ),
    "total": (
        ("How many {t} does {n} have now?", "How many {t} does {n} have in total?",
         "How many {t} does {he} have in all?", "How many {t} does {n} have altogether?"),
        ("How many {t} does {he} have in total?", "How many {t} does {n} have in all?"),
    ),
    "left": (
        ("How many {t} does {n} have now?", "How many {t} are left?", "How many {t} does {n} have left?",
         "How many {t} does {he} still have?"),
        ("How many {t} does {he} have left?", "How many {t} does {n} still have?"),
    ),
    "together": (
        ("How many {t} do they have together?", "How many {t} do they have in total?", "How many {t} do they have?"),
        ("How many {t} do {n} and {m} have together?", "How many {t} do they have in all?"),
    ),
    "money": (
        ("How much money does {n} have now?", "How many dollars does {n} have now?", "How much money does {he} have?"),
        ("How much money does {he} have now?",),
    ),
    "money_left": (
        ("How much money is left?", "How many dollars are left?", "How much money does {n} have left?"),
        ("How many dollars does {n} have left?", "How much money does {he} have left?"),
    ),
    "gained": _one("gain"), "lost": _one("lose"),
    "gain_gain": _two("gain", "gain"), "gain_lose": _two("gain", "lose"),
    "lose_gain": _two("lose", "gain"), "lose_lose": _two("lose", "lose"),
    # Plain questions: ways to write a sum; what testing holds out are ways to ask for it.
    "add": (("{} + {}", "{} + {}", "{}+{}", "{} plus {}", "the sum of {} and {}", "{} added to {}"), ()),
    "subtract": (("{} - {}", "{} - {}", "{}-{}", "{} minus {}", "the difference {} - {}"), ()),
    "multiply": (("{} * {}", "{} * {}", "{}*{}", "{} x {}", "{} times {}", "{} multiplied by {}"), ()),
    "divide": (("{} / {}", "{} / {}", "{}/{}", "{} divided by {}"), ()),
}  # fmt: skip


def _plain(symbol: str, step: str, *train: str) -> Story:
    """A question that is nothing but the sum."""
    ask = (
        "What is <E>?", "What is <E>?", "Compute <E>.", "Calculate <E>.", "<E>", "<E> = ?", "<E>=?", "What's <E>?",
        "How much is <E>?", "Solve <E>.", "Please compute <E>.", "Can you calculate <E>?", "What does <E> equal?",
        "Tell me what <E> is.", "What is the result of <E>?", "Find <E>.", "<E> =", "I need to know what <E> is.",
    )  # fmt: skip
    only_test = (
        "Please calculate <E>.", "Can you compute <E>?", "What is the value of <E>?", "Tell me the result of <E>.",
        "Can you tell me what <E> is?", "Please tell me: what is <E>?",
    )  # fmt: skip
    return Story(
        tuple(s.replace("E", symbol) for s in ask) + train,
        tuple(s.replace("E", symbol) for s in only_test),
        (step,),
        "",
    )


PLAIN = {
    "+": _plain("add", "x+y", "Add {} and {}.", "What do you get if you add {} and {}?",
                "{} is added to {}. What is the result?", "If {} is added to {}, what do you get?"),
    "-": _plain("subtract", "x-y", "What is {} take away {}?", "Find the difference of {} and {}."),
    "*": _plain("multiply", "x*y", "Multiply {} by {}.", "What is the product of {} and {}?",
                "{} is multiplied by {}. What is the result?", "If {} is multiplied by {}, what do you get?"),
    "/": _plain("divide", "x/y", "Divide {} by {}."),
}

ADDITIONS = (
    Story(("<start> <gained> <total>",), (), ("x+y",), "{t}"),
    Story(("<start> {m} gives {him} {} more. <total>",),
          ("<start> {m} brings {him} {} more. <total>",), ("x+y",), "{t}"),
    Story(("{n} has {} {t} and {m} has {} {t}. <together>", "{n} has {} {t}. {m} has {}. <together>"),
          ("{n} has {} {t}. {m} has {} {t}. <together>",), ("x+y",), "{t}"),
    Story(("A book costs {} dollars and a bag costs {} dollars. How much do they cost together?",
           "{n} buys a hat for {} dollars and a coat for {} dollars. How much does {he} spend?"),
          ("A hat costs {} dollars and a ball costs {} dollars. How much do both cost together?",
           "{n} buys a bag for {} dollars and a book for {} dollars. How many dollars does {he} spend?"),
          ("x+y",), "dollars"),
    Story(("There are {} people on a train. At the next stop {} more get on. How many people are on the train now?",
           "There are {} people in a park. Then {} more come. How many people are in the park now?"),
          ("There are {} people on a bus. Then {} more get on. How many people are on the bus now?",),
          ("x+y",), "people"),
    Story(("A school has {} girls and {} boys. How many children are there?",
           "There are {} girls and {} boys in a school. How many children are there in total?"),
          ("There are {} boys and {} girls at a party. How many children are there?",), ("x+y",), "children"),
    Story(("{n} reads {} pages on Monday and {} pages on Tuesday. How many pages does {he} read in total?",
           "{n} reads {} pages today and {} pages the next day. How many pages is that in all?",
           "Today {n} reads {} pages, and the next day {} pages. How many pages does {he} read in all?"),
          ("On Monday {n} reads {} pages, and on Tuesday {} pages. How many pages is that in total?",),
          ("x+y",), "pages"),
)  # fmt: skip

SUBTRACTIONS = (
    Story(("<start> <lost> <left>",), (), ("x-y",), "{t}"),
    Story(("<start> {m} takes {} of them. <left>",), ("<start> {m} takes away {} of them. <left>",), ("x-y",), "{t}"),
    Story(("{n} has {} {t} and {m} has {} {t}. How many more {t} does {n} have than {m}?",
           "{n} has {} {t}. {m} has {}. How many more does {n} have than {m}?",
           "{n} has {} {t}. {m} has {} {t}. How many more {t} does {n} have than {m}?",
           "{n} has {} {t} and {m} has {} {t}. How many more {t} does {n} have?"),
          ("{n} has {} {t}. {m} has {} {t}. How many more {t} does {n} have?",), ("x-y",), "{t}"),
    Story(("{n} has {} dollars and spends {} dollars on a book. <money_left>",
           "{n} has {} dollars. {He} buys a hat for {} dollars. <money_left>"),
          ("{n} has {} dollars. {He} spends {} dollars. <money_left>",), ("x-y",), "dollars"),
    Story(("There are {} people on a bus. At the next stop {} get off. How many people are on the bus now?",
           "There are {} people in a park. Then {} go home. How many people are left in the park?"),
          ("There are {} people on a train. Then {} get off. How many people are left on the train?",),
          ("x-y",), "people"),
    Story(("A book has {} pages. {n} has read {} of them. How many pages are left to read?",
           "{n} reads a book with {} pages. {He} has read {} pages. How many pages are left?"),
          ("A book has {} pages. {n} reads {} pages. How many pages are left?",), ("x-y",), "pages"),
    Story(("A shop has {} {t}. It sells {} of them. How many {t} are left?",
           "There are {} {t} in a shop. {n} buys {} of them. How many {t} are left in the shop?"),
          ("A shop has {} {t}. {n} buys {} of them. How many {t} are left in the shop?",), ("x-y",), "{t}"),
)  # fmt: skip

MULTIPLICATIONS = (
    Story(("<packs> <total>",), (), ("x*y",), "{t}"),
    Story(("There are {} {boxes} with {} {t} each. How many {t} are there?",
           "There are {} {boxes}. Each {box} holds {} {t}. How many {t} are there in total?",
           "Each {box} holds {} {t}. How many {t} are in {} {boxes}?"),
          ("There are {} {boxes} with {} {t} in each {box}. How many {t} are there in all?",
           "Each {box} has {} {t} in it. How many {t} are in {} {boxes}?"), ("x*y",), "{t}"),
    Story(("A ticket costs {} dollars. How much do {} tickets cost?",
           "{n} buys {} books for {} dollars each. How much does {he} pay?",
           "One ball costs {} dollars. {n} buys {} of them. How many dollars does {he} pay?"),
          ("A hat costs {} dollars. How many dollars do {} hats cost?",
           "{n} buys {} tickets for {} dollars each. How many dollars does {he} pay?"), ("x*y",), "dollars"),
    Story(("{n} reads {} pages a day. How many pages does {he} read in {} days?",
           "Every day {n} reads {} pages. How many pages is that in {} days?"),
          ("{n} reads {} pages every day. How many pages does {he} read in {} days?",), ("x*y",), "pages"),
    Story(("{n} earns {} dollars an hour. How much does {he} earn in {} hours?",
           "{n} saves {} dollars a week. How many dollars does {he} save in {} weeks?"),
          ("{n} earns {} dollars a week. How many dollars does {he} earn in {} weeks?",), ("x*y",), "dollars"),
    Story(("A hall has {} rows with {} seats each. How many seats are there?",
           "There are {} rows of seats with {} seats in each row. How many seats are there in total?"),
          ("There are {} rows with {} seats in each row. How many seats are there in all?",), ("x*y",), "seats"),
)  # fmt: skip

ONE_STEP = {"+": ADDITIONS, "-": SUBTRACTIONS, "*": MULTIPLICATIONS}
