"""Parquet files with one string column `text`: written, read by row group, and waited for while they download."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanochat_jax.config import UserError, first_line

ROW_GROUP = 1024  # documents; the unit that is read and tokenized at once
SHARD_CHARS = 250_000_000  # about 100 MB of zstd
MAX_CHARS = 1_000_000  # of a document; longer ones are cut, since one is tokenized and packed as a whole
MEND = "a downloaded file is fetched again by python -m nanochat_jax.dataset --verify"
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")


def open(path: Path):
    """A pyarrow ParquetFile with a column `text` of strings. UserError names the file that is broken or has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file ({first_line(error)}); {MEND}") from error
    if "text" not in file.schema_arrow.names:
        raise UserError(f"{path}: no column 'text', it has {', '.join(file.schema_arrow.names) or 'none'}")
    kind = file.schema_arrow.field("text").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(kind) not in TEXT_TYPES:
        raise UserError(f"{path}: the column 'text' holds {kind}, expected string")
    return file


def read_row_group(file, path: Path, index: int) -> list[str]:
    """The documents of one row group of an open parquet file, those that are too long cut into several. "" stands for
    each one that cannot be used: it is empty, or not UTF-8, which is said on stderr. UserError if nothing can be read.
    """
    import pyarrow as pa

    try:
        column = file.read_row_group(index, columns=["text"]).column("text")
        try:
            texts = column.cast(pa.string()).to_pylist()
        except (UnicodeDecodeError, pa.ArrowInvalid):
            texts = [_decoded(data) for data in column.cast(pa.binary()).to_pylist()]
            bad = sum(text is None for text in texts) - column.null_count
            print(f"{path}: row group {index}: {bad} of {len(texts)} documents are not UTF-8, skipped", file=sys.stderr)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: row group {index} cannot be read ({first_line(error)}); {MEND}") from error
    return [piece for text in texts for piece in split_long(text or "")]


def text_bytes(path: Path) -> list[int]:
    """Bytes of the row groups of a parquet file, uncompressed and with what parquet adds, from its metadata."""
    with open(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        columns = [[group.column(i) for i in range(group.num_columns)] for group in groups]
        return [sum(c.total_uncompressed_size for c in of if c.path_in_schema == "text") for of in columns]


def row_groups(path: Path) -> Iterator[list[str]]:
    """The documents of a parquet file by row group, "" for those that cannot be used."""
    with open(path) as file:
        for i in range(file.num_row_groups):
            yield read_row_group(file, path, i)


def texts_of(path: Path) -> Iterator[str]:
    """All documents of a parquet file, "" for those that cannot be used."""
    for texts in row_groups(path):
        yield from texts


def _decoded(data: bytes | None) -> str | None:
    try:
        return data and data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def split_long(text: str) -> list[str]:
    """The text in pieces of at most MAX_CHARS, cut after a line or a word where there is one. Nothing is left out."""
    pieces, start = [], 0
    while len(text) - start > MAX_CHARS:
        middle, end = start + MAX_CHARS // 2, start + MAX_CHARS
        cut = text.rfind("\n", middle, end) + 1 or text.rfind(" ", middle, end) + 1 or end
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def write_shards(folder: Path, stem: str, texts: Iterable[str], digest, row_group: int = ROW_GROUP) -> int:
    """Writes <stem>_00000.parquet, ... and feeds `digest` with what they hold. Returns the number of documents."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("text", pa.string())])
    writer, batch, shard, chars, total = None, [], 0, 0, 0

    def flush():
        nonlocal writer, batch, shard
        if writer is None:
            writer = pq.ParquetWriter(
                folder / f"{stem}_{shard:05d}.parquet", schema, compression="zstd", compression_level=3,
                use_dictionary=False, write_statistics=False,
            )  # fmt: skip
            shard += 1
        writer.write_table(pa.table({"text": batch}, schema=schema), row_group_size=row_group)
        batch = []

    try:
        for text in texts:
            data = text.encode("utf-8")
            digest.update(len(data).to_bytes(8, "little") + data)
            batch.append(text)
            chars += len(text)
            total += 1
            if len(batch) == row_group:
                flush()
                if chars >= SHARD_CHARS:
                    writer.close()
                    writer, chars = None, 0
        if batch:
            flush()
    finally:
        if writer is not None:
            writer.close()
    return total
