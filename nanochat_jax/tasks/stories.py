"""The words of the generated word problems: a small grammar, and the stories that are told with it.

A story's text names its numbers as {} in the order x, y, z of its steps; r in a step is the result of the step before.
<symbols> are expanded by GRAMMAR. Every list of alternatives has three parts: those that training uses, those that only
validation adds to them, and those that only the test adds. A question of the latter two contains at least one that is
its own, so its phrasing never occurred in training. Validation may be looked at while a recipe is tuned. The test may
not: its phrasings were written before any model had answered them. They use no word that training does not use, so that
what is new about them is how the words are put together.

Fields: {n} {he} {He} {him} a person, {m} and {k} two others, {t} things, {box} {boxes} what they come in.
"""

import random
import re
from dataclasses import dataclass

Alternatives = tuple[str, ...]
Choices = tuple[Alternatives, Alternatives, Alternatives]  # of train, and what val and test add to them


@dataclass(frozen=True)
class Story:
    """Ways to tell one problem, the steps that solve it, what the result counts, and how large its numbers may be."""

    train: Alternatives
    val: Alternatives
    test: Alternatives
    steps: tuple[str, ...]
    unit: str
    largest: int = 300


_SYMBOL = re.compile(r"<(\w+)>")


def tell(story: Story, split: str, rng: random.Random) -> str:
    """The text of `story` with all symbols expanded; in val and test some part of it is only for that split."""
    while True:
        heard = []  # whether each choice was one that training does not use

        def choose(train: Alternatives, val: Alternatives, test: Alternatives, heard=heard) -> str:
            ways = train + {"train": (), "val": val, "test": test}[split]
            index = rng.randrange(len(ways))
            heard.append(index >= len(train))
            return ways[index]

        text = choose(story.train, story.val, story.test)
        while match := _SYMBOL.search(text):
            text = text[: match.start()] + choose(*GRAMMAR[match[1]]) + text[match.end() :]
        if split == "train" or any(heard):
            return text


def _one(event: str) -> Choices:
    """Sentences in which the event happens to {n}."""
    train = ("{He} <E>.", "Then {he} <E>.", "Today {he} <E>.", "{n} <E>.", "On Monday {he} <E>.")
    val = ("Later {he} <E>.", "After that, {he} <E>.")
    test = ("The next day {he} <E>.", "This morning {he} <E>.", "And then {he} <E>.")
    return _filled((train, val, test), E=event)


def _two(first: str, second: str) -> Choices:
    """Sentences in which two events happen to {n}, one after the other."""
    train = (
        "{He} <A> and then <B>.", "{He} <A>. Then {he} <B>.", "First {he} <A>. Then {he} <B>.", "{He} <A> and <B>.",
        "{He} <A>, then {he} <B>.", "Today {he} <A> and <B>.", "On Monday {he} <A>. On Tuesday {he} <B>.",
    )  # fmt: skip
    val = ("First {he} <A>, then {he} <B>.", "{He} <A>. Later {he} <B>.", "Today {he} <A> and then <B>.")
    test = (
        "On Monday {he} <A>. The next day {he} <B>.", "{He} first <A> and then <B>.",
        "In the morning {he} <A>, and in the evening {he} <B>.",
    )  # fmt: skip
    return _filled((train, val, test), A=first, B=second)


def _filled(choices: Choices, **symbols: str) -> Choices:
    """`choices` with <A> for the symbol that `symbols` gives for A, and so on."""

    def fill(text: str) -> str:
        for name, symbol in symbols.items():
            text = text.replace(f"<{name}>", f"<{symbol}>")
        return text

    train, val, test = (tuple(map(fill, alternatives)) for alternatives in choices)
    return train, val, test


