"""Checks conversations, and reads the formats in which files store them.

A conversation to train on may begin with a system message. Then user messages and assistant messages alternate, and a
user message comes first. No user or assistant message may be empty, because an empty answer teaches the model to say
nothing. A last question without an answer is left out, because some published identity conversations end with one.
"""

from collections.abc import Mapping
from typing import Any

from nanochat_jax.tokenizer import PARTS

# Maps the roles in ShareGPT's format to our roles.
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FORMATS = (
    '[{"role": ..., "content": ...}, ...], {"messages": [...]} or {"conversations": [{"from": ..., "value": ...}]}'
)


class BadRow(ValueError):
    """Raised if a row of a task is malformed. The message says what is wrong, but not where."""


class EmptyMessage(BadRow):
    """Raised if a message of a conversation is empty."""


def conversation(value: Any) -> tuple[dict, bool]:
    """Returns the conversation that `value` holds in any of FORMATS, and whether its last message was left out.

    The last message is left out if it is a question without an answer. Raises BadRow or EmptyMessage.
    """
    given = read(value)
    kept = check(given)
    return {"messages": kept}, kept[-1] is not given[-1]


def describe_shortened(count: int, where: str) -> str:
    """Returns a line to print about `count` shortened conversations. The first of them is at `where`."""
    return f"left out a last question without an answer in {count:,} conversations, the first is {where}"


def read(value: Any) -> list[dict]:
    """Returns the messages of a conversation in any of FORMATS. Raises BadRow if `value` has another format.

    If `value` is {"system": ..., "conversations": [...]}, the first message returned is the system message.
    """
    messages: Any = value
    if isinstance(value, Mapping):
        messages = value.get("messages", value.get("conversations"))
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        keys = f"an object with the keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else repr(value)
        raise BadRow(f"expected {FORMATS}, got {keys[:80]}")
    messages = [_read_message(message) for message in messages]
    system = value.get("system") if isinstance(value, Mapping) else None
    if system and not (messages and messages[0].get("role") == "system"):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _read_message(message: Mapping) -> dict:
    """Returns {"role": ..., "content": ...}. A missing key stays missing, and `check` reports it."""
    if message.get("tool_calls") or message.get("function_call"):
        raise BadRow('tool calls are not supported: write calculator calls as parts {"type": "python", "text": ...}')
    if message.get("weight", 1) != 1:
        raise BadRow(f"weight {message['weight']} is not supported: every answer is trained on")
    if "from" in message and "role" not in message:
        role = message["from"]
        renamed = {"role": SHAREGPT.get(role, role) if isinstance(role, str) else role}
        return renamed | ({"content": message["value"]} if "value" in message else {})
    return {key: message[key] for key in ("role", "content") if key in message}


def check(messages: list[dict]) -> list[dict]:
    """Returns the messages to train on. Leaves out an empty system message, and a last question without an answer.

    Raises EmptyMessage if a user or assistant message is empty or only white space. Raises BadRow if the messages are
    malformed.
    """
    begin = 1 if messages and messages[0].get("role") == "system" else 0
    for i, message in enumerate(messages):
        expected = "system" if i < begin else ("user", "assistant")[(i - begin) % 2]
        if message.get("role") != expected:
            raise BadRow(f"message {i + 1} is by {message.get('role')!r}, expected {expected!r}")
        text = _text(i, message)
        if not text.strip() and i >= begin:
            raise EmptyMessage(f"message {i + 1}, by the {expected}, is empty")
    answered = begin + (len(messages) - begin) // 2 * 2
    if answered == begin:
        raise BadRow(f"expected at least two messages, a user's and an assistant's, got {len(messages)}")
    if begin and not _text(0, messages[0]).strip():
        begin, messages, answered = 0, messages[1:], answered - 1
    return messages if answered == len(messages) else messages[:answered]


def _text(i: int, message: dict) -> str:
    """Returns the text of `message`, which is messages[i]. Parts are joined, without the calculator's outputs. If the
    content is null, returns ""."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if message["role"] != "assistant" or not isinstance(content, list):
        raise BadRow(f"message {i + 1}: content must be text, got {type(content).__name__}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in PARTS or not isinstance(part.get("text"), str):
            raise BadRow(
                f'message {i + 1}: a part must be {{"type": {"|".join(PARTS)}, "text": ...}}, got {part!r:.80}'
            )
    return "".join(part["text"] for part in content if part["type"] != "python_output")
