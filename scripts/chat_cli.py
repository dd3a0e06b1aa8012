"""Talk to the model in the terminal.

python -m scripts.chat_cli                        a conversation: quit or exit, clear, Ctrl-C stops an answer
python -m scripts.chat_cli -p "Why is it blue?"   one answer
python -m scripts.chat_cli -i mid -t 0            the mid model, greedily
"""

import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator

from nanochat_jax import config

CHUNK = 8  # tokens decoded between two looks: small, so that text appears evenly
# Text of a model must not move the cursor or recolour the terminal.
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def main(cfg: config.ChatCli) -> None:
    # Wrong flags are told before the model is loaded.
    if cfg.max_new_tokens < 1:
        raise config.UserError(f"--max_new_tokens={cfg.max_new_tokens}: must be at least 1")
    if not (math.isfinite(cfg.temperature) and cfg.temperature >= 0):
        raise config.UserError(f"--temperature={cfg.temperature}: must be 0 (greedy) or a positive number")
    if cfg.top_k < 0:
        raise config.UserError(f"--top_k={cfg.top_k}: must be 0 (off) or positive")

    # What the loader says goes to stderr: stdout is the conversation, for whoever reads it through a pipe.
    from nanochat_jax import checkpoint, parallel
    from nanochat_jax.engine.engine import Engine

    parallel.start(cfg.device_type)
    dtype, _ = parallel.compute_dtype(cfg.compute_dtype)
    with contextlib.redirect_stdout(sys.stderr):
        model = checkpoint.load_model(cfg.source, cfg.model_tag, cfg.step)
    engine = Engine(model.params, model.config, model.tokenizer, slots=1, dtype=dtype, chunk=CHUNK)
    chat = Chat(engine, cfg)
    if cfg.prompt:
        say(chat, cfg.prompt)
    else:
        converse(chat)


