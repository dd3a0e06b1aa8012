"""Your own conversations, for training only. On the command line, the task is called customjson:PATH.

Each line of the file is a JSON array of messages {"role": ..., "content": ...}.
"""

import json
from pathlib import Path

from nanochat_jax.config import UserError
from nanochat_jax.tasks import task_data
from nanochat_jax.tasks.smoltalk import check_messages


class CustomJSON(task_data.RowTask):
    name = "CustomJSON"

    def __init__(self, path: str | Path):
        """Checks all lines now, because an error found during training could waste hours."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise UserError(f"{path}: no such file; customjson:PATH expects JSON lines, each an array of messages")
        self.rows = []
        for number, line in enumerate(task_data.read_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                self.rows.append(check_messages(json.loads(line), f"{path}:{number}"))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON: {error}") from None
        if not self.rows:
            raise UserError(f"{path}: empty")

    @staticmethod
    def conversation(row: list) -> dict:
        return {"messages": row}
