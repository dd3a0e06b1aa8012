"""From a conversation to a prompt that fits the context, and from the answer's token ids back to readable parts.

The terminal and the server both come here, so that the same conversation is the same prompt in both.
"""

from bisect import bisect_left
from collections.abc import Iterable

from nanochat_jax.config import UserError
from nanochat_jax.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer

_UNLIMITED = 1 << 30  # tokens: nothing is cut on the way to knowing how long a prompt is


def render(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """Token ids that ask for the assistant's next words: a turn of its own, or the rest of the last message if that is
    the assistant's. UserError for messages in the wrong order or shape."""
    last = messages[-1]
    if last["role"] != "assistant":
        return tokenizer.render_for_completion({"messages": messages}, max_tokens=_UNLIMITED)
    if isinstance(last["content"], list) and last["content"][-1:] and last["content"][-1]["type"] == "python":
        # A call without its result is made again: the calculator only answers what is generated.
        messages = [*messages[:-1], last | {"content": last["content"][:-1]}]
    ids, _ = tokenizer.render_conversation({"messages": messages}, max_tokens=_UNLIMITED)
    return ids[:-1]  # without <|assistant_end|>


def prompt(tokenizer: Tokenizer, messages: list[dict], context: int, max_tokens: int) -> tuple[list[int], int]:
    """Token ids that ask for the assistant's next words (see `render`), and how many of the oldest messages were
    dropped to make room.

    Of the `context` tokens an answer of `max_tokens` finds room beside them, or a quarter of the context if it may be
    longer than that. `messages` alternate user, assistant, ..., after an optional system message, which is never
    dropped. UserError if they do not, or if what comes last alone is too long.
    """
    # A quarter: the longest right answers of the cpu preset take 53 of its 256 tokens.
    room = context - min(max_tokens, context // 4)
    turns = messages[messages[0]["role"] == "system" :]
    head = messages[: len(messages) - len(turns)]

    def without(pairs: int) -> list[int]:
        return render(tokenizer, head + turns[2 * pairs :])

    ids = without(0)
    if len(ids) <= room:
        return ids, 0
    # Dropping more never makes it longer, so the fewest pairs of messages to drop are found by bisection.
    most = (len(turns) - 1) // 2
    pairs = bisect_left(range(most), True, key=lambda n: len(without(n)) <= room)
    ids = without(pairs)
    if len(ids) > room:
        raise UserError(f"the message is too long: it takes {len(ids)} tokens, and the model has room for {room}")
    return ids, 2 * pairs


def message(tokenizer: Tokenizer, ids: Iterable[int]) -> dict:
    """The assistant's message that the generated `ids` are, complete or not, for the conversation to go on with."""
    parts = PartReader(tokenizer).read(ids, end=True)
    return {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in parts]}


class PartReader:
    """Reads an answer as it is generated: ("text", piece), ("python", expression), ("python_output", result).

    Text comes in pieces that end between characters, an expression and its result whole. The kinds are those of the
    parts of an assistant message, so that an answer can be sent back and rendered as it was. Other special tokens are
    no text and leave no trace.
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
        """Whether `id`, if it is the next, belongs to the text rather than to a call or a result."""
        return self._kind == "text" and id not in self._special

    def read(self, ids: Iterable[int], end: bool = False) -> list[tuple[str, str]]:
        """The parts that the next `ids` bring; with `end`, also what is left of an unfinished part or character."""
        parts = []
        for id in ids:
            if id not in self._special:
                self._piece += self._decoder.push(id)
            elif id in self._kind_after:
                self._turn(self._kind_after[id], parts)
        if end:
            self._turn("text", parts)
        elif self._kind == "text":
            self._flush_piece(parts)
        return parts

    def _turn(self, kind: str, parts: list) -> None:
        """Ends the part being read; the next one is of `kind`."""
        self._piece += self._decoder.flush()
        self._flush_piece(parts)
        self._kind = kind

    def _flush_piece(self, parts: list) -> None:
        if self._piece:
            parts.append((self._kind, self._piece))
            self._piece = ""