GRAMMAR: dict[str, Choices] = {
    "start": (
        ("{n} has {} {t}.", "{n} owns {} {t}.", "{n} has {} {t} in a {box}.", "At first, {n} has {} {t}.",
         "{n} has a {box} with {} {t}.", "{n} has {} {t} at home."),
        ("{n} starts with {} {t}.", "At home, {n} has {} {t}."),
        ("{n} owns a {box} with {} {t}.", "In a {box}, {n} has {} {t}.", "This is {n}. {n} has {} {t}."),
    ),
    "packs": (
        ("{n} has {} {boxes} with {} {t} each.", "{n} buys {} {boxes} of {} {t}.", "{n} has {} {boxes} of {} {t} each.",
         "{n} buys {} {boxes}. Each {box} has {} {t} in it.", "{n} gets {} {boxes} with {} {t} in each {box}."),
        ("{n} has {} {boxes}. Each {box} has {} {t} in it.", "{n} gets {} {boxes} of {} {t} each."),
        ("{n} owns {} {boxes}. There are {} {t} in each {box}.", "{n} gets {} {boxes}. Each {box} holds {} {t}.",
         "In each of {} {boxes}, {n} has {} {t}."),
    ),
    "gain": (
        ("buys {} more", "gets {} more", "finds {} more", "gets {} more from {m}", "buys {} more {t}", "makes {} more",
         "gets another {}", "buys another {} {t}"),
        ("finds {} more {t}", "buys another {}", "gets {} more {t} from {m}"),
        ("gets another {} {t}", "finds another {}", "buys {} more from {m}", "makes {} more {t} at home"),
    ),
    "lose": (
        ("gives {} to {m}", "gives away {}", "loses {}", "sells {} of them", "gives {} of them to {m}", "sells {} {t}",
         "loses {} of them", "gives away {} of them"),
        ("gives away {} {t}", "gives {m} {} of them", "sells {} of them to {m}"),
        ("loses {} {t}", "gives {} of them away", "sells {m} {} {t}", "gives {} of the {t} to {m}"),
    ),
    "now": (
        ("How many {t} does {n} have now?", "How many {t} does {he} have now?",
         "How many {t} does {n} have in the end?", "Now how many {t} does {n} have?",
         "How many {t} does {he} have then?"),
        ("How many {t} does {he} have in the end?", "How many {t} does {n} have then?"),
        ("In the end, how many {t} does {he} have?", "And now, how many {t} does {n} have?",
         "Then how many {t} does {n} have in all?"),
    ),
    "total": (
        ("How many {t} does {n} have now?", "How many {t} does {n} have in total?",
         "How many {t} does {he} have in all?", "How many {t} does {n} have altogether?"),
        ("How many {t} does {he} have in total?", "How many {t} does {n} have in all?"),
        ("In total, how many {t} does {n} have?", "How many {t} is that altogether?",
         "In all, how many {t} does {he} have now?"),
    ),
    "left": (
        ("How many {t} does {n} have now?", "How many {t} are left?", "How many {t} does {n} have left?",
         "How many {t} does {he} still have?"),
        ("How many {t} does {he} have left?", "How many {t} does {n} still have?"),
        ("How many of the {t} are left?", "How many of the {t} does {n} still have?",
         "And how many {t} does {he} have now?"),
    ),
    "together": (
        ("How many {t} do they have together?", "How many {t} do they have in total?", "How many {t} do they have?"),
        ("How many {t} do {n} and {m} have together?", "How many {t} do they have in all?"),
        ("Together, how many {t} do they have?", "How many {t} do they have altogether?",
         "In all, how many {t} do they have?"),
    ),
    "money": (
        ("How much money does {n} have now?", "How many dollars does {n} have now?", "How much money does {he} have?"),
        ("How much money does {he} have now?",),
        ("How many dollars does {he} have in the end?", "In the end, how much money does {n} have?"),
    ),
    "money_left": (
        ("How much money is left?", "How many dollars are left?", "How much money does {n} have left?"),
        ("How many dollars does {n} have left?", "How much money does {he} have left?"),
        ("How much of the money is left?", "How many dollars does {he} still have?",
         "How much money does {n} still have?"),
    ),
    "gained": _one("gain"), "lost": _one("lose"),
    "gain_gain": _two("gain", "gain"), "gain_lose": _two("gain", "lose"),
    "lose_gain": _two("lose", "gain"), "lose_lose": _two("lose", "lose"),
    # Plain questions: ways to write a sum; what val and test add are ways to ask for it.
    "add": (("{} + {}", "{} + {}", "{}+{}", "{} plus {}", "the sum of {} and {}", "{} added to {}"), (), ()),
    "subtract": (("{} - {}", "{} - {}", "{}-{}", "{} minus {}", "the difference {} - {}"), (), ()),
    "multiply": (("{} * {}", "{} * {}", "{}*{}", "{} x {}", "{} times {}", "{} multiplied by {}"), (), ()),
    "divide": (("{} / {}", "{} / {}", "{}/{}", "{} divided by {}"), (), ()),
}  # fmt: skip
# Of more than two people: none of them is named.
_train, _val, _test = (tuple(s for s in ways if "{n}" not in s) for ways in GRAMMAR["together"])
GRAMMAR["all_together"] = (_train, _val, _test)


