"""Provides the words of the spelling tasks. Some words are held out of training and used only for the test.

The words are read from the first of these files that exists:

- words/words_alpha.txt in the task data folder
- with --task_files=published, task_data/words_alpha.txt in the base folder, which is downloaded (published.py)
- task_data/words.txt in the base folder

If none of these files exists, task_data/words.txt is written, and used from then on. It holds the frequent words of the
text that the tokenizer was trained on. So the words stay the same when pretraining text is added later. A printed line
says which words are used.
"""

import collections
import functools
import itertools
import re
import zlib
from pathlib import Path

from nanochat_jax.config import UserError, base_dir
from nanochat_jax.data import parquet, sources
from nanochat_jax.files import write_text
from nanochat_jax.tasks import published, task_data

HOLD_OUT = 10  # about one in HOLD_OUT words is only for the test; a hash of the word decides
CORPUS_CHARS = 50_000_000  # words are counted in this many characters of text, enough to find all frequent words
CORPUS_WORDS = 20_000  # maximum number of words; the most frequent words are kept
MIN_COUNT = 3  # a word must occur at least this many times; rarer words are mostly typos and variable names

# Matches a lowercase word, but not a part of an identifier, a number, a path or a dotted name.
_WORD = re.compile(r"(?<![\w./\\-])[a-z]{3,12}(?![\w/\\-]|\.\w|:/)", re.ASCII)


def load(split: str, data_dir: str | Path | None = None, download: bool = False) -> tuple[str, ...]:
    """Returns the words of `split`, "train" or "test". No word is in both splits.

    Raises UserError if the split has no words.
    """
    words = _all_words(str(data_dir or ""), base_dir(), download)
    chosen = tuple(word for word in words if held_out(word) == (split == "test"))
    if not chosen:
        raise UserError(f"only {len(words)} words found, none of them for {split}: the spelling tasks need more words")
    return chosen


def held_out(word: str) -> bool:
    """Whether `word` is only for the test."""
    return zlib.crc32(word.encode()) % HOLD_OUT == 0


@functools.cache  # both spelling tasks call this function, each for train and for test
def _all_words(data_dir: str, base: Path, download: bool) -> list[str]:
    path, why = None, "--task_files=generated"
    if data_dir:
        path = task_data.find(Path(data_dir) / "words" / "words_alpha.txt")
    if path is None and download:
        path, why = published.find(published.WORDS)
    described = ""
    if path is None:
        path = base / "task_data" / "words.txt"
        if not path.is_file():
            write_text(path, "\n".join(_corpus_words()) + "\n")
        described = f", the frequent words of the pretraining text ({why})"
    words = [word for line in task_data.read_text(path).split("\n") if (word := line.strip())]
    if not words:
        raise UserError(f"{path}: empty")
    print(f"words to spell: {len(words):,} of {path}{described}", flush=True)
    return words


def _corpus_words() -> list[str]:
    """Returns the frequent words of the text that the tokenizer was trained on, the most frequent first."""
    try:
        source = sources.open(build=False)
    except UserError as error:
        raise UserError(
            f"no words to spell: no words/words_alpha.txt in a --task_data_dir, and no text to take them from: {error}"
        ) from None
    files = [path for path in (*source.train_files, *source.val_files) if path.exists()]
    counts, chars = collections.Counter(), 0
    for text in itertools.chain.from_iterable(map(parquet.texts_of, files)):
        counts.update(_WORD.findall(text))
        chars += len(text)
        if chars > CORPUS_CHARS:
            break
    frequent = [word for word, count in counts.items() if count >= MIN_COUNT]
    if not frequent:
        raise UserError(
            f"no words to spell: {source.name} has no frequent words, and no --task_data_dir has words/words_alpha.txt"
        )
    words = sorted(frequent, key=lambda word: (-counts[word], word))[:CORPUS_WORDS]
    print(f"words for the spelling tasks: the {len(words):,} most frequent words of {source.name}", flush=True)
    return words
