"""Turns conversations into prompts that fit the context, and generated token ids back into readable parts.

The terminal and the server share this code, so that a conversation gives the same prompt in both.
"""

from bisect import bisect_left
from collections.abc import Iterable

from nanochat_jax.config import UserError
from nanochat_jax.tokenizer import NO_LIMIT, SPECIAL_TOKENS, StreamDecoder, Tokenizer


def render(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """The token ids of the prompt for the assistant's next words. If the last message is the assistant's own, these
    words continue it; otherwise they begin a new message.

    Raises UserError if the messages are in the wrong order or form.
    """
    last = messages[-1]
    if last["role"] != "assistant":
        return tokenizer.render_for_completion({"messages": messages}, max_tokens=NO_LIMIT)
    if isinstance(last["content"], list) and last["content"][-1:] and last["content"][-1]["type"] == "python":
        # Drop a call without a result, so that the model generates it again: the calculator answers only calls that
        # the model generates.
        messages = [*messages[:-1], last | {"content": last["content"][:-1]}]
    ids, _ = tokenizer.render_conversation({"messages": messages}, max_tokens=NO_LIMIT)
    return ids[:-1]  # without <|assistant_end|>


def prompt(tokenizer: Tokenizer, messages: list[dict], context: int, max_tokens: int) -> tuple[list[int], int]:
    """Returns the prompt for the assistant's next words (see `render`), and how many of the oldest messages were
    dropped to make room.

    The prompt and the answer share `context` tokens: `max_tokens` of them, but at most a quarter, are kept for the
    answer. `messages` alternate user, assistant, ..., after an optional system message, which is never dropped. Raises
    UserError if the messages do not alternate, or if the system message and the last turn alone are too long.
    """
    # A quarter is enough: the longest correct answers of the cpu preset take 53 of the 256 tokens of its context.
    room = context - min(max_tokens, context // 4)
    turns = messages[messages[0]["role"] == "system" :]
    system = messages[: len(messages) - len(turns)]

    def without(pairs: int) -> list[int]:
        return render(tokenizer, system + turns[2 * pairs :])

    ids = without(0)
    if len(ids) <= room:
        return ids, 0
    # Dropping more never makes the prompt longer, so the smallest number of pairs to drop is found by bisection.
    most = (len(turns) - 1) // 2
    pairs = bisect_left(range(most), True, key=lambda n: len(without(n)) <= room)
    ids = without(pairs)
    if len(ids) > room:
        raise UserError(f"the message is too long: it takes {len(ids)} tokens, and the model has room for {room}")
    return ids, 2 * pairs


def message(tokenizer: Tokenizer, ids: Iterable[int]) -> dict:
    """Turns the `ids` of an answer, which may be unfinished, into an assistant message for the conversation."""
    parts = PartReader(tokenizer).read(ids, end=True)
    return {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in parts]}


class PartReader:
    """Splits an answer into parts as it arrives: ("text", piece), ("python", expression), ("python_output", result).

    Text comes in pieces of whole characters; an expression or a result comes all at once. An assistant message
    has parts of the same kinds (tokenizer.PARTS), so that an answer can be sent back and rendered unchanged. Other
    special tokens are dropped.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decoder = StreamDecoder(tokenizer)
        self._special = {tokenizer.special(name) for name in SPECIAL_TOKENS}
        self._kind_after = {
            tokenizer.special("<|python_start|>"): "python",
            tokenizer.special("<|python_end|>"): "text",
            tokenizer.special("<|output_start|>"): "python_output",
            tokenizer.special("<|output_end|>"): "text",
        }
        self._kind = "text"
        self._piece = ""

    def in_text(self, id: int) -> bool:
        """Whether `id`, if it came next, would be text rather than part of a call or a result."""
        return self._kind == "text" and id not in self._special

    def read(self, ids: Iterable[int], end: bool = False) -> list[tuple[str, str]]:
        """Reads the next `ids` and returns the parts that they complete.

        With `end`, also returns what there is of an unfinished part or character.
        """
        parts = []
        for id in ids:
            if id not in self._special:
                self._piece += self._decoder.push(id)
            elif id in self._kind_after:
                self._switch_to(self._kind_after[id], parts)
        if end:
            self._switch_to("text", parts)
        elif self._kind == "text":
            self._flush_piece(parts)
        return parts

    def _switch_to(self, kind: str, parts: list[tuple[str, str]]) -> None:
        """Ends the current part, adding it to `parts`, and begins a part of `kind`."""
        self._piece += self._decoder.flush()
        self._flush_piece(parts)
        self._kind = kind

    def _flush_piece(self, parts: list[tuple[str, str]]) -> None:
        """Adds to `parts` what has been read of the current part."""
        if self._piece:
            parts.append((self._kind, self._piece))
            self._piece = ""
