"""Your own conversations, for training only. On the command line, the task is called customjson:PATH.

Each line of the file at PATH holds one conversation in one of these formats:

    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}

messages.py says which conversations are valid. The content of an assistant's message may be a list of parts, which
task.py describes. Empty lines are ignored.
"""

import json
from pathlib import Path

from nanochat_jax.config import UserError, user_path
from nanochat_jax.tasks import messages, task_data
from nanochat_jax.tasks.task import Task


class CustomJSON(Task):
    name = "CustomJSON"
    has_val = True  # every split is the whole file, so "val" need not be replaced by "test"

    def __init__(self, path: str | Path):
        """Reads and checks all lines.

        Leaves out last questions that have no answer, and prints how many there are. Raises UserError with the number
        of the first bad line.
        """
        path = user_path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file; customjson:PATH expects JSON lines, one conversation each")
        text = task_data.read_text(path)
        self.conversations: list[dict] = []
        bad: list[str] = []
        shortened: list[int] = []  # line numbers
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                conversation, is_shortened = messages.conversation(json.loads(line))
                self.conversations.append(conversation)
                if is_shortened:
                    shortened.append(number)
            except json.JSONDecodeError as error:
                bad.append(f"{path}:{number}: not JSON: {error}")
            except messages.BadRow as error:
                bad.append(f"{path}:{number}: {error}")
        if bad:
            more = f" (and {len(bad) - 1:,} more bad lines)" if len(bad) > 1 else ""
            raise UserError(_array_hint(text, path) or bad[0] + more)
        if not self.conversations:
            raise UserError(f"{path}: empty; write JSON lines into it, one conversation each")
        if shortened:
            print(f"{self.name}: {messages.describe_shortened(len(shortened), f'{path}:{shortened[0]}')}")

    def __len__(self) -> int:
        return len(self.conversations)

    def example(self, index: int) -> dict:
        return self.conversations[index]


def _array_hint(text: str, path: Path) -> str:
    """Returns advice if the whole file is one JSON array of conversations, else ""."""
    try:
        value = json.loads(text)
        messages.read(value[0])
    except (ValueError, KeyError, IndexError, TypeError):
        return ""
    return f"{path}:1: one JSON array, expected one conversation per line: try jq -c '.[]' {path} > {path.stem}.jsonl"
