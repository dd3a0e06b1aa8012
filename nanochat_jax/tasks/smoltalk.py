"""SmolTalk (Allal et al., 2025): general conversations, for training only. We use the version for small models.

A local folder holds either smoltalk/train.jsonl and smoltalk/test.jsonl, or any conversations in chat/*.jsonl. Each
line of a file in chat/ is a JSON array of messages. In chat/, a hash of a conversation's first message decides its
split. About one conversation in twenty is for the test.
"""

import zlib
from pathlib import Path

from nanochat_jax.config import UserError
from nanochat_jax.tasks import task_data

REPO = "HuggingFaceTB/smol-smoltalk"
HOLD_OUT = 20  # about one in HOLD_OUT conversations in chat/ is for the test


def check_messages(messages: list, where: str) -> list:
    """Returns `messages`. Raises UserError if they are not a valid conversation.

    User and assistant messages must alternate, with at least one of each. A system message may come before the first
    user message. The content of every message must be text.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where}: expected a list of messages")
    turns = messages[1:] if messages and messages[0].get("role") == "system" else messages
    if len(turns) < 2:
        raise UserError(f"{where}: expected at least two messages, a user's and an assistant's")
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message.get("role") != expected:
            raise UserError(f"{where}: message {i + 1} is by {message.get('role')!r}, expected {expected!r}")
    if not all(isinstance(message.get("content"), str) for message in messages):
        raise UserError(f"{where}: content must be text")
    return messages


class SmolTalk(task_data.RowTask):
    name = "SmolTalk"
    suggestions = ("Why is the sky blue?", "Write a short poem about the sea.")

    def __init__(self, split: str, data_dir: str | Path | None = None):
        if not data_dir:
            self.rows = task_data.hub(REPO, "default", split)
        elif task_data.find(Path(data_dir) / "smoltalk" / f"{split}.jsonl"):
            self.rows = task_data.local(data_dir, f"smoltalk/{split}")
        else:
            self.rows = _chat_folder(Path(data_dir), split)

    @staticmethod
    def conversation(row: dict | list) -> dict:
        messages = row["messages"] if isinstance(row, dict) else row
        return {"messages": check_messages(messages, "SmolTalk")}


def _chat_folder(data_dir: Path, split: str) -> list:
    """Returns the conversations of `split` from chat/*.jsonl. Raises UserError if there are none."""
    stems = sorted({f"chat/{path.name.split('.jsonl')[0]}" for path in (data_dir / "chat").glob("*.jsonl*")})
    rows = task_data.local(data_dir, *(stems or ["chat/*", f"smoltalk/{split}"]))
    rows = [row for row in rows if _held_out(row) == (split == "test")]
    if not rows:
        raise UserError(f"--task_data_dir={data_dir}: too few conversations in chat/ for a {split} split")
    return rows


def _held_out(row: list) -> bool:
    opening = row[0] if isinstance(row, list) and row else row
    return zlib.crc32(repr(opening).encode()) % HOLD_OUT == 0
