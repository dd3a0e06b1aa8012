"""Reads the documents of a file, and shuffles documents.

In: a .parquet, .jsonl, .jsonl.gz or .txt file. Out: documents, each a str.
"""

import gzip
import json
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanochat_jax.config import UserError, first_line
from nanochat_jax.data import parquet

SHUFFLE_CHARS = 1_000_000_000  # documents are shuffled in groups of about this many characters, to limit memory use
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".txt")


def documents(path: Path, counts: Counter[str] | None = None) -> Iterator[str]:
    """Yields the documents of a file. Empty documents are skipped, and long documents are split.

    Raises UserError if any part of the file cannot be read. `counts` is updated with the number of documents.
    Separate entries count the documents that are empty, longer than MAX_CHARS, or not valid Unicode.
    """
    counts = Counter() if counts is None else counts
    for text in parquet.texts_of(path) if path.suffix == ".parquet" else _read_documents(path):
        counts["documents"] += 1
        if not text.strip():
            counts["empty, skipped"] += 1
            continue
        if not text.isascii() and (clean := text.encode("utf-8", "ignore").decode("utf-8")) != text:
            counts["with lone surrogates, which are left out"] += 1
            text = clean
        if len(text) > parquet.MAX_CHARS:
            counts[f"longer than {parquet.MAX_CHARS:,} characters, cut"] += 1
        yield from parquet.split_long(text)


def _read_documents(path: Path) -> Iterator[str]:
    """Yields the documents of a .jsonl, .jsonl.gz or .txt file, including empty documents."""
    try:
        if path.suffix == ".txt":
            yield from _paragraphs(path.read_text(encoding="utf-8"))
            return
        opener = gzip.open if path.suffix == ".gz" else Path.open
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}, line {number}"
                try:
                    line = line.decode("utf-8").lstrip("\ufeff")
                except UnicodeDecodeError as error:
                    raise UserError(f"{where}: not UTF-8 ({error})") from error
                if line.strip():
                    yield _json_text(line, where)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error


def _json_text(line: str, where: str) -> str:
    """Returns the text in a line of JSON: '{"text": "Hello", "id": 7}' -> "Hello".

    Raises UserError if the line has no text. The error message begins with `where`.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where}: expected {{"text": "..."}}, got {line.strip()[:60]}')
    return text


def _paragraphs(text: str, size: int = 8000) -> Iterator[str]:
    """Joins successive paragraphs into documents of about `size` characters. A book thus becomes many documents, which
    can be shuffled.

    With size=10, the text "one\\n\\ntwo\\n\\nthree" becomes two documents, "one\\n\\ntwo" and "three".
    """
    block, length = [], 0
    for paragraph in text.split("\n\n"):
        block.append(paragraph)
        length += len(paragraph) + 2
        if length >= size:
            yield "\n\n".join(block)
            block, length = [], 0
    if "".join(block).strip():
        yield "\n\n".join(block)


def shuffled(texts: Iterable[str], seed: int = 42) -> Iterator[str]:
    """Yields `texts` in random order. Training shuffles only files and row groups, so documents must be shuffled before
    they are written. The hub's shards are already shuffled."""
    rng, window, chars = random.Random(seed), [], 0
    for text in texts:
        window.append(text)
        chars += len(text)
        if chars >= SHUFFLE_CHARS:
            rng.shuffle(window)
            yield from window
            window, chars = [], 0
    rng.shuffle(window)
    yield from window
