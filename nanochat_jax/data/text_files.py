"""Reads the documents of a file, and shuffles documents.

In: a .parquet, .jsonl, .ndjson, .json or .txt file; all but parquet may be compressed. Out: documents, each a str.
"""

import contextlib
import io
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from nanochat_jax.config import UserError, first_line
from nanochat_jax.data import parquet

SHUFFLE_CHARS = 1_000_000_000  # documents are shuffled in groups of about this many characters, to limit memory use
FORMATS = (".parquet", ".jsonl", ".ndjson", ".json", ".txt")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}  # suffix -> pyarrow's name of the compression
READABLE = ".parquet, .jsonl, .ndjson, .json or .txt (all but .parquet also with .gz, .bz2 or .zst)"
HEAD = 1_000_000  # `holds_text` reads at most this many bytes of a .json file
UNREADABLE = (OSError, UnicodeDecodeError, NotImplementedError)  # NotImplementedError: pyarrow lacks the codec


def form(path: Path) -> tuple[str, str] | None:
    """Returns the format and the compression that a file's name indicates. Returns None if the format is not supported.

    Examples: a.jsonl.gz -> (".jsonl", ".gz"), A.PARQUET -> (".parquet", ""), a.csv -> None.
    """
    name, packed = path.name.lower(), ""
    for suffix in COMPRESSIONS:
        if name.endswith(suffix):
            name, packed = name.removesuffix(suffix), suffix
    kind = Path(name).suffix
    return (kind, packed) if kind in FORMATS and not (kind == ".parquet" and packed) else None


def documents(path: Path, counts: Counter[str] | None = None) -> Iterator[str]:
    """Yields the documents of a file. Long documents are not split, and empty documents are skipped.

    Raises UserError if any part of the file cannot be read. `counts` is updated with the number of documents.
    Separate entries count the documents that are empty, longer than MAX_CHARS, or not valid Unicode.
    """
    counts = Counter() if counts is None else counts
    for text in parquet.documents_of(path) if form(path) == (".parquet", "") else _read_documents(path):
        counts["documents"] += 1
        if not text.strip():
            counts["empty, skipped"] += 1
            continue
        if not text.isascii() and (clean := text.encode("utf-8", "ignore").decode("utf-8")) != text:
            counts["with lone surrogates, which are left out"] += 1
            text = clean
        if len(text) > parquet.MAX_CHARS:
            counts[f"longer than {parquet.MAX_CHARS:,} characters, split"] += 1
        yield text


def holds_text(path: Path) -> bool:
    """Returns whether the first value in a .json file is a document. In a file of metadata, it is not.

    If the first value cannot be read here, returns True, so that reading the whole file reports the error.
    """
    try:
        with _open(path) as file:
            head = file.read(HEAD).decode("utf-8", "ignore").lstrip("\ufeff \t\r\n")
        value, _ = json.JSONDecoder().raw_decode(head.removeprefix("[").lstrip())
    except (*UNREADABLE, ValueError, RecursionError):
        return True
    return isinstance(value, dict) and isinstance(value.get("text"), str)


def _open(path: Path) -> BinaryIO:
    """Opens a file for reading, and decompresses it."""
    kind = form(path)
    assert kind is not None, f"{path}: not a text file"
    if not kind[1]:
        return open(path, "rb")
    import pyarrow as pa

    return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path), compression=COMPRESSIONS[kind[1]])))


def _read_documents(path: Path) -> Iterator[str]:
    """Yields the documents of a file that is not parquet, including empty documents."""
    kind = form(path)
    try:
        with _open(path) as file:
            if kind and kind[0] == ".txt":
                with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
                    yield from _paragraphs(text.read())
            elif kind and kind[0] == ".json" and not _has_lines(path):
                yield from _json_array(path, file)
            else:
                yield from _json_lines(path, file)
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error


def _json_lines(path: Path, lines: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            line = line.decode("utf-8").lstrip("\ufeff")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 ({error})") from error
        if line.strip():
            yield _text_of(_parse(line, where), where)


def _has_lines(path: Path) -> bool:
    """Returns whether the first line of a .json file is a JSON object. If so, the file has one document per line, and
    may be too large to be read as a whole."""
    with _open(path) as file:
        first = next((line for line in file if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(first.decode("utf-8-sig")), dict)
    return False


def _json_array(path: Path, file: BinaryIO) -> Iterator[str]:
    """Yields the documents of a JSON array of objects. The whole array is read into memory."""
    value = _parse(file.read().decode("utf-8-sig"), str(path))
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        yield _text_of(item, f"{path}, element {number}")


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error


def _text_of(value: object, where: str) -> str:
    """Returns the text in a JSON object: {"text": "Hello", "id": 7} -> "Hello".

    Raises UserError if there is no text. The error message begins with `where`.
    """
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where}: expected {{"text": "..."}}, got {json.dumps(value, ensure_ascii=False)[:60]}')
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
