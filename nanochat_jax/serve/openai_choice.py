"""A choice of an OpenAI response: the text of one sample, and its tokens with their log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_jax.conversation import PartReader
from nanochat_jax.engine.request import Event, Scores, TopLogprobs
from nanochat_jax.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Token:
    """A token of a text, with its log-probability and the most likely tokens at its position."""

    id: int
    start: int  # how many characters of the text precede the token
    logprob: float | None  # None for the first token of a prompt, because no token precedes it
    top: TopLogprobs | None


class Choice:
    """Converts one sample's events to text and tokens. Omits calculator calls and their results.

    Text that may be the beginning of a stop string is held back until more text arrives.

    Example: the stop string is "END", and the text arrives as "the ", "E", "N", "D.". Then `read` returns the texts
    "the ", "", "", "", and finish_reason becomes "stop".
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = (), offset: int = 0):
        """`offset` is the length of the echoed prompt in characters, or 0 if there is no echo."""
        self.finish_reason: str | None = None
        self.generated = 0  # the number of tokens so far, including calculator tokens and the end token
        self._reader, self._stop_strings = PartReader(tokenizer), stop_strings
        self._length = offset  # the number of characters read so far, plus `offset`
        self._sent = offset  # the number of characters returned so far, plus `offset`
        self._pending = ""  # text not returned yet, because a stop string may begin in it
        self._tokens: list[Token] = []  # tokens not returned yet

    def read(self, event: Event) -> tuple[str, list[Token]]:
        """Returns the new text and its tokens. A stop string ends the text and sets `finish_reason` to "stop"."""
        if self.finish_reason:
            return "", []
        for i, id in enumerate(event.ids):
            self.generated += 1
            if self._reader.in_text(id):
                top = event.top[i] if event.top else None
                self._tokens.append(Token(id, self._length, event.logprobs[i], top))
            if self._append(self._reader.read([id])):
                return self._release(len(self._pending))
        if event.finish_reason is None:
            return self._release(len(self._pending) - self._held_back())
        if not self._append(self._reader.read((), end=True)):
            self.finish_reason = event.finish_reason
            self._length += 1  # makes `_release` include tokens that start exactly at the end of the text
        return self._release(len(self._pending))

    def _append(self, parts: list[tuple[str, str]]) -> bool:
        """Appends the text in `parts` to the pending text. If this completes a stop string, removes the stop string and
        the text after it, and returns True."""
        new = "".join(text for kind, text in parts if kind == "text")
        self._length += len(new)
        self._pending += new
        ends = [at for stop in self._stop_strings if (at := self._pending.find(stop)) >= 0] if new else []
        if ends:
            self._pending = self._pending[: min(ends)]
            self._length = self._sent + len(self._pending)
            self.finish_reason = "stop"
        return bool(ends)

    def _held_back(self) -> int:
        """Returns how many characters at the end of the pending text may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop_strings), default=0)
        for n in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-n:]) for stop in self._stop_strings):
                return n
        return 0

    def _release(self, count: int) -> tuple[str, list[Token]]:
        """Removes the first `count` characters of the pending text. Returns them and the tokens that start in them."""
        text, self._pending = self._pending[:count], self._pending[count:]
        self._sent += count
        end = self._length if self.finish_reason else self._sent
        tokens = [token for token in self._tokens if token.start < end]
        self._tokens = self._tokens[len(tokens) :]
        return text, tokens


def prompt_tokens(tokenizer: Tokenizer, ids: Sequence[int], scores: Scores, hidden: int = 0) -> list[Token]:
    """Returns the tokens of a prompt with their log-probabilities. Skips the first `hidden` tokens, which the echoed
    text omits."""
    decoder, length, tokens = StreamDecoder(tokenizer), 0, []
    for id, logprob, top in list(zip(ids, scores.logprobs, scores.top, strict=True))[hidden:]:
        tokens.append(Token(id, length, logprob, top))
        length += len(decoder.push(id))
    return tokens


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """Returns the text of a token. If its bytes are not valid UTF-8, returns them in OpenAI's notation.

    Examples: the token "the" gives "the"; the first byte of "é" gives "bytes:\\xc3".
    """
    raw = tokenizer.decode_bytes([id])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict:
    """Returns the field `logprobs` of a chat completion."""

    def entry(id: int, logprob: float | None) -> dict:
        return {"token": token_text(tokenizer, id), "logprob": logprob, "bytes": list(tokenizer.decode_bytes([id]))}

    content = [entry(t.id, t.logprob) | {"top_logprobs": [entry(*pair) for pair in t.top or ()]} for t in tokens]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict:
    """Returns the field `logprobs` of a completion. As in OpenAI's API, the top_logprobs of a token always include
    the token itself."""

    def top_logprobs(token: Token) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        return {token_text(tokenizer, id): p for id, p in (*(token.top or ()), (token.id, token.logprob))}

    return {
        "tokens": [token_text(tokenizer, t.id) for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [top_logprobs(t) for t in tokens],
        "text_offset": [t.start for t in tokens],
    }
