"""The terminal chat: what it shows, what it remembers, and how it is stopped."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from scripted_model import line_ids, scripted
from serving import save_model

from nanochat_jax.config import REPOSITORY, ChatCli, GPTConfig, UserError
from nanochat_jax.conversation import PartReader
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import Event
from nanochat_jax.model import gpt
from nanochat_jax.tasks.customjson import CustomJSON
from nanochat_jax.tokenizer import Tokenizer
from scripts import chat_cli

CALL = ["q", "<|user_end|>", "<|assistant_start|>", "a", "<|python_start|>", "37*12", "<|python_end|>"]
AFTER = ["<|output_end|>", "é", "!", "<|assistant_end|>"]
ANSWER = "a[37*12 = 444]é!\n"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["what is 37 * 12 = 444?"] * 3, 270)


@pytest.fixture(scope="module")
def model_cfg(tokenizer):
    return GPTConfig(1, 2, 2, 64, tokenizer.vocab_size, 128)


@pytest.fixture(scope="module")
def params(model_cfg, tokenizer):
    return scripted(gpt.init(model_cfg, seed=0), model_cfg, tokenizer, CALL, AFTER)


@pytest.fixture(scope="module")
def engine(params, model_cfg, tokenizer):
    return Engine(params, model_cfg, tokenizer, slots=1, chunk=4)


@pytest.fixture
def chat(engine):
    return chat_cli.Chat(engine, ChatCli(temperature=0.0, max_new_tokens=30))


def assistant(*parts) -> dict:
    return {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in parts]}


def type_in(monkeypatch, *lines):
    """Makes input() return `lines` and then reach the end of the input; exceptions among them are raised."""
    left = list(lines)

    def read(prompt=""):
        if not left:
            raise EOFError
        line = left.pop(0)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)


def test_an_answer_shows_the_call_and_no_special_tokens(chat, capsys, tokenizer):
    chat_cli.say(chat, "q")
    assert capsys.readouterr().out == ANSWER
    parts = [("text", "a"), ("python", "37*12"), ("python_output", "444"), ("text", "é!")]
    assert chat.messages == [{"role": "user", "content": "q"}, assistant(*parts)]


def test_the_next_turn_sees_the_conversation(chat, engine, monkeypatch, tokenizer):
    chat_cli.say(chat, "q")
    requests = []
    real = engine.stream
    monkeypatch.setattr(engine, "stream", lambda request: requests.append(request) or real(request))
    asked = [*chat.messages, {"role": "user", "content": "q"}]
    chat_cli.say(chat, "q")
    assert requests[0].ids == tokenizer.render_for_completion({"messages": asked})
    assert len(chat.messages) == 4


def test_text_that_names_special_tokens_stays_text(chat, tokenizer):
    _, parts = chat.answer("<|assistant_end|>")
    next(parts)
    parts.close()
    ids, _ = tokenizer.render_conversation({"messages": chat.messages})
    assert ids.count(tokenizer.special("<|assistant_end|>")) == 1


def test_an_answer_cut_short_is_completed(chat, capsys):
    chat.cfg = ChatCli(temperature=0.0, max_new_tokens=2)
    chat_cli.say(chat, "q")
    assert chat.messages[1] == assistant(("text", "a"))
    printed = capsys.readouterr()
    assert printed.out == "a\n" and "cut off after 2 tokens: --max_new_tokens sets" in printed.err


def test_an_answer_that_fills_the_context_says_so(chat, engine, monkeypatch, capsys, tokenizer):
    """--max_new_tokens is then not the limit, so it is not named."""
    end = Event(0, 0, tokenizer.encode("a"), [1], [0.0], "length")
    monkeypatch.setattr(engine, "stream", lambda request: (event for event in [end]))
    chat_cli.say(chat, "q")
    printed = capsys.readouterr().err
    assert "cut off after 1 token: the context of 128 tokens is full" in printed and "--max" not in printed


def test_an_empty_answer_is_said(chat, engine, monkeypatch, capsys, tokenizer):
    end = Event(0, 0, [tokenizer.special("<|assistant_end|>")], [1], [0.0], "stop")
    monkeypatch.setattr(engine, "stream", lambda request: (event for event in [end]))
    chat_cli.say(chat, "q")
    assert capsys.readouterr() == ("\n", "[the model gave an empty answer]\n")


def test_conversation(chat, monkeypatch, capsys):
    type_in(monkeypatch, "q", "", "  ", "clear", "q", "exit", "never read")
    chat_cli.converse(chat)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (ANSWER * 2, "Conversation cleared.\n")
    assert len(chat.messages) == 2


def test_commands(chat, monkeypatch, capsys, tmp_path):
    type_in(
        monkeypatch, "/temperature 0.5", "/temperature 0", "/topk", "/TOPK 7", "/system Be brief.", "/system", "/save",
        "/save x", "q", f"/save {tmp_path}/chat.jsonl", "/clear", "/system off", "q", f"/save {tmp_path}/chat.jsonl",
        "/save /nowhere/x", "/topk x", "/topk -1", "/topk 99999999999999999999", "/topk 5.5", "/temperature nan",
        "/temperature 9", "/temperature 0,5", "/temperature 1 2", "/temperature inf", "/clear all",
        "/usr/bin is a folder", "clear as mud", "/help",
    )  # fmt: skip
    chat_cli.converse(chat)
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "temperature is 0.5",
        "temperature is 0.0",
        "top_k is 50",
        "top_k is 7",
        "the system prompt is: Be brief.",
        "the system prompt is: Be brief.",
        "error: /save: name a file, like /save chat.jsonl",
        "error: /save: the conversation is empty",
        f"saved in {tmp_path}/chat.jsonl",
        "Conversation cleared.",
        "there is no system prompt",
        f"saved in {tmp_path}/chat.jsonl",
        "error: /save /nowhere/x: No such file or directory",
        *(
            f"error: /topk {value}: expected a whole number from 0 to 65536, like /topk 7"
            for value in ("x", "-1", "99999999999999999999", "5.5")
        ),
        *(
            f"error: /temperature {value}: expected a number from 0 to 2, like /temperature 0.0"
            for value in ("nan", "9", "0,5", "1 2", "inf")
        ),
        "error: /clear all: it takes no value; write /clear",
    ]
    assert (chat.cfg.temperature, chat.cfg.top_k) == (0, 7) and "/save FILE" in printed.out
    # In a file of questions, lines that only look like commands are questions.
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["q", "/usr/bin is a folder", "clear as mud"]
    with open(tmp_path / "chat.jsonl", encoding="utf-8") as file:
        first, second = map(json.loads, file)
    assert [message["role"] for message in first] == ["system", "user", "assistant"]
    assert [message["role"] for message in second] == ["user", "assistant"]


def test_the_system_prompt_is_heard(chat, engine, monkeypatch, tokenizer):
    requests = []
    real = engine.stream
    monkeypatch.setattr(engine, "stream", lambda request: requests.append(request) or real(request))
    chat.system = "Be brief."
    chat_cli.say(chat, "q")
    assert requests[0].ids == tokenizer.render_for_completion({"messages": chat.conversation()[:2]})
    assert tokenizer.decode(requests[0].ids).startswith("<|bos|><|user_start|>Be brief.\n\nq")


def test_what_is_saved_can_be_trained_on(chat, tmp_path):
    chat.cfg = ChatCli(temperature=0.0, max_new_tokens=2)  # an answer without a tool call
    chat_cli.say(chat, "q")
    chat_cli.save(chat, str(tmp_path / "chat.jsonl"))
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert CustomJSON(tmp_path / "chat.jsonl").example(0) == {"messages": messages}


@pytest.mark.parametrize("end", ["quit", EOFError, KeyboardInterrupt])
def test_ways_out(chat, monkeypatch, end):
    type_in(monkeypatch, end, "never read")
    chat_cli.converse(chat)
    assert not chat.messages


def test_ctrl_c_stops_the_answer_and_not_the_program(chat, engine, monkeypatch, capsys, tokenizer):
    real, steps = engine.step, []

    def step():
        steps.append(None)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return real()

    monkeypatch.setattr(engine, "step", step)
    handler = signal.getsignal(signal.SIGINT)
    type_in(monkeypatch, "q", "q")
    chat_cli.converse(chat)
    assert capsys.readouterr().out == f"a\n{ANSWER}"
    assert chat.messages[1] == assistant(("text", "a")) and len(chat.messages) == 4
    assert not engine.busy and signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_ends_the_program(chat, engine, monkeypatch):
    def step():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(engine, "step", step)
    type_in(monkeypatch, "q")
    with pytest.raises(KeyboardInterrupt):
        chat_cli.converse(chat)


def test_a_full_context_drops_the_oldest_turns_and_says_so(chat, capsys, tokenizer):
    for _ in range(8):
        chat_cli.say(chat, "q")
    printed = capsys.readouterr()
    assert "[the context is full: the oldest turn was dropped]\n" in printed.err and printed.out == ANSWER * 8
    assert len(tokenizer.render_conversation({"messages": chat.messages})[0]) <= 128


def test_a_message_too_long_is_refused_in_a_line(chat, monkeypatch, capsys):
    chat_cli.say(chat, "q")
    capsys.readouterr()
    type_in(monkeypatch, "z" * 200)
    chat_cli.converse(chat)
    out = capsys.readouterr().err
    assert out.startswith("error: the message is too long: it takes 204 tokens") and out.count("\n") == 1
    assert len(chat.messages) == 2


def show(tokenizer, ids, color=False):
    reader, display = PartReader(tokenizer), chat_cli.Display(color)
    for part in [part for i in ids for part in reader.read([i])] + reader.read((), end=True):
        display.show(*part)
    display.finish()


@pytest.mark.parametrize(("line", "shown"), [
    (["é", "😀"], "é😀\n"),
    (["<|python_start|>", "1+", "<|python_end|>", "so"], "[1+]so\n"),
    (["<|python_start|>", "1+1"], "[1+1]\n"),
    (["<|output_start|>", "5", "<|output_end|>"], "[5]\n"),
    (["<|bos|>", "a", "<|user_start|>", "<|python_end|>", "<|output_end|>"], "a\n"),
    (["\x1b[2J", "a\tb\nc\r"], "[2Ja\tb\nc\n"),
])  # fmt: skip
def test_display(tokenizer, capsys, line, shown):
    show(tokenizer, line_ids(tokenizer, line))
    assert capsys.readouterr().out == shown


def test_calls_are_dimmed_in_color(tokenizer, capsys):
    show(tokenizer, line_ids(tokenizer, ["a", *CALL[4:], "<|output_start|>", "444", "<|output_end|>"]), color=True)
    assert capsys.readouterr().out == "a\033[2m[37*12 = 444]\033[0m\n"


@pytest.mark.parametrize(
    ("flag", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("temperature", 9.0), ("top_k", -1), ("seed", -1), ("seed", 2**31)],
)
def test_wrong_settings_name_the_flag(flag, value):
    with pytest.raises(UserError, match=f"--{flag}={value}"):
        chat_cli.main(ChatCli(**{flag: value}))


# -----------------------------------------------------------------------------
# The program in its own process


def run_program(*args, base_dir, env=None, **kwargs):
    """Runs the program with `args`, which may be bytes. Its output is text, or bytes if `input` is bytes."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "NANOCHAT_BASE_DIR": str(base_dir),
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-m", "scripts.chat_cli", *args]
    if not isinstance(kwargs.get("input"), bytes):
        kwargs |= {"text": True, "encoding": "utf-8"}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment | (env or {}), capture_output=True, timeout=300, **kwargs
    )


