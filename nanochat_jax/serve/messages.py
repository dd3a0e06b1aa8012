"""Turns the messages of an OpenAI client into turns in the strict order that the model was trained on.

OpenAI's API takes messages in any order. The model knows only alternating turns of user and assistant, and the user
begins. So the messages are converted as follows:

- A system or developer message becomes text of the user, wherever it stands. In training, a system message at the
  beginning was also put before the user's text, with a blank line between them.
- An assistant message without content says nothing and is left out.
- Neighbouring messages of the same role are merged, with a blank line between them.
- If the conversation begins with the assistant, an empty turn of the user is put before the first turn.
"""

from collections.abc import Sequence

from pydantic import BaseModel, Field

from nanochat_jax.serve.errors import ApiError

# OpenAI's role -> the model's role
ROLES = {"system": "user", "developer": "user", "user": "user", "assistant": "assistant"}
PART_TYPES = ("text", "refusal", "python", "python_output")
SEPARATOR = "\n\n"


class OpenAIPart(BaseModel):
    type: str = Field(description="text; in messages of the assistant also refusal, python and python_output")
    text: str | None = None
    refusal: str | None = None


class OpenAIMessage(BaseModel):
    role: str = Field(description=f"one of {', '.join(ROLES)}")
    content: str | list[OpenAIPart] | None = Field(None, description="only the assistant's content may be null")


def as_turns(messages: Sequence[OpenAIMessage]) -> list[dict]:
    """Returns the messages as turns that `conversation.render` accepts.

    Raises ApiError 400 if a message has an unknown role or an unsupported part, or if no message has content.
    """
    turns: list[tuple[str, list[dict]]] = []
    for i, message in enumerate(messages):
        parts = _parts(message, i)
        if parts is None:
            continue
        role = ROLES[message.role]
        if turns and turns[-1][0] == role:
            merged = turns[-1][1]
            # An empty message adds nothing, not even a blank line.
            merged += [{"type": "text", "text": SEPARATOR}, *parts] if merged and parts else parts
        else:
            turns.append((role, parts))
    if not turns:
        raise ApiError(400, "messages: no message has any content", "messages")
    if turns[0][0] == "assistant":
        turns.insert(0, ("user", []))
    return [{"role": role, "content": _content(parts)} for role, parts in turns]


def _parts(message: OpenAIMessage, index: int) -> list[dict] | None:
    """Returns the nonempty parts of messages[index], or None if the message is the assistant's and has no content."""
    field = f"messages[{index}]"
    if message.role not in ROLES:
        expected = f"expected one of {', '.join(ROLES)}"
        raise ApiError(400, f"{field}.role: got {message.role[:40]!r}, {expected}", f"{field}.role")
    content = message.content
    if content is None:
        if message.role != "assistant":
            reason = f"got null, but only the assistant's content may be null, and this is the {message.role}'s"
            raise ApiError(400, f"{field}.content: {reason}", f"{field}.content")
        return None
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    parts = []
    for j, part in enumerate(content):
        where = f"{field}.content[{j}]"
        if part.type not in PART_TYPES:
            reason = f"got {part.type[:40]!r}, but this model reads only text"
            raise ApiError(400, f"{where}.type: {reason}", f"{where}.type")
        if part.type != "text" and message.role != "assistant":
            reason = f"got {part.type!r}, which only the assistant's content may hold"
            raise ApiError(400, f"{where}.type: {reason}", f"{where}.type")
        name = "refusal" if part.type == "refusal" else "text"
        text = getattr(part, name)
        if text is None:
            raise ApiError(400, f"{where}.{name}: a string is required", f"{where}.{name}")
        if text:
            parts.append({"type": "text" if name == "refusal" else part.type, "text": text})
    return parts


def _content(parts: list[dict]) -> str | list[dict]:
    """Joins the parts into one string if all are text, so that no token boundary falls between them. Otherwise, returns
    the list."""
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts
