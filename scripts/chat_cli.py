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

from nanochat_jax import commandline, config

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
    with contextlib.redirect_stdout(sys.stderr):
        model = checkpoint.load_model(cfg.source, cfg.model_tag, cfg.step)
        dtype = parallel.precision(cfg.compute_dtype)
    engine = Engine(model.params, model.config, model.tokenizer, slots=1, dtype=dtype, chunk=CHUNK)
    chat = Chat(engine, cfg)
    if cfg.prompt:
        say(chat, cfg.prompt)
    else:
        converse(chat)


class Chat:
    """A conversation, and the engine that continues it."""

    def __init__(self, engine, cfg: config.ChatCli):
        self.engine, self.cfg = engine, cfg
        self.messages: list[dict] = []  # the user's and the answers to them, in turn

    def answer(self, text: str, stop: threading.Event | None = None) -> tuple[int, Iterator[tuple[str, str]]]:
        """Number of old messages that had to be dropped, and the parts of the answer (see PartReader) as they come,
        until it ends or `stop` is set.

        Text and answer become part of the conversation when the iterator ends or is closed. UserError: text too long.
        """
        from nanochat_jax.conversation import prompt

        text = text.encode("utf-8", "replace").decode()  # a terminal may hand over half a character
        question = {"role": "user", "content": text}
        context, longest = self.engine.cfg.sequence_len, self.cfg.max_new_tokens
        ids, dropped = prompt(self.engine.tokenizer, [*self.messages, question], context, longest)
        del self.messages[:dropped]
        return dropped, self._stream(question, ids, stop)

    def _stream(self, question: dict, ids: list[int], stop: threading.Event | None) -> Iterator[tuple[str, str]]:
        from nanochat_jax.conversation import PartReader, message
        from nanochat_jax.engine.engine import Request

        cfg = self.cfg
        request = Request(
            ids, max_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_k=cfg.top_k, seed=cfg.seed
        )
        reader, answer = PartReader(self.engine.tokenizer), []
        try:
            with contextlib.closing(self.engine.stream(request)) as events:
                for event in events:
                    if stop and stop.is_set():
                        break
                    answer += event.ids
                    yield from reader.read(event.ids)
            yield from reader.read((), end=True)
        finally:
            # However the answer ended (by itself, length, Ctrl-C), the model should see it as complete.
            if answer:
                self.messages += [question, message(self.engine.tokenizer, answer)]


class Display:
    """Writes an answer part by part, a calculator's call and its result in brackets: [37*12 = 444]."""

    def __init__(self, color: bool):
        self._color = color
        self._call: str | None = None  # an expression whose result may follow

    def show(self, kind: str, text: str) -> None:
        if kind == "python_output":
            self._show_call(text)
            return
        self._show_call()
        if kind == "python":
            self._call = text
        else:
            self._write(text)

    def finish(self) -> None:
        """Shows a call without a result, and ends the line."""
        self._show_call()
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
    dropped, parts = chat.answer(text, stop)
    if dropped:
        turns = "turn was" if dropped == 2 else f"{dropped // 2} turns were"  # a message and the answer to it
        print(dim(f"[the context is full: the oldest {turns} dropped]", colored()))
    display = Display(colored())
    with contextlib.closing(parts):
        for kind, piece in parts:
            display.show(kind, piece)
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
            chat.messages.clear()
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
    commandline.run(main, config.ChatCli)