def test_help_is_immediate(tmp_path):
    start = time.monotonic()
    done = run_program("--help", base_dir=tmp_path)
    assert done.returncode == 0 and "--prompt" in done.stdout and not done.stderr
    assert time.monotonic() - start < 3  # JAX alone takes longer on a busy machine


class Terminal:
    """The program in a pseudo-terminal, as a user at a keyboard sees it."""

    def __init__(self, *args, base_dir):
        self.primary, secondary = pty.openpty()
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "NANOCHAT_BASE_DIR": str(base_dir), "PYTHONPATH": str(REPOSITORY), "TERM": "xterm",
            "LC_ALL": "C.UTF-8",
        }  # fmt: skip
        # Makes it the program's controlling terminal, so that Ctrl-C reaches the program.
        begin = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", begin, sys.executable, "-m", "scripts.chat_cli", *args], cwd=REPOSITORY,
            env=environment, start_new_session=True, stdin=secondary, stdout=secondary, stderr=secondary,
        )  # fmt: skip
        os.close(secondary)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.primary, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Waits for `text`; returns the output up to and including it."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.primary], [], [], 0.1)
            assert time.monotonic() < deadline, f"never shown: {text!r}\n{self.seen}"
            if ready:
                self.seen += os.read(self.primary, 4096).decode("utf-8", "replace")
        before, self.seen = self.seen.split(text, 1)
        return before + text

    def end(self) -> int:
        """Waits for the program to end; returns its exit code."""
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            os.close(self.primary)


