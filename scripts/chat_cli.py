"""Talk to the model in the terminal.

python -m scripts.chat_cli                        a conversation: /help lists the commands, Ctrl-C stops an answer
python -m scripts.chat_cli -p "Why is it blue?"   one answer
python -m scripts.chat_cli -i mid -t 0            the mid model, greedily
python -m scripts.chat_cli < questions.txt        an answer to every line; what is not an answer goes to stderr
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from nanochat_jax import commandline, config

CHUNK = 8  # tokens decoded between two looks: small, so that text appears evenly
HISTORY = 1000  # lines that are remembered from one conversation to the next
# Text of a model must not move the cursor or recolour the terminal.
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def main(cfg: config.ChatCli) -> None:
    sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows question marks

    # What the loader says goes to stderr: stdout is the conversation, for whoever reads it through a pipe.
    from nanochat_jax import checkpoint
    from nanochat_jax.engine.engine import Engine
    from nanochat_jax.engine.request import Request
    from nanochat_jax.parallel import devices

    devices.start(cfg.device_type)
    with contextlib.redirect_stdout(sys.stderr):
        model = checkpoint.load_model(cfg.source, cfg.model_tag, cfg.step)
        dtype = devices.choose_precision(cfg.compute_dtype)
    engine = Engine(model.params, model.model_cfg, model.tokenizer, slots=1, dtype=dtype, chunk=CHUNK)
    chat = Chat(engine, cfg)
    try:
        if cfg.prompt:
            say(chat, cfg.prompt)
            return
        if interactive():
            # Two tokens for nobody: what has to be compiled is compiled before anybody waits for an answer.
            for _ in engine.stream(Request([model.tokenizer.bos], 2, cfg.temperature, cfg.top_k)):
                pass
        with history():
            converse(chat)
    except BrokenPipeError:  # whoever read the output, head for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


class Chat:
    """A conversation, and the engine that continues it."""

    def __init__(self, engine, cfg: config.ChatCli):
        self.engine, self.cfg = engine, cfg
        self.system = ""
        self.messages: list[dict] = []  # the user's and the answers to them, in turn
        self.tokens, self.cut = 0, False  # of the last answer, and whether it ended at its longest length

    def answer(self, text: str, stop: threading.Event | None = None) -> tuple[int, Iterator[tuple[str, str]]]:
        """Number of old messages that had to be dropped, and the parts of the answer (see PartReader) as they come,
        until it ends or `stop` is set.

        Text and answer become part of the conversation when the iterator ends or is closed. UserError: text too long.
        """
        from nanochat_jax.conversation import prompt

        text = text.encode("utf-8", "replace").decode()  # a terminal may hand over half a character
        question = {"role": "user", "content": text}
        context, longest = self.engine.model_cfg.sequence_len, self.cfg.max_new_tokens
        ids, dropped = prompt(self.engine.tokenizer, self.conversation([question]), context, longest)
        del self.messages[:dropped]
        return dropped, self._stream(question, ids, stop)

    def conversation(self, more: list[dict] = ()) -> list[dict]:
        """All messages, the system's first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages, *more]

    def _stream(self, question: dict, ids: list[int], stop: threading.Event | None) -> Iterator[tuple[str, str]]:
        from nanochat_jax.conversation import PartReader, message
        from nanochat_jax.engine.request import Request

        cfg = self.cfg
        request = Request(
            ids, max_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_k=cfg.top_k, seed=cfg.seed
        )
        reader, answer = PartReader(self.engine.tokenizer), []
        self.tokens, self.cut = 0, False
        try:
            with contextlib.closing(self.engine.stream(request)) as events:
                for event in events:
                    if stop and stop.is_set():
                        break
                    answer += event.ids
                    self.tokens, self.cut = len(answer), event.finish_reason == "length"
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


