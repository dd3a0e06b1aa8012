"""Talk to the model in the terminal.

python -m scripts.chat_cli                        Starts a conversation. /help lists the commands.

python -m scripts.chat_cli -p "Why is it blue?"   Prints one answer.

python -m scripts.chat_cli -i mid -t 0            Uses the model of stage mid, with greedy decoding.

python -m scripts.chat_cli < questions.txt        Answers one question per line. Only answers go to stdout.

python -m scripts.chat_cli -p - < question.txt    Answers one question, which may have several lines.
"""

import codecs
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from nanochat_jax import commandline, config
from nanochat_jax.progress import count_of

if TYPE_CHECKING:  # importing this at run time would slow down --help
    from nanochat_jax.engine.engine import Engine

CHUNK = 8  # tokens decoded per step; with a small number, text appears smoothly
HISTORY = 1000  # number of typed lines that are kept for later conversations
SUGGESTIONS = 3  # number of questions that are suggested at the start
QUIT = ("quit", "exit", "/quit", "/exit")
# These characters are removed from the model's text, since they could move the cursor or recolour the terminal.
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def main(cfg: config.ChatCli) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # print ? for a character that stdout cannot show
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # `readable` replaces bytes that cannot be decoded
    prompt = read_prompt(cfg.prompt)

    from nanochat_jax import tasks, trained_model
    from nanochat_jax.engine.engine import Engine
    from nanochat_jax.engine.request import Request
    from nanochat_jax.parallel import devices

    # Loading prints messages. Send them to stderr, so that stdout holds only answers.
    devices.start(cfg.device_type)
    with contextlib.redirect_stdout(sys.stderr):
        model = trained_model.load(cfg.source, cfg.model_tag, cfg.step, cfg.preset)
        dtype = devices.choose_precision(cfg.compute_dtype)
    engine = Engine(model.params, model.model_cfg, model.tokenizer, slots=1, dtype=dtype, chunk=CHUNK)
    chat = Chat(engine, cfg)

    try:
        if model.stage == "base":
            note("[this model has not learned to chat: it only continues text]")
        if prompt is not None:
            say(chat, prompt)
            return
        if interactive():
            # Generate two tokens and discard them. This compiles everything before the user asks a question.
            for _ in engine.stream(Request([model.tokenizer.bos], 2, cfg.temperature, cfg.top_k)):
                pass
        with line_editing():
            converse(chat, tasks.suggestions(model.task_names)[:SUGGESTIONS])
    except BrokenPipeError:  # the program that reads the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


