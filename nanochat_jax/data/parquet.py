"""Reads documents from parquet files, and writes texts as parquet files. Every file has a string column `text`.

A file that cannot be used causes a UserError, whose message names the file. A document that is null or not UTF-8 is
read as "", so that the other documents keep their positions.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_jax.config import UserError, first_line

if TYPE_CHECKING:
    import hashlib

    import pyarrow.parquet as pq  # slow to load, so only the functions that need it import it

ROW_GROUP = 1024  # the number of documents in a row group; a row group is always read as a whole
SHARD_CHARS = 250_000_000  # the approximate number of characters in a shard, which compresses to about 100 MB
MAX_CHARS = 1_000_000  # longer documents are split, since tokenizing and packing handle a whole document at once
HOW_TO_FIX = "if it was downloaded, python -m nanochat_jax.dataset --verify downloads it again"
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")


def open(path: Path) -> "pq.ParquetFile":
    """Opens a parquet file. Raises UserError if the file is damaged or has no string column `text`.

    Callers write parquet.open(path), like gzip.open(path).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file ({first_line(error)}); {HOW_TO_FIX}") from error
    if "text" not in file.schema_arrow.names:
        raise UserError(f"{path}: no column 'text'; its columns: {', '.join(file.schema_arrow.names) or 'none'}")
    kind = file.schema_arrow.field("text").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(kind) not in TEXT_TYPES:
        raise UserError(f"{path}: the column 'text' holds {kind}, expected string")
    return file


def read_row_group(file: "pq.ParquetFile", path: Path, index: int) -> list[str]:
    """Returns the documents in one row group of an open file. Raises UserError if the row group cannot be read.

    A document longer than MAX_CHARS is split into several documents. A document that is null or not UTF-8 is returned
    as "". The number of documents that are not UTF-8 is printed to stderr.
    """
    return [piece for text in _whole_documents(file, path, index) for piece in split_long(text)]


def _whole_documents(file: "pq.ParquetFile", path: Path, index: int) -> list[str]:
    """Does the work of `read_row_group`, except that long documents are not split."""
    import pyarrow as pa

    try:
        column = file.read_row_group(index, columns=["text"]).column("text")
        try:
            texts = column.cast(pa.string()).to_pylist()
        except (UnicodeDecodeError, pa.ArrowInvalid):
            texts = [_decode(data) for data in column.cast(pa.binary()).to_pylist()]
            bad = sum(text is None for text in texts) - column.null_count
            print(f"{path}: row group {index}: {bad} of {len(texts)} documents are not UTF-8, skipped", file=sys.stderr)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: row group {index} cannot be read ({first_line(error)}); {HOW_TO_FIX}") from error
    return [text or "" for text in texts]


def text_bytes(path: Path) -> list[int]:
    """Returns the uncompressed size of the `text` column in each row group, in bytes. The size includes parquet's own
    overhead. Only the file's metadata is read."""
    with open(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        columns = [[group.column(i) for i in range(group.num_columns)] for group in groups]
        return [sum(c.total_uncompressed_size for c in group if c.path_in_schema == "text") for group in columns]


def row_groups(path: Path) -> Iterator[list[str]]:
    """Yields the documents of a parquet file, one list per row group."""
    with open(path) as file:
        for i in range(file.num_row_groups):
            yield read_row_group(file, path, i)


def texts_of(path: Path) -> Iterator[str]:
    """Yields the documents of a parquet file. A document that is null or not UTF-8 is yielded as ""."""
    for texts in row_groups(path):
        yield from texts


def documents_of(path: Path) -> Iterator[str]:
    """Yields the same documents as `texts_of`, except that long documents are not split."""
    with open(path) as file:
        for i in range(file.num_row_groups):
            yield from _whole_documents(file, path, i)


def _decode(data: bytes | None) -> str | None:
    """Decodes UTF-8: b"caf\\xc3\\xa9" -> "café". Returns None if `data` is None or not UTF-8."""
    try:
        return None if data is None else data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def split_long(text: str) -> list[str]:
    """Splits a text into pieces of at most MAX_CHARS characters. Joining the pieces gives the original text.

    Splits after a line break if possible, otherwise after a space, otherwise after MAX_CHARS characters. For example,
    with MAX_CHARS = 10: "one two\\nthree four" -> ["one two\\n", "three four"].
    """
    pieces, start = [], 0
    while len(text) - start > MAX_CHARS:
        middle, end = start + MAX_CHARS // 2, start + MAX_CHARS
        split = text.rfind("\n", middle, end) + 1 or text.rfind(" ", middle, end) + 1 or end
        pieces.append(text[start:split])
        start = split
    return [*pieces, text[start:]]


def write_shards(
    folder: Path, stem: str, texts: Iterable[str], digest: "hashlib._Hash", row_group: int = ROW_GROUP
) -> int:
    """Writes <stem>_00000.parquet, <stem>_00001.parquet, ... and returns the number of documents in them.

    `digest` is updated with the length and the bytes of every document. It therefore does not depend on how the
    documents are divided into files. `row_group` is the number of documents in a row group.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("text", pa.string())])
    texts, writer, shard, chars, total = iter(texts), None, 0, 0, 0
    try:
        while batch := list(itertools.islice(texts, row_group)):
            for text in batch:
                data = text.encode("utf-8")
                digest.update(len(data).to_bytes(8, "little") + data)
            if writer is None:
                path = folder / f"{stem}_{shard:05d}.parquet"
                zstd = {"compression": "zstd", "compression_level": 3}
                writer = pq.ParquetWriter(path, schema, use_dictionary=False, write_statistics=False, **zstd)
                shard += 1
            writer.write_table(pa.table({"text": batch}, schema=schema), row_group_size=row_group)
            chars += sum(map(len, batch))
            total += len(batch)
            if chars >= SHARD_CHARS:
                writer.close()
                writer, chars = None, 0
    finally:
        if writer is not None:
            writer.close()
    return total