def _plain(symbol: str, step: str, *train: str) -> Story:
    """A question that is nothing but the sum."""
    ask = (
        "What is <E>?", "What is <E>?", "Compute <E>.", "Calculate <E>.", "<E>", "<E> = ?", "<E>=?", "What's <E>?",
        "How much is <E>?", "Solve <E>.", "Please compute <E>.", "Can you calculate <E>?", "What does <E> equal?",
        "Tell me what <E> is.", "What is the result of <E>?", "Find <E>.", "<E> =", "I need to know what <E> is.",
    )  # fmt: skip
    only_val = (
        "Please calculate <E>.", "Can you compute <E>?", "What is the value of <E>?", "Tell me the result of <E>.",
        "Can you tell me what <E> is?", "Please tell me: what is <E>?",
    )  # fmt: skip
    only_test = (
        "Please solve <E>.", "Can you find <E>?", "What is <E> equal to?", "How much does <E> equal?",
        "Do you know what <E> is?", "What do you get for <E>?", "What do I get if I compute <E>?",
        "Find the result of <E>.", "I need the result of <E>.", "Can you help me with <E>?", "<E> is how much?",
        "Tell me how much <E> is.", "Solve this: <E>.", "I need to calculate <E>.",
    )  # fmt: skip
    asked, val, test = _filled((ask, only_val, only_test), E=symbol)
    return Story(asked + train, val, test, (step,), "")


PLAIN = {
    "+": _plain("add", "x+y", "Add {} and {}.", "What do you get if you add {} and {}?",
                "{} is added to {}. What is the result?", "If {} is added to {}, what do you get?"),
    "-": _plain("subtract", "x-y", "What is {} take away {}?", "Find the difference of {} and {}."),
    "*": _plain("multiply", "x*y", "Multiply {} by {}.", "What is the product of {} and {}?",
                "{} is multiplied by {}. What is the result?", "If {} is multiplied by {}, what do you get?"),
    "/": _plain("divide", "x/y", "Divide {} by {}."),
}  # fmt: skip

