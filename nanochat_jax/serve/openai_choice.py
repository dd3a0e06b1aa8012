"""A sample as OpenAI's clients see it: its text up to a stop string, and the tokens that make it up."""

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_jax.conversation import PartReader
from nanochat_jax.engine.request import Event, Scores, TopLogprobs
from nanochat_jax.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Token:
    """A token of a text: where it begins there, and how likely it and others were in its place."""

    id: int
    start: int  # characters before it
    logprob: float | None
    top: TopLogprobs | None


class Choice:
    """Reads the events of one sample. The calculator's part in it is not text and leaves no trace."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), offset: int = 0):
        """`offset`: characters that come before the answer in the text the client gets."""
        self.finish_reason: str | None = None
        self.generated = 0  # tokens, the calculator's and the last one included
        self._reader, self._stops = PartReader(tokenizer), stops
        self._length = offset  # characters read so far
        self._sent = offset  # and those already handed out
        self._pending = ""  # what lies between: it may be the beginning of a stop string
        self._tokens: list[Token] = []  # not handed out

    def read(self, event: Event) -> tuple[str, list[Token]]:
        """New text and its tokens. After a stop string nothing more comes, and `finish_reason` says so."""
        if self.finish_reason:
            return "", []
        for i, id in enumerate(event.ids):
            self.generated += 1
            if self._reader.in_text(id):
                top = event.top[i] if event.top else None
                self._tokens.append(Token(id, self._length, event.logprobs[i], top))
            if self._take(self._reader.read([id])):
                return self._release(len(self._pending))
        if event.finish_reason is None:
            return self._release(len(self._pending) - self._held())
        if not self._take(self._reader.read((), end=True)):
            self.finish_reason = event.finish_reason
            self._length += 1  # so that bytes after the last whole character are handed out too
        return self._release(len(self._pending))

    def _take(self, parts: list[tuple[str, str]]) -> bool:
        """Adds the text among `parts`. True: a stop string is complete, and the text ends before it."""
        new = "".join(text for kind, text in parts if kind == "text")
        self._length += len(new)
        self._pending += new
        ends = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0] if new else []
        if ends:
            self._pending = self._pending[: min(ends)]
            self._length = self._sent + len(self._pending)
            self.finish_reason = "stop"
        return bool(ends)

    def _held(self) -> int:
        """Characters at the end of the pending text with which a stop string may begin."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for n in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-n:]) for stop in self._stops):
                return n
        return 0

    def _release(self, count: int) -> tuple[str, list[Token]]:
        text, self._pending = self._pending[:count], self._pending[count:]
        self._sent += count
        end = self._length if self.finish_reason else self._sent
        tokens = [token for token in self._tokens if token.start < end]
        self._tokens = self._tokens[len(tokens) :]
        return text, tokens


def prompt_tokens(tokenizer: Tokenizer, ids: Sequence[int], scores: Scores, hidden: int = 0) -> list[Token]:
    """The tokens of a prompt in its text, which the first `hidden` of them are not part of."""
    decoder, length, tokens = StreamDecoder(tokenizer), 0, []
    for id, logprob, top in list(zip(ids, scores.logprobs, scores.top, strict=True))[hidden:]:
        tokens.append(Token(id, length, logprob, top))
        length += len(decoder.push(id))
    return tokens


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """The text of a token; of one that is not whole characters its bytes, so that two tokens never look the same."""
    raw = tokenizer.decode_bytes([id])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict:
    """`logprobs` of a chat completion."""

    def named(id: int, logprob: float) -> dict:
        return {"token": token_text(tokenizer, id), "logprob": logprob, "bytes": list(tokenizer.decode_bytes([id]))}

    content = [named(t.id, t.logprob) | {"top_logprobs": [named(*pair) for pair in t.top or ()]} for t in tokens]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict:
    """`logprobs` of a completion. A token itself always stands among the likeliest, as it does at OpenAI."""

    def likeliest(token: Token) -> dict | None:
        if token.logprob is None:
            return None
        return {token_text(tokenizer, id): p for id, p in (*(token.top or ()), (token.id, token.logprob))}

    return {
        "tokens": [token_text(tokenizer, t.id) for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [likeliest(t) for t in tokens],
        "text_offset": [t.start for t in tokens],
    }
