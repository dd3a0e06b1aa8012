"""The terminal chat: what it shows, what it remembers, and how it is stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from scripted_model import line_ids, scripted

from nanochat_jax import checkpoint, gpt
from nanochat_jax.config import ChatCli, GPTConfig, UserError
from nanochat_jax.conversation import PartReader
from nanochat_jax.engine.engine import Engine
from nanochat_jax.tokenizer import Tokenizer
from scripts import chat_cli

ROOT = Path(__file__).resolve().parents[1]
CALL = ["q", "<|user_end|>", "<|assistant_start|>", "a", "<|python_start|>", "37*12", "<|python_end|>"]
AFTER = ["<|output_end|>", "é", "!", "<|assistant_end|>"]
ANSWER = "a[37*12 = 444]é!\n"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["what is 37 * 12 = 444?"] * 3, 270)


@pytest.fixture(scope="module")
def cfg(tokenizer):
    return GPTConfig(1, 2, 2, 64, tokenizer.vocab_size, 128)


@pytest.fixture(scope="module")
def params(cfg, tokenizer):
    return scripted(gpt.init(cfg, seed=0), cfg, tokenizer, CALL, AFTER)


@pytest.fixture(scope="module")
def engine(params, cfg, tokenizer):
    return Engine(params, cfg, tokenizer, slots=1, chunk=4)


@pytest.fixture
def chat(engine):
    return chat_cli.Chat(engine, ChatCli(temperature=0.0, max_new_tokens=30))


def assistant(*parts) -> dict:
    return {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in parts]}


def type_in(monkeypatch, *lines):
    """Lines for input(), and then the end of the input; exceptions are raised."""
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
    said = [("text", "a"), ("python", "37*12"), ("python_output", "444"), ("text", "é!")]
    assert chat.messages == [{"role": "user", "content": "q"}, assistant(*said)]


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


def test_an_answer_cut_short_is_completed(chat, engine, tokenizer):
    chat.cfg = ChatCli(temperature=0.0, max_new_tokens=2)
    chat_cli.say(chat, "q")
    assert chat.messages[1] == assistant(("text", "a"))


def test_conversation(chat, monkeypatch, capsys):
    type_in(monkeypatch, "q", "", "  ", "clear", "q", "exit", "never read")
    chat_cli.converse(chat)
    assert capsys.readouterr().out == f"{ANSWER}Conversation cleared.\n{ANSWER}"
    assert len(chat.messages) == 2


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
    out = capsys.readouterr().out
    assert "[the context is full: the oldest turn was dropped]\n" in out and out.count(ANSWER) == 8
    assert len(tokenizer.render_conversation({"messages": chat.messages})[0]) <= 128


def test_a_message_too_long_is_refused_in_a_line(chat, monkeypatch, capsys):
    chat_cli.say(chat, "q")
    capsys.readouterr()
    type_in(monkeypatch, "z" * 200)
    chat_cli.converse(chat)
    out = capsys.readouterr().out
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


@pytest.mark.parametrize(("flag", "value"), [("max_new_tokens", 0), ("temperature", -1.0), ("top_k", -1)])
def test_wrong_settings_name_the_flag(flag, value):
    with pytest.raises(UserError, match=f"--{flag}={value}"):
        chat_cli.main(ChatCli(**{flag: value}))


# -----------------------------------------------------------------------------
# The program


def run_program(*args, base_dir, **kwargs):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "NANOCHAT_BASE_DIR": str(base_dir), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "scripts.chat_cli", *args]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300, **kwargs
    )


def test_help_is_immediate(tmp_path):
    start = time.monotonic()
    done = run_program("--help", base_dir=tmp_path)
    assert done.returncode == 0 and "--prompt" in done.stdout and not done.stderr
    assert time.monotonic() - start < 3  # JAX alone takes longer on a busy machine


def test_program_answers_a_saved_model(own_base_dir, params, cfg, tokenizer):
    """-p gives the answer alone on stdout; piped input gives one answer a line; without a model, one line says so."""
    missing = run_program("-p", "q", base_dir=own_base_dir)
    assert missing.returncode == 2 and missing.stderr.startswith("error: no sft checkpoint under")
    assert missing.stderr.count("\n") == 1 and not missing.stdout
    tokenizer.save(own_base_dir / "tokenizer")
    saver = checkpoint.Saver(checkpoint.run_dir("sft", "tiny"), keep_last=1)
    meta = checkpoint.model_meta(cfg) | {"tokenizer": tokenizer.hash}
    saver.save(3, params, {"count": jax.numpy.zeros(())}, {}, meta)
    saver.wait()
    once = run_program("-p", "q", "-t", "0", base_dir=own_base_dir)
    assert (once.returncode, once.stdout) == (0, ANSWER), once.stderr
    assert "sft_checkpoints/tiny, step 3" in once.stderr
    piped = run_program("-t", "0", base_dir=own_base_dir, input="q\nq\n")
    assert (piped.returncode, piped.stdout) == (0, ANSWER * 2), piped.stderr
