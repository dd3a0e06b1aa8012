"""Generated tasks: right answers, and three splits that share neither numbers nor names nor phrasings."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations

import pytest

from nanochat_jax import tasks
from nanochat_jax.config import REPOSITORY
from nanochat_jax.engine.calculator import use_calculator
from nanochat_jax.tasks import arithmetic, generated_choice, identity, stories
from nanochat_jax.tasks.gsm8k import extract_answer
from nanochat_jax.tasks.stories import TWO_STEP

SPLITS = ("train", "val", "test")
ONE_STEP = [story for group in stories.ONE_STEP.values() for story in group]


def text_of(conversation) -> str:
    return "".join(part["text"] for part in conversation["messages"][1]["content"])


def question_of(conversation) -> str:
    return conversation["messages"][-2]["content"]


# -----------------------------------------------------------------------------
# Arithmetic: answers


@pytest.mark.parametrize("name", ["sums", "twostep"])
@pytest.mark.parametrize("split", SPLITS)
def test_generated_answers_are_right(name, split):
    task = tasks.load(name, split, rows=1000)
    for conversation in task:
        question, parts = (message["content"] for message in conversation["messages"])
        assert not re.search(r"[{}<>]", question), question
        calls = [part["text"] for part in parts if part["type"] == "python"]
        outputs = [part["text"] for part in parts if part["type"] == "python_output"]
        assert len(calls) == {"sums": 1, "twostep": 2}[name]
        assert [use_calculator(call) for call in calls] == outputs
        assert extract_answer(parts[-1]["text"]) == outputs[-1]
        assert task.evaluate(conversation, text_of(conversation)) and not task.evaluate(conversation, "#### 1.5")
        # Every number of an expression is in the question, or is the result of the step before.
        known = re.findall(r"\d+", question) + outputs
        assert all(number in known for call in calls for number in re.findall(r"\d+", call))
        assert " " not in "".join(calls)
        if name == "sums":  # and in the question's order
            assert re.findall(r"\d+", question) == re.findall(r"\d+", calls[0])


def steps(conversation) -> list[tuple[int, str, int]]:
    calls = [part["text"] for part in conversation["messages"][1]["content"] if part["type"] == "python"]
    return [(int(a), op, int(b)) for a, op, b in (re.fullmatch(r"(-?\d+)(\D)(\d+)", call).groups() for call in calls)]


@pytest.mark.parametrize("split", ["val", "test"])
def test_sums_cover_what_they_promise(split):
    task = tasks.load("sums", split)
    assert len({question_of(c) for c in task}) > 900 and len(tasks.load("sums", "train")) == 100_000
    operators = Counter(steps(c)[0][1] for c in task)
    assert set(operators) == set("+-*") and min(operators.values()) > 250
    for a, op, b in (steps(c)[0] for c in task):
        assert all(2 <= n <= 99 if op == "*" else 0 <= n <= 999 for n in (a, b))
    words_in = [len(question_of(c).split()) for c in task]
    assert 350 < sum(n < 12 for n in words_in) < 650  # about half are plain
    assert any("-" in c["messages"][1]["content"][2]["text"] for c in task)  # negative results
    assert len({question_of(c) for c in tasks.load("twostep", split)}) > 900


def test_two_step_results_suit_a_story():
    for conversation in tasks.load("twostep", "train", rows=2000):
        outputs = [p["text"] for p in conversation["messages"][1]["content"] if p["type"] == "python_output"]
        assert all(0 < int(output) < 5000 for output in outputs)


def test_generated_tasks_are_the_same_everywhere():
    """Equal in another process with another hash seed."""
    code = (
        "import json; from nanochat_jax import tasks; "
        "print(json.dumps([tasks.load(n, s)[i] for n in ('sums', 'twostep', 'choice', 'identity') "
        "for s in ('train', 'val', 'test') for i in (0, 7)]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "123"},
        cwd=REPOSITORY,
    )
    here = [tasks.load(n, s)[i] for n in ("sums", "twostep", "choice", "identity") for s in SPLITS for i in (0, 7)]
    assert json.loads(run.stdout.splitlines()[-1]) == here


# -----------------------------------------------------------------------------
# Arithmetic: what the splits do not share


def test_no_two_splits_share_numbers():
    seen = {split: set() for split in SPLITS}
    for name in ("sums", "twostep"):
        for split in SPLITS:
            for conversation in tasks.load(name, split, rows=6000 if split == "train" else 0):
                for a, op, b in steps(conversation):
                    seen[split] |= {(a, op, b), (b, op, a)} if op in "+*" else {(a, op, b)}
    assert len(seen["train"]) > 10_000 and len(seen["val"]) > 1500 and len(seen["test"]) > 1500
    assert not any(seen[one] & seen[other] for one, other in combinations(SPLITS, 2))


def test_no_two_splits_share_people():
    people = {split: set(arithmetic.WOMEN[split] + arithmetic.MEN[split]) for split in SPLITS}
    assert not any(people[one] & people[other] for one, other in combinations(SPLITS, 2))
    for split in SPLITS:
        task = tasks.load("twostep", split, rows=3000 if split == "train" else 0)
        named = {word for c in task for word in re.findall(r"\b[A-Z][a-z]+\b", question_of(c))}
        assert [other for other in SPLITS if named & people[other]] == [split] and people[split] <= named


BEGINNING = re.compile("|".join(f"^{re.escape(start)} " for start in arithmetic.SCENES + arithmetic.OPENINGS))
SAME = {person.lower(): "person" for split in SPLITS for person in arithmetic.WOMEN[split] + arithmetic.MEN[split]}
SAME |= dict.fromkeys("he she him her his".split(), "person")
SAME |= dict.fromkeys(arithmetic.THINGS, "things")
SAME |= dict.fromkeys([name for names in arithmetic.BOXES for name in names], "things")
SAME |= dict.fromkeys("book bag hat coat ball ticket shirt drink ride".split(), "thing")
SAME |= dict.fromkeys("bus train plane park street garage school party shop hall farm garden".split(), "place")
SAME |= dict.fromkeys("monday tuesday".split(), "day")
SAME |= dict.fromkeys("boys girls men women cows goats sheep".split(), "beings")


def phrasing(text: str) -> str:
    """A question reduced to its phrasing: without an unrelated beginning, and with numbers, case, punctuation and the
    names of people, things, places and days normalized."""
    words = re.findall(r"\{\}|[a-z']+|[-+*/=]", re.sub(r"\d+", " {} ", BEGINNING.sub("", text)).lower())
    return " ".join(SAME.get(word, word) for word in words)


@pytest.mark.parametrize("name", ["sums", "twostep"])
def test_no_two_splits_share_phrasings(name):
    phrasings = {split: {phrasing(question_of(c)) for c in tasks.load(name, split)} for split in SPLITS}
    assert len(phrasings["train"]) > 5000 and len(phrasings["val"]) > 200 and len(phrasings["test"]) > 300
    assert not any(phrasings[one] & phrasings[other] for one, other in combinations(SPLITS, 2))


def test_every_telling_names_the_numbers_of_its_steps():
    for story in [*stories.PLAIN.values(), *ONE_STEP, *TWO_STEP]:
        numbers = len(set("".join(story.steps)) & set("xyz"))
        for split in SPLITS:
            if not stories.stories_for(split, [story]):
                continue
            for i in range(100):
                text = stories.tell(story, split, random.Random(i))
                assert text.count("{}") == numbers, text
                assert not ("{k}" in text and "do {n} and {m} have" in text), text  # the sum is of all three


def unknown_words(text: str, known: set[str]) -> list[str]:
    """The words of `text` that are not in `known`; at the start of a sentence, either case will do."""
    unknown = []
    for match in re.finditer(r"(?P<start>^|[.?!:] |Hello, )?\b(?P<word>[A-Za-z']+)\b", text):
        word = match["word"]
        cases = {word} if match["start"] is None else {word, word[0].swapcase() + word[1:]}
        if not cases & known:
            unknown.append(word)
    return unknown


@pytest.mark.parametrize(
    ("name", "own_stories"),
    [("sums", [story for op, story in stories.PLAIN.items() if op != "/"] + ONE_STEP), ("twostep", TWO_STEP)],
)
def test_the_test_asks_in_words_that_training_uses(name, own_stories):
    phrasings = [*stories.GRAMMAR.values(), *(story.phrasings for story in own_stories)]
    texts = [re.sub(r"<\w+>|\{\w*\}", "1", text) for group in phrasings for text in group.train]
    trained = " ".join([*texts, *arithmetic.SCENES, *arithmetic.OPENINGS, ""])
    trained += " ".join(question_of(c) for c in tasks.load(name, "train", rows=2000))  # names of things
    people = arithmetic.WOMEN["test"] + arithmetic.MEN["test"]
    known = {"'s", *re.findall(r"[A-Za-z']+", trained), *people, *(f"{person}'s" for person in people)}
    for conversation in tasks.load(name, "test"):
        assert not unknown_words(question_of(conversation), known), question_of(conversation)
    for story in stories.stories_for("test", own_stories):  # the rare ones too
        for i in range(200):
            text = re.sub(r"\{\w*\}", "1", stories.tell(story, "test", random.Random(i)))
            assert not unknown_words(text, known), text
    assert unknown_words("Then she embezzles 3. How come?", known | {"how"}) == ["embezzles"]


# -----------------------------------------------------------------------------
# Multiple choice and identity


def test_choices_are_right_and_comparisons_disjoint():
    def comparisons(split, count):
        found = set()
        for conversation in tasks.load("choice", split, rows=count):
            user, letter = (message["content"] for message in conversation["messages"])
            question = re.match(r"Multiple Choice question: (.*)", user)[1]
            choices = {match[2]: match[1] for match in re.finditer(r"- (.*)=([A-D])", user)}
            answer = choices.pop(letter)
            assert len({answer, *choices.values()}) == 4
            if "largest" in question:
                assert int(answer) > max(map(int, choices.values()))
            if "smallest" in question:
                assert int(answer) < min(map(int, choices.values()))
            if initial := re.search(r"letter (\w)\?", question):
                assert answer[0] == initial[1] and all(word[0] != initial[1] for word in choices.values())
            found.update((question, answer, other) for other in choices.values())
        return found

    found = {split: comparisons(split, 5000 if split == "train" else 1000) for split in SPLITS}
    assert not any(found[one] & found[other] for one, other in combinations(SPLITS, 2))
    for split in ("val", "test"):
        letters = Counter(c["messages"][1]["content"] for c in tasks.load("choice", split))
        assert all(200 < letters[letter] < 300 for letter in generated_choice.LETTERS)


def test_kinds_and_opposites_have_one_right_answer():
    members = [word for words_ in generated_choice.KINDS.values() for word in words_]
    assert len(members) == len(set(members))
    both = [word for pair in generated_choice.OPPOSITES for word in pair]
    assert len(both) == len(set(both))


def test_identity_is_written_once_and_can_be_replaced(own_base_dir, tmp_path):
    task = tasks.load("identity", "train")
    file = own_base_dir / identity.FILE
    assert len(task) == 1000 == len(file.read_text(encoding="utf-8").splitlines())
    for conversation in task:
        roles = [message["role"] for message in conversation["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and 2 <= len(roles) <= 6
    mine = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    file.write_text(json.dumps(mine) + "\n", encoding="utf-8")
    assert [c["messages"] for c in tasks.load("identity", "train")] == [mine]
    (tmp_path / "tasks").mkdir()
    with gzip.open(tmp_path / "tasks" / f"{identity.FILE}.gz", "wt", encoding="utf-8") as f:
        f.write(json.dumps(mine) * 1 + "\n" + json.dumps(mine) + "\n")
    assert len(tasks.load("identity", "train", data_dir=tmp_path / "tasks")) == 2


def test_identity_asks_what_it_did_not_teach():
    taught = {m["content"] for c in tasks.load("identity", "train") for m in c["messages"] if m["role"] == "user"}
    asked = {"train": {phrasing(question) for question in taught}}
    for split in ("val", "test"):
        task = tasks.load("identity", split)
        assert len(task) >= 40 and not taught & {question_of(c) for c in task}
        asked[split] = {" ".join(re.findall(r"[a-z']+", question_of(c).lower())) for c in task}
        for conversation in task:
            assert task.evaluate(conversation, conversation["messages"][-1]["content"])
            assert not task.evaluate(conversation, "I do not know.")
    assert not asked["test"] & (asked["train"] | asked["val"]) and len(asked["test"]) >= len(asked["val"])
    known = {word for question in taught for word in re.findall(r"[A-Za-z']+", question)}
    for conversation in tasks.load("identity", "test"):
        assert not unknown_words(question_of(conversation), known), question_of(conversation)
    val = tasks.load("identity", "val")
    who = next(c for c in val if c["messages"][0]["content"] == "So who are you?")
    assert val.evaluate(who, "My name is NanoChat!") and not val.evaluate(who, "My name is ChatGPT.")
