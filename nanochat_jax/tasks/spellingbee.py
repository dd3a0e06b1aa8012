"""SpellingBee asks how often a letter occurs in a word. SimpleSpelling asks for the spelling of a word.

A model sees tokens, not letters. So a SpellingBee answer first spells the word. Then it counts the letter step by step,
and checks the count with the calculator. SimpleSpelling teaches only the spelling. There are no spaces between the
letters of a spelling, because " a" and "a" are different tokens.
"""

import random
from pathlib import Path

from nanochat_jax.tasks import gsm8k, words
from nanochat_jax.tasks.task import Task

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEST_SEED = 10_000_000  # training problem i has the random seed i, and test problem i has the seed TEST_SEED + i
LETTER_IN_WORD = 0.9  # probability that the letter is drawn from the word; otherwise it is drawn from the alphabet
TRAIN_ROWS, TEST_ROWS = 80_000, 256

QUESTIONS = (
    "How many {letter} are in {word}",
    "How many {letter} are there in {word}",
    "How many {letter} are in the word {word}",
    "How many {letter} are there in the word {word}",
    "How many {letter} does {word} have",
    "How many {letter} does the word {word} have",
    "How many {letter} does {word} contain",
    "How many {letter} can you find in {word}",
    "How many {letter} do you see in {word}",
    "How many times is {letter} in {word}",
    "How many times is the letter {letter} in {word}",
    "How many times does {letter} occur in {word}",
    "How many times does {letter} appear in {word}",
    "How many times does the letter {letter} appear in the word {word}",
    "How many times do you need {letter} to write {word}",
    "How many of the letters in {word} are {letter}",
    "How often is {letter} used in {word}",
    "How often does {letter} come up in {word}",
    "How often does the letter {letter} occur in the word {word}",
    "Count the {letter} in {word}",
    "Count the letter {letter} in {word}",
    "Count how often {letter} is in {word}",
    "Please count the {letter} in the word {word}",
    "Can you count the letter {letter} in {word}",
    "Tell me the number of {letter} in {word}",
    "Tell me how many {letter} are in {word}",
    "What is the number of {letter} in {word}",
    "What is the count of {letter} in {word}",
    "In {word}, how many {letter} are there",
    "In the word {word}, how often is {letter}",
    "¿Cuántas {letter} hay en {word}",
    "¿Cuántas veces está {letter} en {word}",
    "¿Cuántas letras {letter} tiene {word}",
    "Cuenta las {letter} que hay en {word}",
    "{word}里有几个{letter}",
    "{word}中有多少个{letter}",
    "单词{word}里{letter}出现几次",
    "数一数{word}中的{letter}",
    "{word}에 {letter}가 몇 개 있나요",
    "{word}에는 {letter}가 몇 번 나오나요",
    "단어 {word}에서 {letter}의 개수는",
    "{word}에 있는 {letter}를 세어 주세요",
    "Combien de {letter} dans {word}",
    "Combien de fois {letter} est dans {word}",
    "Combien de lettres {letter} dans le mot {word}",
    "Wie viele {letter} sind in {word}",
    "Wie oft kommt {letter} in {word} vor",
    "Wie viele {letter} hat das Wort {word}",
    "{word}に{letter}はいくつありますか",
    "{word}の中に{letter}は何個ありますか",
    "{word}には{letter}が何回出てきますか",
)


def spell(word: str) -> str:
    """tree -> tree:t,r,e,e"""
    return f"{word}:{','.join(word)}"


class SpellingBee(Task):
    name = "SpellingBee"
    eval_type = "generative"
    suggestions = ("How many e are in element?", "How many r are in character?")

    def __init__(self, split: str, data_dir: str | Path | None = None, download: bool = False):
        self.split = split
        self.words = words.load(split, data_dir, download)

    def __len__(self) -> int:
        return TRAIN_ROWS if self.split == "train" else TEST_ROWS

    def example(self, index: int) -> dict:
        rng = random.Random(index if self.split == "train" else TEST_SEED + index)
        word = rng.choice(self.words)
        letter = rng.choice(word if rng.random() < LETTER_IN_WORD else LETTERS)
        question = rng.choice(QUESTIONS)
        if rng.random() < 0.3:
            question = question.lower()
        around_letter, around_word = rng.choice(("", "'", '"')), rng.choice(("", "'", '"'))
        question = question.format(
            letter=f"{around_letter}{letter}{around_letter}", word=f"{around_word}{word}{around_word}"
        )
        if rng.random() < 0.5:
            question += "?"
        count = str(word.count(letter))
        parts = [
            {"type": "text", "text": _count_by_hand(word, letter)},
            {"type": "text", "text": "\n\nI check this with Python:\n\n"},
            {"type": "python", "text": f"'{word}'.count('{letter}')"},
            {"type": "python_output", "text": count},
            {"type": "text", "text": f"\n\nPython counts {count} too.\n\n#### {count}"},
        ]
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return gsm8k.is_right(conversation, completion)

    def reward(self, conversation: dict, completion: str) -> float:
        return gsm8k.reward(conversation, completion)


def _count_by_hand(word: str, letter: str) -> str:
    """Returns a text with one line per character of `word`, such as "1:t" or "2:r hit! count=1"."""
    lines = [f"I look for '{letter}' in '{word}', letter by letter.", "", spell(word), ""]
    count = 0
    for position, character in enumerate(word, start=1):
        count += character == letter
        lines.append(f"{position}:{character}" + (f" hit! count={count}" if character == letter else ""))
    return "\n".join([*lines, "", f"That makes {count}."])


class SimpleSpelling(Task):
    name = "SimpleSpelling"
    eval_type = "generative"
    suggestions = ("Spell the word: library", "Spell the word: different")

    def __init__(self, split: str, data_dir: str | Path | None = None, download: bool = False):
        self.words = list(words.load(split, data_dir, download))
        random.Random(42).shuffle(self.words)

    def __len__(self) -> int:
        return len(self.words)

    def example(self, index: int) -> dict:
        word = self.words[index]
        return {
            "messages": [
                {"role": "user", "content": f"Spell the word: {word}"},
                {"role": "assistant", "content": spell(word)},
            ]
        }

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return completion.strip() == conversation["messages"][-1]["content"]