class Chat:
    """A conversation with the model."""

    def __init__(self, engine: "Engine", cfg: config.ChatCli):
        self.engine, self.cfg = engine, cfg
        self.system = ""
        self.messages: list[dict] = []  # the user's messages alternate with the answers
        self.tokens, self.cut_off = 0, ""  # the last answer's length, and why it was cut off, or ""

    def answer(
        self, text: str, stop: threading.Event | None = None
    ) -> tuple[int, Generator[tuple[str, str], None, None]]:
        """Starts to answer `text`. Returns (dropped, parts).

        `dropped` is the number of old messages that were dropped because the context is full. `parts` yields each part
        of the answer as it is generated (see PartReader), until the answer ends or `stop` is set. When `parts` ends or
        is closed, `text` and the answer are added to the conversation. Raises UserError if `text` is too long.
        """
        from nanochat_jax.conversation import prompt

        question = {"role": "user", "content": text}
        context, longest = self.engine.model_cfg.sequence_len, self.cfg.max_new_tokens
        ids, dropped = prompt(self.engine.tokenizer, self.conversation([question]), context, longest)
        del self.messages[:dropped]
        return dropped, self._stream(question, ids, stop)

    def conversation(self, more: Sequence[dict] = ()) -> list[dict]:
        """Returns a list of messages: the system prompt (if any), the messages so far, and `more`."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages, *more]

    def _stream(
        self, question: dict, ids: list[int], stop: threading.Event | None
    ) -> Generator[tuple[str, str], None, None]:
        from nanochat_jax.conversation import PartReader, message
        from nanochat_jax.engine.request import Request

        cfg = self.cfg
        request = Request(
            ids, max_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_k=cfg.top_k, seed=cfg.seed
        )
        reader, answer = PartReader(self.engine.tokenizer), []
        self.tokens, self.cut_off = 0, ""
        try:
            with contextlib.closing(self.engine.stream(request)) as events:
                for event in events:
                    if stop and stop.is_set():
                        break
                    answer += event.ids
                    self.tokens = len(answer)
                    if event.finish_reason == "length":
                        full = f"the context of {self.engine.model_cfg.sequence_len} tokens is full"
                        longest = "--max_new_tokens sets the maximum length"
                        self.cut_off = full if len(answer) < cfg.max_new_tokens else longest
                    yield from reader.read(event.ids)
            yield from reader.read((), end=True)
        finally:
            # In later turns, the model sees this answer as complete, even if it was cut off or stopped by Ctrl-C.
            if answer:
                self.messages += [question, message(self.engine.tokenizer, answer)]


# -----------------------------------------------------------------------------
# The conversation


def converse(chat: Chat, suggestions: Sequence[str] = ()) -> None:
    """Reads messages and prints answers until the input ends or the user quits. Before the first message, shows the
    questions in `suggestions`."""
    typed = interactive()
    if typed:
        print("Talk to the model. /help lists the commands, Ctrl-C stops an answer, Ctrl-D quits.")
        print("".join(f"Try: {question}\n" for question in suggestions), end="")
    else:
        detect_utf16()
    interrupted = False
    while True:
        try:
            text = readable(input("\nUser: " if typed else ""), "the input").strip()
        except KeyboardInterrupt:
            if interrupted or not typed:
                print(end="\n" if typed else "")
                return
            interrupted = True
            note("\n[nothing was sent; press Ctrl-C again to quit]")
            continue
        except EOFError:
            print(end="\n" if typed else "")
            return
        interrupted = False
        if text.lower() in QUIT:
            return
        try:
            if not text or run_command(chat, text):
                continue
            if typed:
                print("\nAssistant: ", end="", flush=True)
            with stoppable() as stop:
                say(chat, text, stop)
        except config.UserError as error:
            print(f"error: {error}", file=sys.stderr)


def say(chat: Chat, text: str, stop: threading.Event | None = None) -> None:
    """Prints the answer to `text` as it is generated, until the answer ends or `stop` is set."""
    dropped, parts = chat.answer(text, stop)
    if dropped:
        turns = "turn was" if dropped == 2 else f"{dropped // 2} turns were"  # a turn is a message and its answer
        note(f"[the context is full: the oldest {turns} dropped]")
    display, start = Display(colored()), time.perf_counter()
    empty = True
    with contextlib.closing(parts):
        for kind, piece in parts:
            display.show(kind, piece)
            empty = empty and not piece.strip()
    display.finish()
    stopped = stop is not None and stop.is_set()
    if empty and not stopped:
        note("[the model gave an empty answer]")
    if sys.stdout.isatty():
        seconds = time.perf_counter() - start
        end = ", stopped" if stopped else f", cut off: {chat.cut_off}" if chat.cut_off else ""
        note(f"[{chat.tokens} tokens{end}, {chat.tokens / seconds:.1f} tokens/s]")
    elif chat.cut_off:
        note(f"[the answer was cut off after {count_of(chat.tokens, 'token')}: {chat.cut_off}]")


@contextlib.contextmanager
def stoppable() -> Generator[threading.Event, None, None]:
    """Yields an event that the first Ctrl-C sets. A second Ctrl-C interrupts the program.

    The event stops an answer between two decoding steps. An exception during a step would leave the engine without its
    cache.
    """
    stop = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


# -----------------------------------------------------------------------------
# Commands


def run_command(chat: Chat, text: str) -> bool:
    """Runs `text` if it is a command, and returns whether it is one. Raises UserError if the command fails.

    An unknown command is an error only at a terminal. In a file of questions, a line that starts with a slash may be a
    question.
    """
    name, _, value = text.partition(" ")
    name, value = name.lower(), value.strip()
    if name == "clear" and not value:
        name = "/clear"
    if name in COMMANDS:
        COMMANDS[name].run(chat, value)
        return True
    if interactive() and name in QUIT[2:]:
        raise config.UserError(f"{text}: it takes no value; write {name}")
    if interactive() and name.startswith("/"):
        raise config.UserError(f"there is no command {name}; /help lists the commands")
    return False


def clear(chat: Chat, value: str) -> None:
    if value:
        raise config.UserError(f"/clear {value}: it takes no value; write /clear")
    chat.messages.clear()
    note("Conversation cleared.")


def set_temperature(chat: Chat, value: str) -> None:
    if value:
        chat.cfg = dataclasses.replace(chat.cfg, temperature=number(chat.cfg, "temperature", "/temperature", value))
    note(f"temperature is {chat.cfg.temperature}")


def set_top_k(chat: Chat, value: str) -> None:
    if value:
        chat.cfg = dataclasses.replace(chat.cfg, top_k=number(chat.cfg, "top_k", "/topk", value))
    note(f"top_k is {chat.cfg.top_k}")


def number(cfg: config.ChatCli, name: str, command: str, value: str) -> float:
    """Converts the text `value` to a number. Raises UserError unless the setting called `name` allows this number."""
    current, field = getattr(cfg, name), cfg.__dataclass_fields__[name]
    low, high = field.metadata["low"], field.metadata["high"]
    try:
        result = type(current)(value)
    except ValueError:
        result = math.nan
    if not low <= result <= high:
        kind = "a whole number" if isinstance(current, int) else "a number"
        raise config.UserError(f"{command} {value}: expected {kind} from {low} to {high}, like {command} {current}")
    return result


def set_system(chat: Chat, value: str) -> None:
    if value:
        chat.system = "" if value.lower() == "off" else value
    note(f"the system prompt is: {chat.system}" if chat.system else "there is no system prompt")


def save(chat: Chat, value: str) -> None:
    """Appends the conversation to the file named `value`, as an array of messages on one line of JSON."""
    if not value:
        raise config.UserError("/save: name a file, like /save chat.jsonl")
    if not chat.messages:
        raise config.UserError("/save: the conversation is empty")
    path = config.user_path(value)
    messages = [plain_text(message) for message in chat.conversation()]
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(messages, ensure_ascii=False) + "\n")
    except OSError as error:
        raise config.UserError(f"/save {value}: {error.strerror}") from None
    note(f"saved in {path}")


def plain_text(message: dict) -> dict:
    """Joins the parts of a message into one string, because training files require strings.

    {"content": [{"type": "text", "text": "4"}]} becomes {"content": "4"}. A message with a calculator call stays as
    it is.
    """
    content = message["content"]
    if isinstance(content, list) and all(part["type"] == "text" for part in content):
        return message | {"content": "".join(part["text"] for part in content)}
    return message


def show_help(chat: Chat, value: str) -> None:
    lines = [(command.usage, command.help) for command in COMMANDS.values()]
    lines.append(("/quit", "quit; so does Ctrl-D"))
    width = max(len(usage) for usage, _ in lines)
    print("\n".join(f"{usage:{width}}  {help}" for usage, help in lines))


@dataclass(frozen=True)
class Command:
    usage: str
    help: str
    run: Callable[[Chat, str], None]  # its second argument is the text after the command's name


COMMANDS = {
    "/clear": Command("/clear", "start a new conversation", clear),
    "/temperature": Command(
        "/temperature 0.8", "set the sampling temperature; 0: always the most likely token", set_temperature
    ),
    "/topk": Command("/topk 50", "sample from the 50 most likely tokens; 0: from all", set_top_k),
    "/system": Command("/system You are brief.", "set the system prompt; /system off removes it", set_system),
    "/save": Command("/save FILE", "append the conversation to a JSON Lines file; the web page can import it", save),
    "/help": Command("/help", "list the commands", show_help),
}


# -----------------------------------------------------------------------------
# The input


def read_prompt(prompt: str | None) -> str | None:
    """Returns the text of --prompt, or None without this flag. Raises UserError if the text is empty."""
    if prompt is None:
        if sys.stdin is None:
            raise config.UserError("stdin is closed: ask with -p, like -p 'Who are you?'")
        return None
    source = "stdin" if prompt == "-" else "--prompt"
    if prompt == "-":
        detect_utf16()
        prompt = sys.stdin.read() if sys.stdin else ""
    prompt = readable(prompt, source)
    if not prompt.strip():
        where = "--prompt=-: stdin is empty" if source == "stdin" else f"--prompt={prompt!r}: the prompt is empty"
        raise config.UserError(f"{where}; ask something, like -p 'Who are you?', or leave out -p to chat")
    return prompt


def detect_utf16() -> None:
    """Decodes stdin as UTF-16 if it begins with the byte order mark of UTF-16. Files that Windows PowerShell writes may
    begin with this mark. Waits until stdin has data."""
    stdin = sys.stdin
    if not isinstance(stdin, io.TextIOWrapper) or not isinstance(stdin.buffer, io.BufferedReader) or stdin.isatty():
        return
    if stdin.buffer.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        stdin.reconfigure(encoding="utf-16", errors="replace")


def readable(text: str, source: str) -> str:
    """Removes a byte order mark from `text`, and puts U+FFFD in place of each byte that Python could not decode.

    In `text`, each such byte is a lone surrogate. Prints a line if there are such bytes.
    """
    text = text.removeprefix("\ufeff")
    valid, count = re.subn("[\ud800-\udfff]", "\ufffd", text)
    if count:
        bytes_are = "1 byte is" if count == 1 else f"{count} bytes are"
        note(f"[{source}: {bytes_are} not valid UTF-8 and read as \ufffd; convert old text with iconv]")
    return valid


# -----------------------------------------------------------------------------
# The terminal


class Display:
    """Prints an answer part by part. A calculator call and its result appear in brackets: [37*12 = 444]."""

    def __init__(self, color: bool):
        self._color = color
        self._call: str | None = None  # the pending calculator call, which waits for its result

    def show(self, kind: str, text: str) -> None:
        """Prints the next part of the answer. `kind` and `text` come from PartReader."""
        if kind == "python_output":
            self._show_call(text)
            return
        self._show_call()
        if kind == "python":
            self._call = text
        else:
            self._write(text)

    def finish(self) -> None:
        """Prints the pending calculator call, if any, and ends the line."""
        self._show_call()
        self._write("\n")

    def _show_call(self, result: str | None = None) -> None:
        parts = [part for part in (self._call, result) if part is not None]
        self._call = None
        if parts:
            self._write(" = ".join(parts), bracketed=True)

    def _write(self, text: str, bracketed: bool = False) -> None:
        text = text.translate(CONTROL)
        if bracketed:
            text = dim(f"[{text}]", self._color)
        print(text, end="", flush=True)


def note(text: str) -> None:
    """Prints text that is not part of an answer. If stdout is not a terminal, the text goes to stderr, so that stdout
    holds only answers."""
    if sys.stdout.isatty():
        print(dim(text, colored()), flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def dim(text: str, color: bool) -> str:
    return f"\033[2m{text}\033[0m" if color else text


def colored() -> bool:
    """Returns whether to print in color: only to a terminal, and only if NO_COLOR (see no-color.org) is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def interactive() -> bool:
    """Returns whether a person types the input and reads the output."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


@contextlib.contextmanager
def line_editing() -> Generator[None, None, None]:
    """Gives input() line editing, command completion, and the lines typed in earlier conversations."""
    try:
        import readline
    except ImportError:
        readline = None
    if readline is None or not interactive():
        yield
        return
    path = config.base_dir() / "chat_history"
    names = [*COMMANDS, "/quit"]
    readline.set_completer_delims(" ")
    readline.set_completer(lambda text, i: ([n for n in names if text and n.startswith(text)] + [None])[i])
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")  # several pasted lines become one message
    with contextlib.suppress(OSError):  # the file may not exist yet
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.touch(mode=0o600)  # readable only by its owner
            readline.set_history_length(HISTORY)
            readline.write_history_file(path)


if __name__ == "__main__":
    commandline.run(main, config.ChatCli)