ADDITIONS = (
    Story(("<start> <gained> <total>",), (), (), ("x+y",), "{t}"),
    Story(("<start> {m} gives {him} {} more. <total>",),
          ("<start> {m} brings {him} {} more. <total>",),
          ("<start> Then {m} gives {him} another {}. <total>",
           "<start> Today {m} gives {n} {} more {t}. <total>"),
          ("x+y",), "{t}"),
    Story(("{n} has {} {t} and {m} has {} {t}. <together>", "{n} has {} {t}. {m} has {}. <together>"),
          ("{n} has {} {t}. {m} has {} {t}. <together>",),
          ("{n} owns {} {t}, and {m} owns {}. <together>",
           "{n} has a {box} with {} {t}, and {m} has one with {}. <together>"),
          ("x+y",), "{t}"),
    Story(("A book costs {} dollars and a bag costs {} dollars. How much do they cost together?",
           "{n} buys a hat for {} dollars and a coat for {} dollars. How much does {he} spend?"),
          ("A hat costs {} dollars and a ball costs {} dollars. How much do both cost together?",
           "{n} buys a bag for {} dollars and a book for {} dollars. How many dollars does {he} spend?"),
          ("{n} spends {} dollars on a hat and {} dollars on a ball. How much does {he} spend in total?",
           "A coat costs {} dollars. A hat costs {} dollars. How many dollars do they cost in all?"),
          ("x+y",), "dollars"),
    Story(("There are {} people on a train. At the next stop {} more get on. How many people are on the train now?",
           "There are {} people in a park. Then {} more come. How many people are in the park now?"),
          ("There are {} people on a bus. Then {} more get on. How many people are on the bus now?",),
          ("{} people are on a bus, and at the next stop {} more get on. How many people are there on the bus now?",
           "In a shop there are {} people. Then {} more come in. How many people is that in total?"),
          ("x+y",), "people"),
    Story(("A school has {} girls and {} boys. How many children are there?",
           "There are {} girls and {} boys in a school. How many children are there in total?"),
          ("There are {} boys and {} girls at a party. How many children are there?",),
          ("{} boys and {} girls go to a school. How many children is that in all?",
           "In a park there are {} girls and {} boys. How many children are in the park?"),
          ("x+y",), "children"),
    Story(("{n} reads {} pages on Monday and {} pages on Tuesday. How many pages does {he} read in total?",
           "{n} reads {} pages today and {} pages the next day. How many pages is that in all?",
           "Today {n} reads {} pages, and the next day {} pages. How many pages does {he} read in all?"),
          ("On Monday {n} reads {} pages, and on Tuesday {} pages. How many pages is that in total?",),
          ("{n} reads {} pages today. The next day {he} reads {} pages. How many pages is that altogether?",
           "This morning {n} reads {} pages of a book. Then {he} reads another {}. How many pages is that in total?"),
          ("x+y",), "pages"),
)  # fmt: skip

SUBTRACTIONS = (
    Story(("<start> <lost> <left>",), (), (), ("x-y",), "{t}"),
    Story(("<start> {m} takes {} of them. <left>",), ("<start> {m} takes away {} of them. <left>",),
          ("<start> Then {m} takes {} {t} from {him}. <left>",
           "<start> Today {m} takes {}. <left>"),
          ("x-y",), "{t}"),
    Story(("{n} has {} {t} and {m} has {} {t}. How many more {t} does {n} have than {m}?",
           "{n} has {} {t}. {m} has {}. How many more does {n} have than {m}?",
           "{n} has {} {t}. {m} has {} {t}. How many more {t} does {n} have than {m}?",
           "{n} has {} {t} and {m} has {} {t}. How many more {t} does {n} have?"),
          ("{n} has {} {t}. {m} has {} {t}. How many more {t} does {n} have?",),
          ("If {n} has {} {t} and {m} has {} {t}, how many more {t} does {n} have than {m}?",
           "{n} owns {} {t}, and {m} owns {}. How many more does {n} have?"),
          ("x-y",), "{t}"),
    Story(("{n} has {} dollars and spends {} dollars on a book. <money_left>",
           "{n} has {} dollars. {He} buys a hat for {} dollars. <money_left>"),
          ("{n} has {} dollars. {He} spends {} dollars. <money_left>",),
          ("{n} has {} dollars and buys a coat for {} dollars. <money_left>",
           "{n} has {} dollars. On Monday {he} spends {} of them. <money_left>"),
          ("x-y",), "dollars"),
    Story(("There are {} people on a bus. At the next stop {} get off. How many people are on the bus now?",
           "There are {} people in a park. Then {} go home. How many people are left in the park?"),
          ("There are {} people on a train. Then {} get off. How many people are left on the train?",),
          ("{} people are on a train, and at the next stop {} of them get off. How many people are still on the train?",
           "There are {} people in a shop. {} of them go home. How many people are still in the shop?"),
          ("x-y",), "people"),
    Story(("A book has {} pages. {n} has read {} of them. How many pages are left to read?",
           "{n} reads a book with {} pages. {He} has read {} pages. How many pages are left?"),
          ("A book has {} pages. {n} reads {} pages. How many pages are left?",),
          ("There are {} pages in a book, and {n} has read {} of them. How many pages does {he} still have to read?",
           "{n} has a book with {} pages. Today {he} reads {} of them. How many pages are left to read?"),
          ("x-y",), "pages"),
    Story(("A shop has {} {t}. It sells {} of them. How many {t} are left?",
           "There are {} {t} in a shop. {n} buys {} of them. How many {t} are left in the shop?"),
          ("A shop has {} {t}. {n} buys {} of them. How many {t} are left in the shop?",),
          ("There are {} {t} in a shop, and the shop sells {} of them. How many {t} does the shop have now?",
           "{n} has a shop with {} {t}. {m} buys {} {t} there. How many {t} are still in the shop?"),
          ("x-y",), "{t}"),
)  # fmt: skip

