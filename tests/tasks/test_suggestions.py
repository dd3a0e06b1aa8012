"""The questions that the page and the terminal suggest are questions that the model's tasks have taught."""

import re
import tomllib

import pytest

from nanochat_jax import config, tasks
from nanochat_jax.config import REPOSITORY
from nanochat_jax.tasks import arithmetic, identity, spellingbee, stories, words

PRESETS = [path.stem for path in (REPOSITORY / "configs").glob("*.toml")]


def pattern(text: str) -> str:
    """A regular expression for the texts that the training split makes from a phrasing."""
    pieces = re.split(r"(<\w+>|\{\w*\})", text)
    for i in range(1, len(pieces), 2):
        if pieces[i].startswith("<"):
            pieces[i] = "(?:" + "|".join(pattern(other) for other in set(stories.GRAMMAR[pieces[i][1:-1]].train)) + ")"
        else:
            pieces[i] = r"(\d+)" if pieces[i] == "{}" else r"\w+"
    return "".join(piece if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))


@pytest.mark.parametrize(("task", "told"), [
    (arithmetic.Sums, list(stories.PLAIN.values())),
    (arithmetic.TwoStep, stories.TWO_STEP),
])  # fmt: skip
def test_arithmetic_is_worded_as_in_training_with_numbers_that_are_not(task, told):
    # Phrasings with several symbols stand for very many texts. A suggestion is short, so it comes from the others.
    short = [(story.steps, pattern(text)) for story in told for text in story.phrasings.train if text.count("<") < 2]
    for question in task.suggestions:
        (steps,) = {steps for steps, texts in short if re.fullmatch(texts, question)}
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        operations = arithmetic._operations(steps, numbers)
        assert all(arithmetic.split_of(*operation) == "test" for operation in operations), question
    assert not any(re.fullmatch(texts, "Why is 1 more than 2?") for _, texts in short)


def test_the_other_generated_tasks_are_worded_as_in_training():
    for question in spellingbee.SpellingBee.suggestions:
        match = re.fullmatch(r"How many ([a-z]) are in ([a-z]+)\?", question)
        assert match and match[1] in match[2] and not words.held_out(match[2])
        assert question.rstrip("?") in [text.format(letter=match[1], word=match[2]) for text in spellingbee.QUESTIONS]
    taught = [question for topic in identity.ABOUT for question in topic.train]
    assert set(identity.Identity.suggestions) <= set(taught)


def test_simple_spelling(own_base_dir):
    for question in spellingbee.SimpleSpelling.suggestions:
        word = question.rpartition(" ")[2]
        (own_base_dir / "task_data").mkdir(parents=True, exist_ok=True)
        (own_base_dir / "task_data" / "words.txt").write_text(f"{word}\n")
        words._all_words.cache_clear()
        (conversation,) = tasks.load("simplespelling", "train")
        assert conversation["messages"][0]["content"] == question


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("settings", [config.Mid, config.Sft, config.Rl])
def test_every_preset_suggests_something_of_its_own_tasks(preset, settings):
    document = tomllib.loads((REPOSITORY / "configs" / f"{preset}.toml").read_text(encoding="utf-8"))
    mixture = document.get(settings.table, {}).get("mixture", settings().mixture)
    found = tasks.suggestions(mixture)
    own = {question for name in mixture for question in tasks.task_class(name).suggestions}
    assert len(found) >= 2 and set(found) == own
    if preset == "cpu":  # this model knows neither the sky nor poems, and it cannot write letters
        assert not own & set(tasks.TASKS["smoltalk"].suggestions)


def test_order_and_unknown_tasks():
    assert tasks.suggestions(["identity", "SUMS", "customjson:mine.jsonl", "a task of the future", "mmlu"]) == [
        "Who are you?", "What is 28 times 13?", "What can you do?", "What is 120 + 72?",
    ]  # fmt: skip
    assert tasks.suggestions([]) == []
