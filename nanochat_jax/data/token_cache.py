"""Text tokenized once: memory-mapped twins of text files, from which the loader makes the very same batches.

    <base>/tokenized_data/<source>-<tokenizer hash>/
        shard_00000.tokens.npy   uint16 (uint32 where the vocabulary is larger): the documents end to end, without BOS
        shard_00000.index.npz    where documents and row groups begin, their checksums, and which text they are of

A twin has the row groups and documents of its text, unusable ones included, so a position in the one is a position in
the other: a run may go on from text to tokens and back, and a file without a twin is read as text. Made by
`python -m nanochat_jax.dataset --tokenize`; worth it where tokenizing cannot keep up with the accelerators.
"""

import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanochat_jax import config
from nanochat_jax.config import UserError, first_line
from nanochat_jax.data import hub, parquet, sources
from nanochat_jax.files import whole
from nanochat_jax.progress import Progress

FORMAT = 1
MEND = "delete it and run python -m nanochat_jax.dataset --tokenize again"


class RowGroup(NamedTuple):
    """Documents of a row group: their tokens without BOS, and the characters of the text each comes from."""

    docs: list[np.ndarray]
    chars: np.ndarray


class TokenCache:
    """The tokens of one text file, memory-mapped. UserError where a row group is damaged."""

    def __init__(self, tokens: Path, index):
        self.path = tokens
        self.offsets, self.chars = index["offsets"], index["chars"]  # of documents
        self.groups, self.checksums = index["groups"], index["checksums"]  # of row groups
        try:
            self.tokens = np.load(tokens, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{tokens}: cannot be read ({first_line(error)}); {MEND}") from error
        if len(self.tokens) != self.offsets[-1]:
            raise UserError(f"{tokens}: {len(self.tokens):,} tokens, expected {self.offsets[-1]:,}; {MEND}")

    @property
    def num_row_groups(self) -> int:
        return len(self.checksums)

    def read(self, index: int) -> RowGroup:
        """The documents of one row group."""
        first, end = self.groups[index], self.groups[index + 1]
        offsets = self.offsets[first : end + 1]
        tokens = np.array(self.tokens[offsets[0] : offsets[-1]])
        if zlib.crc32(tokens) != self.checksums[index]:
            raise UserError(f"{self.path}: row group {index} is damaged; {MEND}")
        return RowGroup(np.split(tokens, offsets[1:-1] - offsets[0]) if end > first else [], self.chars[first:end])

    def close(self) -> None:
        del self.tokens


def folder_of(source: sources.Source, tokenizer) -> Path:
    return config.base_dir() / "tokenized_data" / f"{source.name}-{tokenizer.hash[:8]}"


def find(text: Path, folder: Path | None) -> TokenCache | None:
    """The twin of a text file, if there is one in `folder` and it is of this text. The text itself may be gone."""
    if folder is None:
        return None
    tokens, index = _paths(text, folder)
    try:
        with np.load(index) as loaded:
            index = dict(loaded)
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged zip raises whatever its fields lead to
        raise UserError(f"{index}: cannot be read ({first_line(error)}); {MEND}") from error
    if index["format"] != FORMAT or (text.exists() and str(index["text"]) != _fingerprint(text)):
        return None
    return TokenCache(tokens, index)


def made(files: Iterable[Path], folder: Path) -> int:
    """How many of the files have a twin, be it of this text or not."""
    return sum(_paths(path, folder)[1].exists() for path in files)


def build(source: sources.Source, tokenizer, folder: Path | None = None) -> Path:
    """Makes the twins that are missing, of training and validation files. Returns their folder: the one where training
    looks for them, unless another is given."""
    folder = folder or folder_of(source, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    files = [*source.val_files, *source.train_files]
    count = 0
    with Progress(f"{source.name}, files tokenized", len(files)) as progress:
        for path in files:
            cached = find(path, folder)
            if cached is None:
                hub.wait_for_shard(path)
                _make(path, folder, tokenizer)
                cached = find(path, folder)
            count += len(cached.tokens)
            cached.close()
            progress.advance(note=f"{count / 1e6:,.0f}M tokens")
    print(f"{source.name}: {count:,} tokens of {len(files)} files in {folder}")
    return folder


def _make(text: Path, folder: Path, tokenizer) -> None:
    """Writes one twin; the index last, so that it is whole or not there."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    parts, lengths, chars, groups, checksums = [], [0], [], [0], []
    for texts in parquet.row_groups(text):
        tokens, offsets = tokenizer.encode_batch(texts)
        lengths += np.diff(offsets).tolist()
        chars += map(len, texts)
        groups.append(len(chars))
        parts.append(np.ascontiguousarray(tokens, dtype))
        checksums.append(zlib.crc32(parts[-1]))
    tokens, index = _paths(text, folder)
    index.unlink(missing_ok=True)
    total = sum(lengths)
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (total,)}
    with whole(tokens) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part)
    with whole(index) as file:
        np.savez(
            file, format=FORMAT, text=_fingerprint(text), offsets=np.cumsum(lengths, dtype=np.int64),
            chars=np.asarray(chars, np.uint32), groups=np.asarray(groups, np.int64),
            checksums=np.asarray(checksums, np.uint32),
        )  # fmt: skip


def _paths(text: Path, folder: Path) -> tuple[Path, Path]:
    return folder / f"{text.stem}.tokens.npy", folder / f"{text.stem}.index.npz"


def _fingerprint(text: Path) -> str:
    """Of a parquet file, without reading it all: its size and its end, where the places of all its pages stand."""
    size = text.stat().st_size
    with text.open("rb") as file:
        file.seek(max(0, size - (1 << 16)))
        return f"{size} {hashlib.sha256(file.read()).hexdigest()}"