MULTIPLICATIONS = (
    Story(("<packs> <total>",), (), (), ("x*y",), "{t}"),
    Story(("There are {} {boxes} with {} {t} each. How many {t} are there?",
           "There are {} {boxes}. Each {box} holds {} {t}. How many {t} are there in total?",
           "Each {box} holds {} {t}. How many {t} are in {} {boxes}?"),
          ("There are {} {boxes} with {} {t} in each {box}. How many {t} are there in all?",
           "Each {box} has {} {t} in it. How many {t} are in {} {boxes}?"),
          ("There are {} {t} in each {box}. How many {t} are there in {} {boxes}?",
           "How many {t} are in {} {boxes} if each {box} holds {}?"),
          ("x*y",), "{t}"),
    Story(("A ticket costs {} dollars. How much do {} tickets cost?",
           "{n} buys {} books for {} dollars each. How much does {he} pay?",
           "One ball costs {} dollars. {n} buys {} of them. How many dollars does {he} pay?"),
          ("A hat costs {} dollars. How many dollars do {} hats cost?",
           "{n} buys {} tickets for {} dollars each. How many dollars does {he} pay?"),
          ("{n} buys {} tickets. Each ticket costs {} dollars. How much money does {he} spend?",
           "How much do {} balls cost if one ball costs {} dollars?"),
          ("x*y",), "dollars"),
    Story(("{n} reads {} pages a day. How many pages does {he} read in {} days?",
           "Every day {n} reads {} pages. How many pages is that in {} days?"),
          ("{n} reads {} pages every day. How many pages does {he} read in {} days?",),
          ("{n} reads {} pages each day for {} days. How many pages is that in all?",
           "How many pages does {n} read in {} days if {he} reads {} pages a day?"),
          ("x*y",), "pages"),
    Story(("{n} earns {} dollars an hour. How much does {he} earn in {} hours?",
           "{n} saves {} dollars a week. How many dollars does {he} save in {} weeks?"),
          ("{n} earns {} dollars a week. How many dollars does {he} earn in {} weeks?",),
          ("Each week {n} saves {} dollars. How much money does {he} save in {} weeks?",
           "{n} earns {} dollars a day. How much money is that in {} days?"),
          ("x*y",), "dollars"),
    Story(("A hall has {} rows with {} seats each. How many seats are there?",
           "There are {} rows of seats with {} seats in each row. How many seats are there in total?"),
          ("There are {} rows with {} seats in each row. How many seats are there in all?",),
          ("There are {} rows in a hall, and each row has {} seats. How many seats does the hall have?",
           "A train has {} rows of {} seats each. How many seats are in the train?"),
          ("x*y",), "seats"),
)  # fmt: skip

ONE_STEP = {"+": ADDITIONS, "-": SUBTRACTIONS, "*": MULTIPLICATIONS}