def test_a_conversation_at_a_terminal(own_base_dir, params, model_cfg, tokenizer):
    save_model(own_base_dir, params, model_cfg, tokenizer, mixture={"sums": 20, "identity": 0})
    terminal = Terminal("-t", "0", "--max_new_tokens=40", base_dir=own_base_dir)
    try:
        suggestions = ("What is 28 times 13?", "Who are you?", "What is 120 + 72?")
        assert "".join(f"Try: {question}\r\n" for question in suggestions) in terminal.wait_for("User: ")
        terminal.type("q\n")
        assert "a\x1b[2m[37*12 = 444]\x1b[0mé!" in terminal.wait_for("tokens/s]")
        terminal.wait_for("User: ")
        # Line editing: Backspace deletes a letter, Tab completes a command, the up arrow brings back an earlier line.
        terminal.type("qx\x7f\n")
        terminal.wait_for("é!")
        terminal.wait_for("User: ")
        terminal.type("/tem\t 0.5\n")
        terminal.wait_for("temperature is 0.5")
        terminal.type("/temperature 0\n/nonsense\n")
        terminal.wait_for("there is no command /nonsense; /help lists the commands")
        terminal.type("/quit now\n")
        terminal.wait_for("error: /quit now: it takes no value; write /quit")
        terminal.wait_for("User: ")
        terminal.type("\x1b[A\x1b[A\x1b[A\x1b[A\x1b[A\n")  # five up: q
        terminal.wait_for("é!")
        terminal.wait_for("User: ")
        # Ctrl-C discards the typed text and keeps the program running; a second one ends it.
        terminal.type("half a tho")
        terminal.wait_for("half a tho")
        time.sleep(0.5)  # CPython's input() misses a signal between echoing a letter and waiting for the next
        terminal.type("\x03")
        terminal.wait_for("press Ctrl-C again to quit")
        terminal.wait_for("User: ")
        terminal.type("q\n")
        terminal.wait_for("é!")
        terminal.wait_for("User: ")
        # Pasted text is one message, however many lines it has.
        terminal.type("\x1b[200~q\nq\x1b[201~")
        terminal.wait_for("q")
        terminal.type("\n")
        terminal.wait_for("tokens/s]")
        terminal.wait_for("User: ")
        terminal.type("\x04")
        assert terminal.end() == 0
    finally:
        terminal.process.kill()
    kept = own_base_dir / "chat_history"
    assert kept.stat().st_mode & 0o777 == 0o600 and "half" not in kept.read_text()
    typed = ["q", "/temperature 0.5", "/temperature 0", "/nonsense", "/quit now", "q"]
    assert kept.read_text().splitlines()[-8:-2] == typed


