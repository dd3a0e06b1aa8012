"""Tokenizes each parquet file once and stores its tokens. The stored tokens are memory-mapped and read by row group.

    <base>/tokenized_data/<source>-<tokenizer hash>/
        shard_00000.tokens.npy   the tokens of all documents, without BOS; uint16, or uint32 for a large vocabulary
        shard_00000.index.npz    the start of each document and row group, checksums, and a fingerprint of the text

The cached tokens of a file have the same row groups and documents as its text. They include the documents that training
skips. A position in the data therefore means the same place in the text and in the tokens. A run that began with text
can resume with tokens, or vice versa, and gets exactly the same batches. Files without cached tokens are read as text.

The command `python -m nanochat_jax.dataset --tokenize` builds the cache. The cache pays off if tokenizing cannot keep
up with the accelerators.
"""

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanochat_jax import config
from nanochat_jax.config import UserError, first_line
from nanochat_jax.data import hub, parquet, sources
from nanochat_jax.files import atomic_write
from nanochat_jax.progress import Progress, count_of
from nanochat_jax.tokenizer import Tokenizer

FORMAT = 1
HOW_TO_FIX = "delete it and run python -m nanochat_jax.dataset --tokenize again"


class RowGroup(NamedTuple):
    """The documents of a row group."""

    docs: list[np.ndarray]  # the token ids of each document, without BOS
    chars: np.ndarray  # the number of characters in each document's text


class TokenCache:
    """The cached tokens of one text file, memory-mapped."""

    def __init__(self, tokens: Path, index: Mapping[str, np.ndarray]):
        self.path = tokens
        self.offsets, self.chars = index["offsets"], index["chars"]  # per document
        self.groups, self.checksums = index["groups"], index["checksums"]  # per row group
        try:
            self.tokens = np.load(tokens, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{tokens}: cannot be read ({first_line(error)}); {HOW_TO_FIX}") from error
        if len(self.tokens) != self.offsets[-1]:
            raise UserError(f"{tokens}: {len(self.tokens):,} tokens, expected {self.offsets[-1]:,}; {HOW_TO_FIX}")

    @property
    def num_row_groups(self) -> int:
        return len(self.checksums)

    def read(self, index: int) -> RowGroup:
        """Returns the documents of one row group. Raises UserError if the row group is damaged."""
        begin, end = self.groups[index], self.groups[index + 1]
        offsets = self.offsets[begin : end + 1]
        tokens = np.array(self.tokens[offsets[0] : offsets[-1]])
        if zlib.crc32(tokens.data) != self.checksums[index]:
            raise UserError(f"{self.path}: row group {index} is damaged; {HOW_TO_FIX}")
        return RowGroup(np.split(tokens, offsets[1:-1] - offsets[0]) if end > begin else [], self.chars[begin:end])

    def close(self) -> None:
        """Unmaps the file."""
        del self.tokens


def folder_of(source: sources.Source, tokenizer: Tokenizer) -> Path:
    """Returns the folder for the tokens that `tokenizer` makes from a source."""
    return config.base_dir() / "tokenized_data" / f"{source.name}-{tokenizer.hash[:8]}"


def find(text: Path, folder: Path | None) -> TokenCache | None:
    """Returns the cached tokens of a text file, even if the text file itself has been deleted.

    Returns None if `folder` is None or holds no tokens of the file. Tokens of another format, or of another version of
    the text, are ignored.
    """
    if folder is None:
        return None
    tokens, index_path = _paths(text, folder)
    try:
        with np.load(index_path) as loaded:
            index = dict(loaded)
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged zip file can raise any exception
        raise UserError(f"{index_path}: cannot be read ({first_line(error)}); {HOW_TO_FIX}") from error
    if index["format"] != FORMAT or (text.exists() and str(index["text"]) != _fingerprint(text)):
        return None
    return TokenCache(tokens, index)


def num_cached(files: Iterable[Path], folder: Path) -> int:
    """Returns how many of the files have cached tokens, without checking that the tokens are up to date."""
    return sum(_paths(path, folder)[1].exists() for path in files)


def build(source: sources.Source, tokenizer: Tokenizer, folder: Path | None = None) -> Path:
    """Tokenizes the training and validation files of `source` that have no cached tokens yet.

    Returns the folder of the tokens. By default, this is the folder in which training looks for cached tokens.
    """
    folder = folder or folder_of(source, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    files = [*source.val_files, *source.train_files]
    count = 0
    with Progress(f"{source.name}, files tokenized", len(files)) as progress:
        for path in files:
            cached = find(path, folder)
            if cached is None:
                hub.wait_for_shard(path)
                _write(path, folder, tokenizer)
                cached = find(path, folder)
                assert cached is not None, f"{path} changed while it was tokenized"
            count += len(cached.tokens)
            cached.close()
            progress.advance(note=f"{count / 1e6:,.0f}M tokens")
    print(f"{source.name}: {count:,} tokens from {count_of(len(files), 'file')} in {folder}")
    return folder


def _write(text: Path, folder: Path, tokenizer: Tokenizer) -> None:
    """Tokenizes one file. The index is written last, because `find` ignores tokens that have no index."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    parts, lengths, chars, groups, checksums = [], [0], [], [0], []
    for texts in parquet.row_groups(text):
        tokens, offsets = tokenizer.encode_batch(texts)
        lengths += np.diff(offsets).tolist()
        chars += map(len, texts)
        groups.append(len(chars))
        parts.append(np.ascontiguousarray(tokens, dtype))
        checksums.append(zlib.crc32(parts[-1]))
    tokens_path, index_path = _paths(text, folder)
    index_path.unlink(missing_ok=True)
    total = sum(lengths)
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (total,)}
    with atomic_write(tokens_path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part)
    index: dict[str, Any] = {
        "format": FORMAT,
        "text": _fingerprint(text),
        "offsets": np.cumsum(lengths, dtype=np.int64),
        "chars": np.asarray(chars, np.uint32),
        "groups": np.asarray(groups, np.int64),
        "checksums": np.asarray(checksums, np.uint32),
    }
    with atomic_write(index_path) as file:
        np.savez(file, **index)


def _paths(text: Path, folder: Path) -> tuple[Path, Path]:
    """a.parquet -> folder/a.tokens.npy, folder/a.index.npz."""
    return folder / f"{text.stem}.tokens.npy", folder / f"{text.stem}.index.npz"


def _fingerprint(text: Path) -> str:
    """Returns the size of a parquet file and a hash of its last 64 KiB. Together, they identify the file.

    The end of a parquet file is enough, because it lists the positions of all data in the file.
    """
    size = text.stat().st_size
    with text.open("rb") as file:
        file.seek(max(0, size - (1 << 16)))
        return f"{size} {hashlib.sha256(file.read()).hexdigest()}"