def interactive() -> bool:
    """Whether somebody types and reads, rather than a program."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def note(text: str) -> None:
    """Something that is not part of an answer; in a pipe it must not stand between the answers."""
    if sys.stdout.isatty():
        print(dim(text, colored()), flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def say(chat: Chat, text: str, stop: threading.Event | None = None) -> None:
    """Prints the answer to `text` while it comes, until it ends or `stop` is set."""
    dropped, parts = chat.answer(text, stop)
    if dropped:
        turns = "turn was" if dropped == 2 else f"{dropped // 2} turns were"  # a message and the answer to it
        note(f"[the context is full: the oldest {turns} dropped]")
    display, start = Display(colored()), time.perf_counter()
    with contextlib.closing(parts):
        for kind, piece in parts:
            display.show(kind, piece)
    display.finish()
    if sys.stdout.isatty():
        seconds = time.perf_counter() - start
        ended = ", stopped" if stop and stop.is_set() else ", cut off there" if chat.cut else ""
        note(f"[{chat.tokens} tokens{ended}, {chat.tokens / seconds:.1f} tokens/s]")


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


# -----------------------------------------------------------------------------
# The conversation


def converse(chat: Chat) -> None:
    """Reads messages and prints answers until quit, the end of the input, or Ctrl-C twice at the prompt."""
    typed = interactive()
    if typed:
        print("Talk to the model. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
    interrupted = False
    while True:
        try:
            text = input("\nUser: " if typed else "").strip()
        except KeyboardInterrupt:
            if interrupted or not typed:
                print(end="\n" if typed else "")
                return
            interrupted = True
            note("\n[nothing is sent; Ctrl-C again ends]")
            continue
        except EOFError:
            print(end="\n" if typed else "")
            return
        interrupted = False
        try:
            if not text or (is_command(text) and command(chat, text)):
                continue
            if text.lower() in ("quit", "exit", "/quit", "/exit"):
                return
            if typed:
                print("\nAssistant: ", end="", flush=True)
            with stoppable() as stop:
                say(chat, text, stop)
        except config.UserError as error:
            print(f"error: {error}", file=sys.stderr)


COMMANDS = {
    "/clear": "begin a new conversation",
    "/temperature 0.8": "0: the likeliest words; higher is more daring",
    "/topk 50": "how many words there are to choose from, 0 for all",
    "/system You are brief.": "what the model is told before the conversation; off: nothing",
    "/save FILE": "add the conversation to a file of JSON lines, which the page imports",
    "/help": "this list",
    "/quit": "end; so does Ctrl-D",
}


def is_command(text: str) -> bool:
    """In a file of questions only what is one: a line may begin with a slash without meaning anything by it."""
    known = {name.split()[0] for name in COMMANDS} | {"clear"}
    word = text.split()[0].lower()
    return word in known - {"/quit"} or (interactive() and word.startswith("/") and word not in ("/quit", "/exit"))


def command(chat: Chat, text: str) -> bool:
    """Does what a command says, and returns True. False: it is no command after all. UserError: it cannot be done."""
    name, _, value = text.partition(" ")
    name, value = name.lower(), value.strip()
    if name == "clear" and value:
        return False  # a message that begins with the word
    if name in ("/clear", "clear"):
        chat.messages.clear()
        note("Conversation cleared.")
    elif name in ("/temperature", "/topk"):
        field, kind = ("temperature", float) if name == "/temperature" else ("top_k", int)
        if value:
            try:
                number = kind(value)
            except ValueError:
                raise config.UserError(f"{text}: expected a number, like {name} {getattr(chat.cfg, field)}") from None
            chat.cfg = dataclasses.replace(chat.cfg, **{field: number})
        note(f"{field} is {getattr(chat.cfg, field)}")
    elif name == "/system":
        if value:
            chat.system = "" if value.lower() == "off" else value
        note(f"the system prompt is: {chat.system}" if chat.system else "there is no system prompt")
    elif name == "/save":
        save(chat, value)
    elif name == "/help":
        width = max(map(len, COMMANDS))
        print("\n".join(f"{command:{width}}  {meaning}" for command, meaning in COMMANDS.items()))
    else:
        raise config.UserError(f"{name} is no command; /help lists them")
    return True


def save(chat: Chat, name: str) -> None:
    """Adds the conversation to a file, a JSON array of messages on a line of its own."""
    if not name:
        raise config.UserError("/save: which file? /save chat.jsonl")
    if not chat.messages:
        raise config.UserError("/save: nothing has been said yet")
    path = Path(name).expanduser()
    messages = [simple(message) for message in chat.conversation()]
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(messages, ensure_ascii=False) + "\n")
    except OSError as error:
        raise config.UserError(f"/save {name}: {os.strerror(error.errno)}") from None
    note(f"saved in {path}")


def simple(message: dict) -> dict:
    """A message of text alone has a string as its content, as files of conversations have it."""
    content = message["content"]
    if isinstance(content, list) and all(part["type"] == "text" for part in content):
        return message | {"content": "".join(part["text"] for part in content)}
    return message


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Within it, input() edits lines, completes commands, and remembers what was typed, today and last time."""
    try:
        import readline
    except ImportError:
        readline = None
    if readline is None or not interactive():
        yield
        return
    path = config.base_dir() / "chat_history"
    names = [name.split()[0] for name in COMMANDS]
    readline.set_completer_delims(" ")
    readline.set_completer(lambda text, i: ([n for n in names if text and n.startswith(text)] + [None])[i])
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")  # several pasted lines are one message
    with contextlib.suppress(OSError):  # also of a file that does not exist yet
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.touch(mode=0o600)  # for nobody else to read
            readline.set_history_length(HISTORY)
            readline.write_history_file(path)


if __name__ == "__main__":
    commandline.run(main, config.ChatCli)