def test_ctrl_c_again_while_the_program_ends():
    """Python's own shutdown takes a moment. More Ctrl-Cs end it, and leave no traceback and no crash in JAX."""
    program = """
import atexit, signal, sys, time
from nanochat_jax import commandline, config
def main(cfg):
    atexit.register(lambda: (print("ending", flush=True), time.sleep(60)))
    signal.raise_signal(signal.SIGINT)
sys.argv = ["chat"]
commandline.run(main, config.ChatCli)
"""
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ending\n"
    for _ in range(100):
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (128 + signal.SIGINT, "stopped\n")


def test_program_answers_a_saved_model(own_base_dir, params, model_cfg, tokenizer):
    """-p prints only the answer to stdout; piped input gets an answer per line; a missing model is a one-line error."""
    missing = run_program("-p", "q", base_dir=own_base_dir)
    assert missing.returncode == 2 and missing.stderr.startswith("error: no sft checkpoint under")
    assert missing.stderr.count("\n") == 1 and not missing.stdout
    save_model(own_base_dir, params, model_cfg, tokenizer)
    once = run_program("-p", "q", "-t", "0", base_dir=own_base_dir)
    assert (once.returncode, once.stdout) == (0, ANSWER), once.stderr
    assert "sft_checkpoints/tiny, step 7" in once.stderr
    piped = run_program("-t", "0", base_dir=own_base_dir, input="q\n/topk 3\n" + "z" * 200 + "\nq\n")
    assert (piped.returncode, piped.stdout) == (0, ANSWER * 2), piped.stderr
    assert "top_k is 3\nerror: the message is too long" in piped.stderr and "Try: " not in piped.stdout
    save_model(own_base_dir, params, model_cfg, tokenizer, stage="base")
    base = run_program("-i", "base", "-p", "q", "-t", "0", base_dir=own_base_dir)
    assert base.stdout == ANSWER and "[this model has not learned to chat: it only continues text]" in base.stderr


