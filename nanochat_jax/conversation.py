"""Turns conversations into prompts that fit the context, and splits generated answers into text and calculator calls.

The terminal chat and the server share this code, so they make the same prompt from the same conversation. Evaluation
and reinforcement learning share `problem_prompt`.
"""

from bisect import bisect_left
from collections.abc import Iterable

from nanochat_jax.config import UserError
from nanochat_jax.tokenizer import NO_LIMIT, SPECIAL_TOKENS, StreamDecoder, Tokenizer


def render(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """Returns the token ids of the prompt for the assistant's next words. If the last message is by the assistant, the
    next words continue that message. Otherwise, they begin a new message.

    Raises UserError if the messages are malformed or in the wrong order.
    """
    last = messages[-1]
    if last["role"] != "assistant":
        return tokenizer.render_for_completion({"messages": messages}, max_tokens=NO_LIMIT)
    if isinstance(last["content"], list) and last["content"][-1:] and last["content"][-1]["type"] == "python":
        # The message ends with a calculator call that has no result yet. The calculator answers only newly generated
        # calls. Drop the call, so that the model generates it again.
        messages = [*messages[:-1], last | {"content": last["content"][:-1]}]
    ids, _ = tokenizer.render_conversation({"messages": messages}, max_tokens=NO_LIMIT)
    return ids[:-1]  # drop <|assistant_end|>, so that the message can continue


def prompt(tokenizer: Tokenizer, messages: list[dict], context: int, max_tokens: int) -> tuple[list[int], int]:
    """Returns the prompt for the assistant's next words (see `render`) and the number of messages that were dropped.
    The oldest messages are dropped if the prompt would be too long.

    The prompt and the answer together must fit into `context` tokens. Of these, min(max_tokens, context // 4) are
    reserved for the answer. A system message at the beginning is never dropped. The other messages must alternate
    between user and assistant. Raises UserError if they do not alternate, or if the system message and the last turn
    alone are too long.
    """
    # A quarter of the context is enough for an answer. In the cpu preset, a quarter is 64 of 256 tokens, and the
    # longest correct answers take 53 tokens.
    room = context - min(max_tokens, context // 4)
    turns = messages[messages[0]["role"] == "system" :]
    system = messages[: len(messages) - len(turns)]

    def without(pairs: int) -> list[int]:
        return render(tokenizer, system + turns[2 * pairs :])

    ids = without(0)
    if len(ids) <= room:
        return ids, 0
    # Dropping more pairs never makes the prompt longer, so bisection finds the smallest number of pairs to drop.
    most = (len(turns) - 1) // 2
    pairs = bisect_left(range(most), True, key=lambda n: len(without(n)) <= room)
    ids = without(pairs)
    if len(ids) > room:
        raise UserError(f"the message is too long: it takes {len(ids)} tokens, and the model has room for {room}")
    return ids, 2 * pairs


def problem_prompt(tokenizer: Tokenizer, problem: dict, limit: int) -> tuple[list[int], bool]:
    """Returns a prompt of at most `limit` tokens for a task's problem, and whether the prompt was cut to fit.

    A long prompt loses its beginning (see `Tokenizer.render_for_completion`). A cut problem is still scored, as in the
    original nanochat, but the caller has to report how many problems were cut.
    """
    ids = tokenizer.render_for_completion(problem, max_tokens=NO_LIMIT)
    if len(ids) <= limit:
        return ids, False
    return tokenizer.render_for_completion(problem, max_tokens=limit), True


def message(tokenizer: Tokenizer, ids: Iterable[int]) -> dict:
    """Turns the `ids` of an answer into an assistant message. The answer may be unfinished."""
    parts = PartReader(tokenizer).read(ids, end=True)
    return {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in parts]}


class PartReader:
    """Splits a growing answer into parts: ("text", piece), ("python", expression), ("python_output", result).

    A text may be split into several pieces, but never within a character. An expression or a result is never split. The
    kinds are those in tokenizer.PARTS, so the parts of an answer are also the parts of a valid assistant message.
    Special tokens that do not begin or end a part are dropped.
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
        """Whether the token `id` would be text if it came next. Special tokens, and tokens inside a call or a result,
        are not text."""
        return self._kind == "text" and id not in self._special

    def read(self, ids: Iterable[int], end: bool = False) -> list[tuple[str, str]]:
        """Reads the next `ids` and returns the parts that these ids complete.

        If `end` is true, also returns the unfinished part. If this part ends within a character, the incomplete
        character becomes U+FFFD.
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
        """Adds the current part to `parts` and begins a new part of kind `kind`."""
        self._piece += self._decoder.flush()
        self._flush_piece(parts)
        self._kind = kind

    def _flush_piece(self, parts: list[tuple[str, str]]) -> None:
        """Moves the current piece to `parts`."""
        if self._piece:
            parts.append((self._kind, self._piece))
            self._piece = ""
