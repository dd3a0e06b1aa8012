"""A byte-level BPE tokenizer with nine special tokens. It turns texts into ids, and conversations into (ids, mask).

Our Rust crate, rustbpe, learns the merges. `encode` uses tiktoken, except for very long texts. `encode_batch` is for
data pipelines and uses the crate's own encoder, which gives the same ids as tiktoken.

Ids 0 to 255 are the bytes. The ids of the merges follow, in the order in which the merges were learned. The special
tokens come last. Only the program adds special tokens. If a text contains the name of a special token, the name is
encoded as ordinary text.
"""

import codecs
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, overload

import numpy as np
import tiktoken

from nanochat_jax import tokenizer_file
from nanochat_jax.config import UserError

SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # begins a call to the calculator
    "<|python_end|>",
    "<|output_start|>",  # begins the calculator's result
    "<|output_end|>",
)

# GPT-4's pattern, except that digits form groups of at most two instead of three. Groups of three digits would use up
# too much of a small vocabulary.
SPLIT_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)

# tiktoken's regex panics on very long runs of white space. Our own encoder therefore handles all texts of more than
# LONG_TEXT characters. Both encoders give the same ids.
LONG_TEXT = 1 << 16

SHORTEST_PROMPT = 4  # in tokens: <|bos|>, <|user_start|>, <|user_end|>, <|assistant_start|>
NO_LIMIT = 1 << 30  # `max_tokens` for a conversation that must not be truncated

# The parts of an assistant message: type -> (special token before it, special token after it, 1 if supervised else 0).
# The model learns to call the calculator, but not to predict the calculator's results.
PARTS: dict[str, tuple[str | None, str | None, int]] = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


def rust_crate() -> ModuleType:
    """Imports our Rust crate. Raises UserError if the crate is not built.

    Without a build, the import may still find another rustbpe. It may be the folder in the repository root, the package
    from PyPI, or an older build. None of these has encode_batch.
    """
    try:
        import rustbpe
    except ImportError:
        rustbpe = None
    if rustbpe is None or not hasattr(getattr(rustbpe, "Tokenizer", None), "encode_batch"):
        raise UserError("this version's Rust tokenizer is not built: run pip install ./rustbpe in the repository")
    return rustbpe