def test_input_that_is_not_clean_utf8(own_base_dir, params, model_cfg, tokenizer):
    """Marks, foreign bytes and odd line ends neither end the program nor reach the model in silence."""
    save_model(own_base_dir, params, model_cfg, tokenizer)
    lines = b"\xef\xbb\xbfq\r\nq\n\xef\xbb\xbf/topk 7\nGr\xfc\xdfe q\nq\x00q\n\xed\xa0\xbdq\n" + b"z" * 100_000 + b"\nq"
    saved = own_base_dir / "chat.jsonl"
    lines += f"\n/save {saved}".encode()
    piped = run_program("-t", "0", base_dir=own_base_dir, input=lines)
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout.decode() == ANSWER * 6
    errors = [
        line for line in piped.stderr.decode().splitlines() if line.startswith(("[", "error")) and "full" not in line
    ]
    assert errors == [
        "[the input: 2 bytes are not valid UTF-8 and read as \ufffd; convert old text with iconv]",
        "[the input: 3 bytes are not valid UTF-8 and read as \ufffd; convert old text with iconv]",
        errors[-1],
    ]
    assert errors[-1].startswith("error: the message is too long") and b"top_k is 7" in piped.stderr
    asked = [m["content"] for m in json.loads(saved.read_text(encoding="utf-8")) if m["role"] == "user"]
    assert (
        asked == ["q", "q", "Gr\ufffd\ufffde q", "q\x00q", "\ufffd\ufffd\ufffdq", "q"][-len(asked) :] and len(asked) > 1
    )
    utf16 = run_program("-t", "0", base_dir=own_base_dir, input="q\r\nq\r\n".encode("utf-16"))
    assert (utf16.returncode, utf16.stdout.decode()) == (0, ANSWER * 2), utf16.stderr


def test_a_prompt_that_is_not_clean_utf8_and_output_in_another_encoding(own_base_dir, params, model_cfg, tokenizer):
    save_model(own_base_dir, params, model_cfg, tokenizer)
    bad = run_program("-t", "0", "-p", b"\xfcq", base_dir=own_base_dir)
    assert (bad.returncode, bad.stdout) == (0, ANSWER) and "[--prompt: 1 byte is not valid UTF-8" in bad.stderr
    for encoding, shown in (("latin-1", "é"), ("ascii", "?")):
        settings = {"LC_ALL": "C", "PYTHONIOENCODING": encoding}
        other = run_program("-t", "0", "-p", "-", base_dir=own_base_dir, env=settings, input=b"\xef\xbb\xbfq\n")
        assert (other.returncode, other.stdout.decode(encoding)) == (0, ANSWER.replace("é", shown)), other.stderr


def test_an_empty_prompt_is_refused_in_a_line(tmp_path):
    for prompt, stdin in (("", ""), (" \n\t", ""), ("-", ""), ("-", " \n"), ("-", "\ufeff")):
        done = run_program("-p", prompt, base_dir=tmp_path / "base", input=stdin)
        assert (done.returncode, done.stdout) == (2, ""), prompt
        assert done.stderr.startswith("error: --prompt=") and "is empty; ask something, like -p" in done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "base").exists()
    closed = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m scripts.chat_cli <&-"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (closed.returncode, closed.stderr) == (2, "error: stdin is closed: ask with -p, like -p 'Who are you?'\n")
