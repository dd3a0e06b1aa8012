"""One choice of an OpenAI response: a sample's text up to a stop string, its tokens, and their log-probabilities."""

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
    logprob: float | None  # None for the first token of a prompt
    top: TopLogprobs | None


class Choice:
    """Turns one sample's events into text and tokens. The calculator's calls and results are left out.

    Text that may be the beginning of a stop string is held back until later text shows whether it is. With the stop
    string "END", the pieces "the ", "E", "N", "D." give "the ", "", "", "", and the last piece sets finish_reason to
    "stop".
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = (), offset: int = 0):
        """`offset` is the length in characters of the echoed prompt, which the client gets before the answer."""
        self.finish_reason: str | None = None
        self.generated = 0  # tokens generated so far, including the calculator's and the token that ends the answer
        self._reader, self._stop_strings = PartReader(tokenizer), stop_strings
        self._length = offset  # characters read so far
        self._sent = offset  # characters handed out so far
        self._pending = ""  # text read but held back, since it may be the beginning of a stop string
        self._tokens: list[Token] = []  # tokens not handed out yet

    def read(self, event: Event) -> tuple[str, list[Token]]:
        """Returns the new text and its tokens. After a stop string, `finish_reason` is "stop", and nothing more is
        returned."""
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
            self._length += 1  # so that `_release` also hands out tokens that start at the end of the text
        return self._release(len(self._pending))

    def _append(self, parts: list[tuple[str, str]]) -> bool:
        """Appends the text among `parts`. If the text now contains a stop string, truncates the text before that string
        and returns True."""
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
        """How many characters at the end of the pending text may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop_strings), default=0)
        for n in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-n:]) for stop in self._stop_strings):
                return n
        return 0

    def _release(self, count: int) -> tuple[str, list[Token]]:
        """Hands out the first `count` characters of the pending text, and the tokens that begin in them."""
        text, self._pending = self._pending[:count], self._pending[count:]
        self._sent += count
        end = self._length if self.finish_reason else self._sent
        tokens = [token for token in self._tokens if token.start < end]
        self._tokens = self._tokens[len(tokens) :]
        return text, tokens


def prompt_tokens(tokenizer: Tokenizer, ids: Sequence[int], scores: Scores, hidden: int = 0) -> list[Token]:
    """The tokens of a prompt with their log-probabilities. The first `hidden` tokens are left out, since they are not
    in the prompt's text."""
    decoder, length, tokens = StreamDecoder(tokenizer), 0, []
    for id, logprob, top in list(zip(ids, scores.logprobs, scores.top, strict=True))[hidden:]:
        tokens.append(Token(id, length, logprob, top))
        length += len(decoder.push(id))
    return tokens


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """A token's text, or its bytes if they are not valid UTF-8, since different tokens must never look the same.

    "the" -> "the"; the first byte of "é" -> "bytes:\\xc3", as OpenAI writes it.
    """
    raw = tokenizer.decode_bytes([id])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict:
    """The field `logprobs` of a chat completion."""

    def entry(id: int, logprob: float | None) -> dict:
        return {"token": token_text(tokenizer, id), "logprob": logprob, "bytes": list(tokenizer.decode_bytes([id]))}

    content = [entry(t.id, t.logprob) | {"top_logprobs": [entry(*pair) for pair in t.top or ()]} for t in tokens]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict:
    """The field `logprobs` of a completion. As in OpenAI's API, top_logprobs always includes the token itself."""

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
