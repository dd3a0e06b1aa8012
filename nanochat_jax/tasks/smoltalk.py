"""SmolTalk (Allal et al., 2025): general conversations, for training only. We use the version for small models.

A local folder holds either smoltalk/train.jsonl and smoltalk/test.jsonl, or any conversations in chat/*.jsonl. Each
line of a file in chat/ is a JSON array of messages. In chat/, files named val, dev, eval or test are held out for the
test (chat_folder.py). If no file is named so, a hash of a conversation's first message decides its split. About one
conversation in twenty is then for the test.
"""

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanochat_jax.config import UserError
from nanochat_jax.files import print_once
from nanochat_jax.tasks import chat_folder, messages, task_data

if TYPE_CHECKING:
    import pyarrow as pa

REPO = "HuggingFaceTB/smol-smoltalk"
HOLD_OUT = 20  # about one in HOLD_OUT conversations in chat/ is for the test


class SmolTalk(task_data.RowTask):
    name = "SmolTalk"
    skips_empty = True
    suggestions = ("Why is the sky blue?", "Write a short poem about the sea.")

    def __init__(self, split: str, data_dir: str | Path | None = None):
        if not data_dir:
            self.rows = task_data.hub(REPO, "default", split)
        elif any(task_data.find(Path(data_dir) / "smoltalk" / f"{each}.jsonl") for each in ("train", "test")):
            # Both splits come from smoltalk/, because chat/ may hold the same conversations.
            self.rows = task_data.local(data_dir, f"smoltalk/{split}")
            if (Path(data_dir) / "chat").is_dir():
                print_once(f"SmolTalk: reading {data_dir}/smoltalk, not {data_dir}/chat")
        else:
            self.rows = _chat_rows(Path(data_dir), split)

    def suspects(self) -> Iterable[tuple[int, Any]]:
        """Returns only the irregular rows of a parquet file, since converting half a million rows would take 40 s."""
        stored = self.rows.stored
        if not isinstance(stored, task_data.ParquetRows) or "messages" not in stored.table.column_names:
            return super().suspects()
        return ((index, stored[index]) for index in _irregular(stored.table))

    @staticmethod
    def conversation(row: dict | list) -> dict:
        return messages.conversation(row)[0]

    def read(self, row: dict | list) -> tuple[dict, bool]:
        return messages.conversation(row)


def _chat_rows(data_dir: Path, split: str) -> task_data.Shuffled:
    """Returns the conversations of `split` from chat/*.jsonl. Raises UserError if there are none."""
    chat = chat_folder.read(data_dir / "chat")
    if not chat.train:
        raise UserError(f"--task_data_dir={data_dir}: needs chat/*.jsonl[.gz] or smoltalk/{split}.jsonl[.gz]")
    print_once(f"SmolTalk: {chat.describe(f'1 in {HOLD_OUT} conversations, by a hash of their first message')}")
    if chat.test:
        return task_data.of_files(chat.test if split == "test" else chat.train)
    rows = task_data.of_files(chat.train)
    rows.drop([i for i, row in enumerate(rows.stored) if _held_out(row) != (split == "test")])
    if not len(rows):
        raise UserError(f"--task_data_dir={data_dir}: too few conversations in chat/ for a {split} split")
    return rows


def _held_out(row: list) -> bool:
    opening = row[0] if isinstance(row, list) and row else row
    return zlib.crc32(repr(opening).encode()) % HOLD_OUT == 0


def _irregular(table: "pa.Table") -> Iterator[int]:
    """Yields the indices of the irregular rows of `table`.

    A regular row may begin with a system message. Then it has one or more questions, each followed by an answer. None
    of its messages is empty.
    """
    first = 0
    for batch in table.to_batches():
        column = batch.column("messages")
        lengths = np.array([n or 0 for n in column.value_lengths().to_pylist()])
        flat, starts = column.flatten(), np.cumsum(lengths) - lengths
        row = np.repeat(np.arange(len(column)), lengths)
        role = np.array(flat.field("role").to_pylist(), dtype=object)
        empty = np.array([not (text or "").strip() for text in flat.field("content").to_pylist()], dtype=bool)
        system = np.zeros(len(column), int)
        system[row[(role == "system") & (np.arange(len(row)) == starts[row])]] = 1
        turn = np.arange(len(row)) - starts[row] - system[row]
        expected = np.where(turn < 0, "system", np.where(turn % 2 == 0, "user", "assistant"))
        turns = lengths - system
        irregular = (turns < 2) | (turns % 2 == 1)
        irregular[row[empty | (role != expected)]] = True
        yield from (first + np.flatnonzero(irregular)).tolist()
        first += len(column)
