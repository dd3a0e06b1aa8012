"""Conversations become prompts that fit the context; answers become parts that can be shown and sent back."""

import subprocess
import sys

import pytest
from serving import TEXT, answer_ids

from nanochat_jax.config import REPOSITORY, UserError
from nanochat_jax.conversation import PartReader, message, prompt
from nanochat_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter(TEXT), 300)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


TURNS = [m for i in range(10) for m in (user(f"question {i}"), assistant("yes"))]


@pytest.mark.parametrize(("max_tokens", "reserved"), [(20, 20), (32, 32), (500, 32)])
@pytest.mark.parametrize("head", [[], [{"role": "system", "content": "Be brief."}]])
def test_as_few_of_the_oldest_turns_go_as_leave_room_for_an_answer(tokenizer, head, max_tokens, reserved):
    messages = [*head, *TURNS, user("and now?")]
    ids, dropped = prompt(tokenizer, messages, 128, max_tokens)
    turns = messages[len(head) :]
    assert 0 < dropped < 20 and dropped % 2 == 0
    assert ids == tokenizer.render_for_completion({"messages": [*head, *turns[dropped:]]})
    more = tokenizer.render_for_completion({"messages": [*head, *turns[dropped - 2 :]]})
    assert len(ids) <= 128 - reserved < len(more)


def test_what_fits_is_kept_whole(tokenizer):
    whole = tokenizer.render_for_completion({"messages": [*TURNS, user("and now?")]})
    assert prompt(tokenizer, [*TURNS, user("and now?")], 4096, 512) == (whole, 0)


def test_prompt_of_one_message_is_refused_when_too_long(tokenizer):
    with pytest.raises(UserError, match="too long"):
        prompt(tokenizer, [user("first"), assistant("yes"), user("word " * 400)], 100, 20)


def test_part_reader_gives_the_same_whatever_the_chunks(tokenizer):
    ids = answer_ids(tokenizer, "é🌍 ", ("python", "'ü'.count('ü')"), ("python_output", "1"), " ünd")
    whole = PartReader(tokenizer).read(ids, end=True)
    assert whole == [("text", "é🌍 "), ("python", "'ü'.count('ü')"), ("python_output", "1"), ("text", " ünd")]
    for size in (1, 2, 3, 7):
        reader, parts = PartReader(tokenizer), []
        for i in range(0, len(ids), size):
            parts += reader.read(ids[i : i + size], end=i + size >= len(ids))
        assert "".join(t for kind, t in parts if kind == "text") == "é🌍  ünd"
        assert [p for p in parts if p[0] != "text"] == whole[1:3]


def test_part_reader_gives_up_unfinished_bytes_and_blocks_at_the_end(tokenizer):
    half = tokenizer.encode("\U0001f30d")[0]
    reader = PartReader(tokenizer)
    assert reader.read([half]) == []
    assert reader.read([], end=True) == [("text", "\ufffd")]
    block = [tokenizer.special("<|python_start|>"), *tokenizer.encode("1+1")]
    assert PartReader(tokenizer).read(block, end=True) == [("python", "1+1")]


def test_answer_goes_back_into_the_conversation_as_it_was(tokenizer):
    ids = answer_ids(tokenizer, "it is ", ("python", "37*12"), ("python_output", "444"), "444")
    asked = [user("37*12?"), message(tokenizer, ids), user("sure?")]
    rendered = tokenizer.render_for_completion({"messages": asked})
    assert "".join(f"{i}," for i in ids) in "".join(f"{i}," for i in rendered)
    # An answer that was truncated at any point is completed.
    for end in range(len(ids)):
        rendered = tokenizer.render_for_completion({"messages": [asked[0], message(tokenizer, ids[:end]), asked[2]]})
        assert rendered.count(tokenizer.special("<|assistant_end|>")) == 1
        for kind in ("python", "output"):
            start, stop = (tokenizer.special(f"<|{kind}_{which}|>") for which in ("start", "end"))
            assert rendered.count(start) == rendered.count(stop)


def test_neither_jax_nor_the_web_server_is_needed():
    """The terminal reads conversations too, and must not need the server's extra for that."""
    program = "import sys, nanochat_jax.conversation; print(*(m for m in ('jax', 'fastapi') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