class Chat:
    """A conversation as token ids, and the engine that continues it."""

    def __init__(self, engine, cfg: config.ChatCli):
        self.engine, self.cfg, self.tokenizer = engine, cfg, engine.tokenizer
        self.turns: list[list[int]] = []  # the user's message and the answer to it, special tokens included

    def answer(self, text: str) -> tuple[int, Iterator[int]]:
        """Number of old turns that had to be dropped, and the tokens of the answer as they come.

        The answer becomes part of the conversation when the iterator ends or is closed. UserError: message too long.
        """
        text = text.encode("utf-8", "replace").decode()  # a terminal may hand over half a character
        message = [*self.tokenizer.encode(text, "<|user_start|>", "<|user_end|>"), self._id("assistant_start")]
        dropped = self._make_room(1 + len(message))
        return dropped, self._stream(message)

    def _make_room(self, needed: int) -> int:
        """Drops the oldest turns until `needed` tokens and an answer fit into the context; returns how many."""
        context = self.engine.cfg.sequence_len
        if needed >= context:
            raise config.UserError(f"the message is too long: {needed} tokens, and the model's context holds {context}")
        needed = min(needed + min(self.cfg.max_new_tokens, context // 4), context)
        dropped = 0
        while self.turns and needed + sum(map(len, self.turns)) > context:
            self.turns.pop(0)
            dropped += 1
        return dropped

    def _stream(self, message: list[int]) -> Iterator[int]:
        from nanochat_jax.engine.engine import Request

        cfg = self.cfg
        prompt = [self.tokenizer.bos, *(i for turn in self.turns for i in turn), *message]
        request = Request(
            prompt, max_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_k=cfg.top_k, seed=cfg.seed
        )
        answer = []
        try:
            with contextlib.closing(self.engine.stream(request)) as events:
                for event in events:
                    for token in event.ids:
                        answer.append(token)
                        yield token
        finally:
            # However the answer ended (bos, length, Ctrl-C), the model should see it as complete.
            ends = (self._id("assistant_end"), self.tokenizer.bos)
            if answer:
                body = answer[:-1] if answer[-1] in ends else answer
                self.turns.append([*message, *body, self._id("assistant_end")])

    def _id(self, name: str) -> int:
        return self.tokenizer.special(f"<|{name}|>")


class Display:
    """Writes an answer token by token: whole characters only, calculator calls in brackets, no special tokens."""

    def __init__(self, tokenizer, color: bool):
        from nanochat_jax.tokenizer import SPECIAL_TOKENS, StreamDecoder

        self._tokenizer, self._color = tokenizer, color
        self._text = StreamDecoder(tokenizer)
        self._special = {tokenizer.special(name): name.strip("<|>") for name in SPECIAL_TOKENS}
        self._block: list[int] | None = None  # tokens of the python or output block we are in
        self._call: str | None = None  # an expression whose result may follow

    def push(self, token: int) -> None:
        name = self._special.get(token)
        if name is None and self._block is not None:
            self._block.append(token)
        elif name is None:
            self._show_call()
            self._write(self._text.push(token))
        elif name in ("python_start", "output_start"):
            self._write(self._text.flush())
            if name == "python_start":
                self._show_call()
            self._block = []
        elif name == "python_end" and self._block is not None:
            self._call, self._block = self._tokenizer.decode(self._block), None
        elif name == "output_end" and self._block is not None:
            self._show_call(self._tokenizer.decode(self._block))
            self._block = None

    def finish(self) -> None:
        """Shows what was held back, of a character or of a block, and ends the line."""
        self._write(self._text.flush())
        result = self._tokenizer.decode(self._block) if self._block else None
        self._show_call(result)
        self._block = None
        self._write("\n")

    def _show_call(self, result: str | None = None) -> None:
        parts = [part for part in (self._call, result) if part is not None]
        self._call = None
        if parts:
            self._write(" = ".join(parts), note=True)

    def _write(self, text: str, note: bool = False) -> None:
        text = text.translate(CONTROL)
        if note:
            text = dim(f"[{text}]", self._color)
        print(text, end="", flush=True)


def dim(text: str, color: bool) -> str:
    return f"\033[2m{text}\033[0m" if color else text


def colored() -> bool:
    """Whether stdout is a terminal whose user has not asked for plain text (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def say(chat: Chat, text: str, stop: threading.Event | None = None) -> None:
    """Prints the answer to `text` while it comes, until it ends or `stop` is set."""
    dropped, tokens = chat.answer(text)
    if dropped:
        turns = "turn was" if dropped == 1 else f"{dropped} turns were"
        print(dim(f"[the context is full: the oldest {turns} dropped]", colored()))
    display = Display(chat.tokenizer, colored())
    with contextlib.closing(tokens):
        for token in tokens:
            display.push(token)
            if stop and stop.is_set():
                break
    display.finish()


@contextlib.contextmanager
def stoppable() -> Iterator[threading.Event]:
    """Within it, Ctrl-C sets the event, and a second one interrupts the program.

    An exception in the middle of a step would leave the engine without its cache, so an answer ends between two.
    """
    stop = threading.Event()

    def handle(signum, frame):
        stop.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def converse(chat: Chat) -> None:
    """Reads messages and prints answers until quit, the end of the input, or Ctrl-C at the prompt."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    typed = sys.stdin.isatty()
    if typed:
        print("Talk to the model. quit or exit ends, clear starts anew, Ctrl-C stops an answer.")
    while True:
        try:
            text = input("\nUser: " if typed else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(end="\n" if typed else "")
            return
        if text.lower() in ("quit", "exit"):
            return
        if text.lower() == "clear":
            chat.turns.clear()
            print("Conversation cleared.")
        elif text:
            if typed:
                print("\nAssistant: ", end="", flush=True)
            try:
                with stoppable() as stop:
                    say(chat, text, stop)
            except config.UserError as error:
                print(f"error: {error}")


if __name__ == "__main__":
    config.run(main, config.ChatCli)