class Tokenizer:
    """Encodes texts and conversations, and decodes ids. `Tokenizer.train` and `Tokenizer.load` create a tokenizer."""

    def __init__(self, core: Any):
        """`core` is a trained rustbpe.Tokenizer. It is annotated as Any, because rustbpe has no type stubs."""
        self._core = core
        ranks = dict(core.get_mergeable_ranks())
        self._special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "nanochat", pat_str=core.get_pattern(), mergeable_ranks=ranks, special_tokens=self._special
        )
        self.vocab_size: int = len(ranks) + len(SPECIAL_TOKENS)
        self.bos: int = self._special["<|bos|>"]

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int, progress: Callable[[int, int], None] | None = None) -> "Tokenizer":
        """Learns a vocabulary of `vocab_size` tokens, including the special tokens. The vocabulary is smaller if the
        text has too few pairs to merge.

        `progress(merges_done, merges_wanted)` is called from time to time. Raises UserError if there is no text or if
        `vocab_size` is too small.
        """
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise UserError(f"vocab_size={vocab_size}: must be at least {smallest} for bytes and special tokens")
        core = rust_crate().Tokenizer()
        try:
            core.train_from_iterator(texts, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN, progress=progress)
        except UserError:
            raise  # raised by the iterator `texts`
        except ValueError as error:
            raise UserError(f"cannot train a tokenizer: {error}") from error
        return Tokenizer(core)

    # -----------------------------------------------------------------------------
    # Files

    @staticmethod
    def load(directory: Path) -> "Tokenizer":
        """Loads a tokenizer that `save` wrote.

        Raises UserError if a file is missing, damaged or from another program.
        """
        path = Path(directory) / "tokenizer.json"
        text, ranks = tokenizer_file.read(Path(directory), SPLIT_PATTERN, SPECIAL_TOKENS)
        crate = rust_crate()
        try:
            tokenizer = Tokenizer(crate.Tokenizer.from_mergeable_ranks(SPLIT_PATTERN, ranks))
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        if tokenizer._json != text:
            part = tokenizer_file.difference(text, tokenizer._json)
            raise UserError(f"{path}: {part} differs from what this program writes for the same vocabulary")
        return tokenizer

    def save(self, directory: Path) -> None:
        """Writes tokenizer.json and nanochat.json into `directory`, which is created if needed."""
        tokenizer_file.write(Path(directory), self._json, self.vocab_size, self._special)

    @functools.cached_property
    def hash(self) -> str:
        """The SHA-256 hash (hex) of the saved tokenizer.json. Two tokenizers are equal if and only if their hashes are
        equal."""
        return tokenizer_file.sha256(self._json)

    @functools.cached_property
    def _json(self) -> str:
        """The text of tokenizer.json."""
        tokens = [token for token, _ in self._core.get_mergeable_ranks()]
        return tokenizer_file.layout(self._core.get_pattern(), tokens, self._core.get_merges(), self._special)

    # -----------------------------------------------------------------------------
    # Text

    def special(self, name: str) -> int:
        """Returns the id of the special token `name`. Raises ValueError if the name is unknown."""
        if name not in self._special:
            raise ValueError(f"{name!r} is not a special token, expected one of {', '.join(SPECIAL_TOKENS)}")
        return self._special[name]

    def _token_id(self, token: int | str) -> int:
        """Returns the id of `token`, which is an id or the name of a special token.

        Example, for a vocabulary of 65,536 tokens: "<|bos|>" -> 65527.
        """
        return self.special(token) if isinstance(token, str) else self._check_ids([token])[0]

    def _check_ids(self, ids: Iterable[int]) -> list[int]:
        """Converts ids of any integer type to a list of int. Raises ValueError if an id is outside the vocabulary."""
        ids = list(map(operator.index, ids))
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary (0 to {self.vocab_size - 1})")
        return ids

    @overload
    def encode(
        self, text: str, prepend: int | str | None = None, append: int | str | None = None, num_threads: int = 8
    ) -> list[int]: ...

    @overload
    def encode(
        self, text: list[str], prepend: int | str | None = None, append: int | str | None = None, num_threads: int = 8
    ) -> list[list[int]]: ...

    def encode(
        self,
        text: str | list[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int = 8,
    ) -> list[int] | list[list[int]]:
        """Returns the ids of a text, or of each text in a list. `prepend` and `append` are tokens to add to each text,
        given as ids or as names of special tokens.

        Raises TypeError if a text is not a str. Raises ValueError if a token to add does not exist.
        """
        before = [] if prepend is None else [self._token_id(prepend)]
        after = [] if append is None else [self._token_id(append)]
        if isinstance(text, str):
            return before + self._encode(text) + after
        if not isinstance(text, list):
            raise TypeError(f"encode takes a str or a list of str, got {type(text).__name__}")
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}, expected 1 or more")
        for i, t in enumerate(text):
            if not isinstance(t, str):
                raise TypeError(f"item {i} of the batch is {type(t).__name__}, expected str")
        batch = [[] if len(t) <= LONG_TEXT else self._encode(t) for t in text]
        short = [i for i, t in enumerate(text) if len(t) <= LONG_TEXT]
        encoded = self._encoding.encode_ordinary_batch([text[i] for i in short], num_threads=num_threads)
        for i, ids in zip(short, encoded, strict=True):
            batch[i] = ids
        return [before + ids + after for ids in batch] if before or after else batch

    __call__ = encode

    def encode_batch(self, texts: list[str], prepend: int | str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Encodes many texts in parallel, on all cores. The ids are the same as from `encode`.

        Returns (tokens, offsets). The tokens of text i are tokens[offsets[i] : offsets[i + 1]]. `tokens` is uint16[n],
        or uint32[n] if the vocabulary has more than 65,536 tokens. `offsets` is int64[len(texts) + 1]. `prepend` is a
        token to add to each text, as in `encode`. Raises TypeError if `texts` is not a list of str.
        """
        if not isinstance(texts, list):
            raise TypeError(f"encode_batch takes a list of str, got {type(texts).__name__}")
        try:
            tokens, offsets = self._core.encode_batch(texts)
        except UnicodeEncodeError:
            tokens, offsets = self._core.encode_batch([_without_surrogates(text) for text in texts])
        # The encoder does not count the special tokens when it chooses the integer type. With the special tokens, the
        # vocabulary may exceed 65,536 tokens.
        tokens = tokens.astype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32, copy=False)
        if prepend is not None:
            tokens = np.insert(tokens, offsets[:-1], self._token_id(prepend))
            offsets = offsets + np.arange(len(offsets))
        return tokens, offsets

    def _encode(self, text: str) -> list[int]:
        """Returns the ids of one text. Our own encoder handles texts of more than LONG_TEXT characters."""
        if len(text) <= LONG_TEXT:
            return self._encoding.encode_ordinary(text)
        try:
            return self._core.encode(text)
        except UnicodeEncodeError:
            return self._core.encode(_without_surrogates(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text that the ids encode. Bytes that are not UTF-8 become U+FFFD, and a special token becomes its
        name. Raises ValueError if an id is outside the vocabulary."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Returns the bytes that the ids encode. Raises ValueError if an id is outside the vocabulary."""
        return self._encoding.decode_bytes(self._check_ids(ids))

    def token_bytes(self) -> np.ndarray:
        """Returns the length of each token in bytes as int32[vocab_size]. Special tokens have length 0.

        The raw bytes are counted, because some tokens are not valid UTF-8 on their own. Decoding them would change
        their length.
        """
        lengths = [len(token) for token, _ in self._core.get_mergeable_ranks()]
        return np.array(lengths + [0] * len(SPECIAL_TOKENS), dtype=np.int32)

    # -----------------------------------------------------------------------------
    # Conversations

    def render_conversation(self, conversation: dict, max_tokens: int = 2048) -> tuple[list[int], list[int]]:
        """Returns the ids of a conversation and their mask, both cut off after `max_tokens` tokens.

        The mask is 1 for supervised tokens, which the model learns to predict. These are the assistant's text, the
        calculator calls and <|assistant_end|>, but not <|assistant_start|> or the calculator's results. Raises
        UserError if the messages are malformed or in the wrong order.

        >>> tokenizer = Tokenizer.train(["a short text"], vocab_size=265)
        >>> question, answer = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
        >>> ids, mask = tokenizer.render_conversation({"messages": [question, answer]})
        >>> for i, supervised in zip(ids, mask): print(i, tokenizer.decode([i]), supervised)
        256 <|bos|> 0
        257 <|user_start|> 0
        49 1 0
        43 + 0
        49 1 0
        63 ? 0
        258 <|user_end|> 0
        259 <|assistant_start|> 0
        50 2 1
        260 <|assistant_end|> 1
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}, expected 1 or more")
        system, messages = _check_conversation(conversation)
        ids, mask = [self.bos], [0]
        for i, message in enumerate(messages):
            message_ids, message_mask = self._render_message(message, system if i == 0 else None)
            ids += message_ids
            mask += message_mask
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict, max_tokens: int = 2048) -> list[int]:
        """Returns the ids of a prompt for the assistant's next message. If the last message is by the assistant, it is
        left out.

        If the prompt would be longer than `max_tokens`, the oldest turns are dropped, but not the system message. If
        the last message alone is too long, its beginning is cut off. The original nanochat instead cuts off the end of
        the conversation, and so loses the question and <|user_end|>. Raises UserError if the messages are malformed or
        in the wrong order.
        """
        if max_tokens < SHORTEST_PROMPT:
            least = f"{SHORTEST_PROMPT}, the special tokens of a prompt"
            raise ValueError(f"max_tokens is {max_tokens}, expected at least {least}")
        system, messages = _check_conversation(conversation)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        rendered = [self._render_message(message)[0] for message in messages]
        kept = rendered
        for dropped in range(0, len(rendered), 2):
            if system is not None:
                rendered[dropped] = self._render_message(messages[dropped], system)[0]
            kept = rendered[dropped:]
            if 2 + sum(map(len, kept)) <= max_tokens:
                break
        ids = [self.bos, *(i for message_ids in kept for i in message_ids), self.special("<|assistant_start|>")]
        return ids if len(ids) <= max_tokens else ids[:2] + ids[len(ids) - max_tokens + 2 :]

    def _render_message(self, message: dict, system: str | None = None) -> tuple[list[int], list[int]]:
        """Returns the ids and the mask of one valid message. `system` and a blank line are put before the text of a
        user message."""
        ids, mask = [], []

        def add(new: list[int], supervised: int) -> None:
            ids.extend(new)
            mask.extend([supervised] * len(new))

        content = message["content"]
        if message["role"] == "user":
            text = content if system is None else f"{system}\n\n{content}"
            add(self.encode(text, "<|user_start|>", "<|user_end|>"), 0)
            return ids, mask
        add([self.special("<|assistant_start|>")], 0)
        # Each part is encoded by itself, so no token spans two parts.
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            before, after, supervised = PARTS[part["type"]]
            add(self.encode(part["text"], before, after), supervised)
        add([self.special("<|assistant_end|>")], 1)
        return ids, mask

    def visualize_tokenization(self, ids: Sequence[int], mask: Sequence[int], with_ids: bool = False) -> str:
        """Returns the tokens as colored text for a terminal, with bars between them. Supervised tokens are green, other
        tokens are red, and ids are grey."""
        shown = []
        for i, supervised in zip(ids, mask, strict=True):
            color = "\033[92m" if supervised else "\033[91m"
            shown.append(f"{color}{self.decode([i])}\033[0m" + (f"\033[90m({i})\033[0m" if with_ids else ""))
        return "|".join(shown)


def _without_surrogates(text: str) -> str:
    """Joins surrogate pairs and replaces lone surrogates with U+FFFD, as tiktoken does. UTF-8 cannot encode surrogates.

    Example: "\\ud83d\\ude00 \\ud83d" -> "😀 \\ufffd".
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class StreamDecoder:
    """Decodes ids that arrive one at a time. The bytes of an unfinished UTF-8 character are held back."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Returns the characters that the next id completes, or "" if it completes none."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """Returns U+FFFD if bytes are held back, otherwise "". Afterwards, the decoder is ready for another text."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


# -----------------------------------------------------------------------------
# Checking conversations


def _check_conversation(conversation: Any) -> tuple[str | None, list[dict]]:
    """Returns (the text of the system message or None, the other messages).

    The other messages must alternate between user and assistant, beginning with the user. Otherwise, raises a UserError
    that names the first wrong message.
    """
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError('a conversation is {"messages": [...]} with at least one message of role user')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f'messages[{i}]: expected {{"role": ..., "content": ...}}, got {str(message)[:80]}')
    system = None
    if messages[0]["role"] == "system":
        system = messages[0]["content"]
        if not isinstance(system, str):
            raise UserError(f"messages[0]: content of a system message must be a str, got {type(system).__name__}")
        if len(messages) == 1:
            raise UserError("messages[0]: nothing follows the system message; add a message of role user")
    offset = 0 if system is None else 1
    for i, message in enumerate(messages[offset:], offset):
        expected = "user" if (i - offset) % 2 == 0 else "assistant"
        if message["role"] != expected:
            allowed = "system (only first), then user and assistant in turn"
            raise UserError(f"messages[{i}]: role is {message['role']!r}, expected {expected!r}; roles are {allowed}")
        _check_content(i, message)
    return system, messages[offset:]


def _check_content(i: int, message: dict) -> None:
    """Raises UserError if the content of messages[i] has the wrong type or wrong parts."""
    role, content = message["role"], message["content"]
    if isinstance(content, str):
        return
    if role == "user" or not isinstance(content, list):
        expected = "a str" if role == "user" else "a str or a list of parts"
        raise UserError(f"messages[{i}]: content of role {role} must be {expected}, got {type(content).__name__}")
    for j, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in list(PARTS) or not isinstance(part.get("text"), str):
            expected = f'{{"type": {"|".join(PARTS)}, "text": str}}'
            raise UserError(f"messages[{i}].content[{j}]: expected {expected}, got {str(part)[:80]}")
