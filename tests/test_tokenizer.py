"""Special tokens, text, conversations and streaming; equal to results recorded from other implementations."""

import argparse
import doctest
import email.message
import gzip
import inspect
import json
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe
from nanochat_jax import tokenizer as tokenizer_module
from nanochat_jax.config import UserError
from nanochat_jax.tokenizer import LONG_TEXT, SPECIAL_TOKENS, SPLIT_PATTERN, StreamDecoder, Tokenizer

TEXT = "Hello, world! It's a test of 1234 tokens; the tests test the tokenizer.\n naïve café 你好 😀\n"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT] * 3, 256 + 50 + len(SPECIAL_TOKENS))


@pytest.fixture(scope="module")
def every_pair():
    """Nearly every pair of bytes is a token, so that ids show where text was split. With special tokens, there are
    more than 65,536 tokens."""
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)][: (1 << 16) - 256 - 3]
    ranks = [(bytes([b]), b) for b in range(256)] + [(pair, 256 + i) for i, pair in enumerate(pairs)]
    return Tokenizer(rustbpe.Tokenizer.from_mergeable_ranks(SPLIT_PATTERN, ranks))


@pytest.fixture
def recorded(golden_dir):
    golden = json.loads((golden_dir / "bpe.json").read_text(encoding="utf-8"))
    ranks = [(bytes.fromhex(token), rank) for token, rank in golden["ranks"]]
    return Tokenizer(rustbpe.Tokenizer.from_mergeable_ranks(golden["pattern"], ranks))


def user(text):
    return {"role": "user", "content": text}


def assistant(content):
    return {"role": "assistant", "content": content}


def chat(*messages):
    return {"messages": list(messages)}


def test_the_examples_in_the_docstrings_hold():
    results = doctest.testmod(tokenizer_module)
    assert results.attempted >= 4 and not results.failed


# -----------------------------------------------------------------------------
# Recorded by other implementations


@pytest.mark.golden
def test_training_gives_the_recorded_vocabulary(golden_dir, data_dir):
    golden = json.loads((golden_dir / "bpe.json").read_text(encoding="utf-8"))
    with gzip.open(data_dir / "pretrain" / "tinyshakespeare.jsonl.gz", "rt", encoding="utf-8") as file:
        ours = Tokenizer.train((json.loads(line)["text"] for line in file), 1024 + 9)
    assert golden["pattern"] == SPLIT_PATTERN
    assert {name: ours.special(name) for name in SPECIAL_TOKENS} == golden["special_tokens"]
    assert all(ours.decode_bytes([rank]).hex() == token for token, rank in golden["ranks"])


@pytest.mark.golden
def test_recorded_encodings(recorded, golden_dir):
    cases = json.loads((golden_dir / "encode.json").read_text(encoding="utf-8"))
    assert [recorded.encode(case["text"]) for case in cases] == [case["ids"] for case in cases]
    assert recorded.encode([case["text"] for case in cases]) == [case["ids"] for case in cases]
    assert [recorded._core.encode(case["text"]) for case in cases] == [case["ids"] for case in cases]


@pytest.mark.golden
def test_recorded_chats(recorded, golden_dir):
    for case in json.loads((golden_dir / "chat.json").read_text(encoding="utf-8")):
        assert recorded.render_conversation(case["conversation"]) == (case["ids"], case["mask"])
        assert recorded.render_conversation(case["conversation"], 32) == (case["ids_32"], case["mask_32"])
        assert recorded.render_for_completion(case["conversation"]) == case["completion_ids"]


# -----------------------------------------------------------------------------
# Text


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=120))
def test_round_trip_and_both_encoders_agree(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode("utf-8")
    assert tokenizer._core.encode(text) == ids


def unbatched(batch):
    tokens, offsets = batch
    assert offsets.dtype == np.int64 and offsets[0] == 0 and offsets[-1] == len(tokens)
    return [ids.tolist() for ids in np.split(tokens, offsets[1:-1])][: len(offsets) - 1]


ADVERSARIAL = {
    "nothing": "",
    "one byte": "a",
    "spaces": " " * 1_000_000,
    "spaces before a word": " " * 300_000 + "word",
    "one letter": "a" * 1_000_000,
    "one wide letter": "字" * 300_000,
    "newlines": "\r\n" * 300_000,
    "digits": "1234567890" * 30_000,
    "punctuation": "!?" * 300_000,
    "apostrophes": "'s'S're'LL'x" * 20_000,
    "lone surrogates": "a\ud83d b\ude00 \udfff\ud800",
    "halves of a character": "\ud83d\ude00 \ud83d",
    "many lone surrogates": "\ud83d" * 100_000,
    "combining": "e\u0301" * 1000 + "\u200d\ufe0f" * 1000,
    "no characters": "\x00\ufffe\uffff\U0010ffff\ufeff",
    "special tokens": "".join(SPECIAL_TOKENS) * 3,
}


def test_the_data_pipelines_encoder_equals_tiktoken():
    """On real text and on text that breaks encoders. On a million spaces tiktoken panics, so ours is only checked for
    consistency."""
    real = [inspect.getsource(module) for module in (argparse, email.message, json.decoder, inspect)]
    ours = Tokenizer.train(real, 2000)
    texts = [*real, *ADVERSARIAL.values(), "".join(real)]
    batch = unbatched(ours.encode_batch(texts))
    assert len(batch) == len(texts)
    for text, ids in zip(texts, batch, strict=True):
        if text != ADVERSARIAL["spaces"]:
            assert ids == ours._encoding.encode_ordinary(text)
        assert ids == ours.encode(text)  # encode() hands long texts to the same encoder
    assert ours.decode(batch[texts.index(ADVERSARIAL["spaces"])]) == ADVERSARIAL["spaces"]
    lines = "".join(real).splitlines(keepends=True)
    assert unbatched(ours.encode_batch(lines)) == ours.encode(lines)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(), max_size=40), max_size=5))
def test_both_encoders_agree_on_batches(every_pair, texts):
    assert unbatched(every_pair.encode_batch(texts)) == every_pair.encode(texts)
    assert unbatched(every_pair.encode_batch(texts, prepend="<|bos|>")) == every_pair.encode(texts, prepend="<|bos|>")


def test_both_encoders_agree_on_every_character(every_pair):
    """Even on characters that are letters in one encoder's version of Unicode and not in the other's."""
    characters = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(characters), 4096):
        text = "".join(f"a{c} {c}1{c}\n{c}'{c}" for c in characters[start : start + 4096])
        assert every_pair._core.encode(text) == every_pair._encoding.encode_ordinary(text)


def test_batches_are_small_numbers_with_an_offset_a_text(tokenizer):
    tokens, offsets = tokenizer.encode_batch(["hi", "", "h"], prepend="<|bos|>")
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [tokenizer.bos, 104, 105, tokenizer.bos, tokenizer.bos, 104]
    assert offsets.tolist() == [0, 3, 4, 6]
    tokens, offsets = tokenizer.encode_batch([], prepend=0)
    assert (tokens.tolist(), offsets.tolist()) == ([], [0])
    with pytest.raises(ValueError, match="special token"):
        tokenizer.encode_batch(["hi"], prepend="bos")
    with pytest.raises(TypeError):
        tokenizer.encode_batch([b"hi"])
    # Texts with lone surrogates are read twice, which an iterator does not allow.
    with pytest.raises(TypeError, match="takes a list of str, got generator"):
        tokenizer.encode_batch(text for text in ["hi", "\ud83d"])


def test_a_vocabulary_that_passes_16_bits_with_its_special_tokens(every_pair):
    assert every_pair.vocab_size == (1 << 16) + 6
    tokens, _ = every_pair.encode_batch(["ab"], prepend="<|output_end|>")
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [every_pair.vocab_size - 1, *every_pair.encode("ab")]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "bos", " a", "<"]), max_size=8).map("".join))
def test_text_never_becomes_special_tokens(tokenizer, text):
    assert max(tokenizer.encode(text), default=0) < tokenizer.bos
    assert max(tokenizer.encode([text])[0], default=0) < tokenizer.bos
    assert tokenizer.encode_batch([text])[0].max(initial=0) < tokenizer.bos
    ids, _ = tokenizer.render_conversation(chat(user(text), assistant([{"type": "python", "text": text}])))
    specials = [i for i in ids if i >= tokenizer.bos]
    names = ("bos", "user_start", "user_end", "assistant_start", "python_start", "python_end", "assistant_end")
    assert specials == [tokenizer.special(f"<|{name}|>") for name in names]


def test_special_tokens_follow_the_merges(tokenizer):
    ids = [tokenizer.special(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(tokenizer.vocab_size - 9, tokenizer.vocab_size))
    assert tokenizer.bos == ids[0]
    assert tokenizer.decode(ids) == "".join(SPECIAL_TOKENS)
    with pytest.raises(ValueError, match="expected one of"):
        tokenizer.special("<|eos|>")


def test_prepend_and_append(tokenizer):
    plain = tokenizer.encode("test")
    assert tokenizer.encode("test", prepend="<|bos|>", append=7) == [tokenizer.bos, *plain, 7]
    assert tokenizer.encode(["test", ""], prepend=0) == [[0, *plain], [0]]
    assert tokenizer("test", prepend=0) == [0, *plain]
    with pytest.raises(ValueError, match="special token"):
        tokenizer.encode("test", prepend="bos")
    with pytest.raises(TypeError, match="str or a list"):
        tokenizer.encode(b"test")
    with pytest.raises(ValueError, match="num_threads is 0, expected 1 or more"):
        tokenizer.encode(["test"], num_threads=0)
    for encode in (tokenizer.encode, tokenizer.encode_batch):
        with pytest.raises(TypeError, match="item 1 of the batch is int, expected str"):
            encode(["test", 3])


def test_ids_may_be_any_kind_of_whole_number(tokenizer):
    plain = tokenizer.encode("test")
    assert tokenizer.encode("test", prepend=np.int64(tokenizer.bos), append=np.uint16(7)) == [tokenizer.bos, *plain, 7]
    assert tokenizer.encode_batch(["test"], prepend=np.int32(7))[0].tolist() == [7, *plain]
    every_other = np.repeat(np.array(plain, np.int32), 2)[::2]
    assert tokenizer.decode(every_other) == "test" == tokenizer.decode(iter(plain))
    for wrong in ([97.6], "12", ["7"], np.array([97.0]), np.array([[97]]), None):
        with pytest.raises(TypeError):
            tokenizer.decode(wrong)
    for i in (tokenizer.vocab_size, -1, 2**70):
        for use in (tokenizer.encode, lambda text, i: tokenizer.encode_batch([text], i)):
            with pytest.raises(ValueError, match=f"token id {i} is outside the vocabulary"):
                use("test", i)


@pytest.mark.parametrize("unit", [" ", "a", "\n", "é", "\u3000"])
def test_texts_that_tiktoken_cannot_take(tokenizer, unit):
    text = unit * 1_000_000
    short, long = tokenizer.encode(["test", text])
    assert tokenizer.decode(long) == text
    assert short == tokenizer.encode("test")


def test_long_and_short_texts_are_encoded_alike(tokenizer):
    text = (TEXT * (2 * LONG_TEXT // len(TEXT)))[: LONG_TEXT + 1]
    assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text)
    assert tokenizer.encode("\ud83d!" + text)[:4] == tokenizer.encode("\ud83d!")  # a lone surrogate is U+FFFD


def test_token_bytes_are_raw_bytes(tokenizer):
    counts = tokenizer.token_bytes()
    assert counts.dtype == np.int32
    assert counts.shape == (tokenizer.vocab_size,)
    assert counts[:256].tolist() == [1] * 256  # also those that are not UTF-8 by themselves
    assert counts[tokenizer.bos :].tolist() == [0] * 9
    assert counts[tokenizer.encode(TEXT)].sum() == len(TEXT.encode("utf-8"))


def test_ids_outside_the_vocabulary_are_named(tokenizer):
    for i in (tokenizer.vocab_size, -1):
        with pytest.raises(ValueError, match=f"token id {i} is outside"):
            tokenizer.decode([97, i])
    assert tokenizer.decode(np.array([104, 105])) == "hi"


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_streaming_gives_the_text_and_whole_characters_only(tokenizer, text):
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(i) for i in text.encode("utf-8")]  # the first 256 ids are the bytes
    assert "".join(pieces) + stream.flush() == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_streaming_of_any_ids_equals_decoding_them_at_once(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = StreamDecoder(tokenizer)
    assert "".join(stream.push(i) for i in ids) + stream.flush() == tokenizer.decode(ids)


def test_streaming_flushes_what_never_became_a_character(tokenizer):
    stream = StreamDecoder(tokenizer)
    assert [stream.push(0xF0), stream.push(0x9F), stream.flush(), stream.flush()] == ["", "", "\ufffd", ""]
    assert stream.push(0xC3) + stream.push(0xA9) == "é"
    assert stream.push(0xC3) + stream.push(tokenizer.bos) == "\ufffd<|bos|>"


def test_training_refuses_what_cannot_be_a_vocabulary():
    with pytest.raises(UserError, match="vocab_size=264: must be at least 265"):
        Tokenizer.train(["text"], 264)
    with pytest.raises(UserError, match="empty"):
        Tokenizer.train([], 300)
    with pytest.raises(UserError, match=f"cannot train a tokenizer: vocab_size is {10**30 - 9}, expected 256"):
        Tokenizer.train(["text"], 10**30)
    assert Tokenizer.train(["ab"], 1000).vocab_size == 256 + 1 + 9


def test_an_unbuilt_crate_is_one_line(monkeypatch):
    # Without the wheel, `import rustbpe` in the repository root finds the folder, as an empty package.
    monkeypatch.setitem(sys.modules, "rustbpe", types.ModuleType("rustbpe"))
    with pytest.raises(UserError, match=r"not built: run pip install \./rustbpe"):
        Tokenizer.train(["text"], 300)


# -----------------------------------------------------------------------------
# Conversations


def test_only_what_the_assistant_must_say_is_supervised(tokenizer):
    parts = [
        {"type": "text", "text": "Well: "},
        {"type": "python", "text": "2+2"},
        {"type": "python_output", "text": "4"},
        {"type": "text", "text": " is it"},
    ]
    ids, mask = tokenizer.render_conversation(chat(user("2+2?"), assistant(parts)))
    supervised = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert supervised == "Well: <|python_start|>2+2<|python_end|> is it<|assistant_end|>"
    assert tokenizer.decode(ids) == (
        "<|bos|><|user_start|>2+2?<|user_end|><|assistant_start|>Well: <|python_start|>2+2<|python_end|>"
        "<|output_start|>4<|output_end|> is it<|assistant_end|>"
    )


def test_parts_are_encoded_by_themselves(tokenizer):
    halves = assistant([{"type": "text", "text": "the te"}, {"type": "text", "text": "st"}])
    ids, _ = tokenizer.render_conversation(chat(user(""), halves))
    assert ids[4:-1] == tokenizer.encode("the te") + tokenizer.encode("st") != tokenizer.encode("the test")


def test_system_message_is_merged_into_the_first_user_message(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    merged = chat(user("Be brief.\n\nHi"), assistant("Hello"), user("Bye"), assistant("."))
    conversation = chat(system, user("Hi"), assistant("Hello"), user("Bye"), assistant("."))
    assert tokenizer.render_conversation(conversation) == tokenizer.render_conversation(merged)
    assert tokenizer.render_for_completion(conversation) == tokenizer.render_for_completion(merged)
    assert conversation["messages"][1] == user("Hi")  # unchanged


def test_rendering_is_truncated_on_the_right(tokenizer):
    conversation = chat(user("a long question " * 20), assistant("an answer"))
    ids, mask = tokenizer.render_conversation(conversation)
    assert tokenizer.render_conversation(conversation, 10) == (ids[:10], mask[:10])
    for max_tokens in (0, -1):
        with pytest.raises(ValueError, match=f"max_tokens is {max_tokens}, expected 1 or more"):
            tokenizer.render_conversation(conversation, max_tokens)


def test_completion_prompt_with_and_without_a_final_answer(tokenizer):
    prompt = tokenizer.render_for_completion(chat(user("Hi"), assistant("Hello")))
    assert prompt == tokenizer.render_for_completion(chat(user("Hi")))
    assert tokenizer.decode(prompt) == "<|bos|><|user_start|>Hi<|user_end|><|assistant_start|>"


def test_completion_prompt_that_is_too_long_loses_its_oldest_turns(tokenizer):
    turns = [m for i in range(30) for m in (user(f"question {i}"), assistant(f"answer {i}"))]
    conversation = chat({"role": "system", "content": "Be kind."}, *turns, user("the last question"))
    whole = tokenizer.render_for_completion(conversation, 100_000)
    assert tokenizer.render_for_completion(conversation, len(whole)) == whole
    text = tokenizer.decode(tokenizer.render_for_completion(conversation, len(whole) - 1))
    assert text.startswith("<|bos|><|user_start|>Be kind.\n\nquestion 1<|user_end|>")
    for max_tokens in range(60, len(whole), 37):
        ids = tokenizer.render_for_completion(conversation, max_tokens)
        text = tokenizer.decode(ids)
        assert len(ids) <= max_tokens
        assert text.startswith("<|bos|><|user_start|>Be kind.\n\n")
        last_only = text.count("<|user_start|>") == 1
        assert last_only or text.endswith("<|user_start|>the last question<|user_end|><|assistant_start|>")


def test_a_last_message_too_long_by_itself_keeps_its_end(tokenizer):
    conversation = chat(user("hi"), assistant("ho"), user("filler " * 50 + "what is it?"))
    ids = tokenizer.render_for_completion(conversation, 20)
    text = tokenizer.decode(ids)
    assert len(ids) == 20
    assert text.startswith("<|bos|><|user_start|>")
    assert text.endswith("what is it?<|user_end|><|assistant_start|>")
    with pytest.raises(ValueError, match="at least 4"):
        tokenizer.render_for_completion(conversation, 3)


@pytest.mark.parametrize(
    ("conversation", "complaint"),
    [
        ({}, "messages"),
        ([user("a")], "messages"),
        (chat(), "at least one message"),
        (chat("hi"), r"messages\[0\]: expected"),
        (chat({"role": "system", "content": "s"}), r"messages\[0\]: nothing follows.*role user"),
        (chat({"role": "system", "content": "s"}, assistant("a")), r"messages\[1\]: role is 'assistant'"),
        (chat({"role": "system", "content": ["s"]}, user("a")), r"messages\[0\]: content of a system"),
        (chat(assistant("a")), r"messages\[0\]: role is 'assistant', expected 'user'; roles are"),
        (chat(user("a"), user("b")), r"messages\[1\]: role is 'user', expected 'assistant'"),
        (chat(user("a"), {"role": "tool", "content": "b"}), r"messages\[1\]: role is 'tool'.*user and assistant"),
        (chat(user("a"), assistant("b"), {"role": "system", "content": "s"}), r"messages\[2\]: role is 'system'"),
        (chat(user(["a"])), r"messages\[0\]: content of role user must be a str, got list"),
        (chat(user("a"), assistant(None)), r"messages\[1\]: .*a list of parts, got NoneType"),
        (chat(user("a"), assistant([{"type": "image", "text": ""}])), r"messages\[1\].content\[0\]: expected"),
        (chat(user("a"), assistant([{"type": "text"}])), r"messages\[1\].content\[0\]: expected"),
        (chat(user("a"), assistant([{"type": [], "text": ""}])), r"messages\[1\].content\[0\]: expected"),
    ],
)
def test_wrong_conversations_name_the_message(tokenizer, conversation, complaint):
    for render in (tokenizer.render_conversation, tokenizer.render_for_completion):
        with pytest.raises(UserError, match=complaint):
            render(conversation)


def test_visualization_shows_every_token_in_its_color(tokenizer):
    ids, mask = tokenizer.render_conversation(chat(user("Hi"), assistant("Ho")))
    shown = tokenizer.visualize_tokenization(ids, mask)
    assert shown.count("\033[92m") == sum(mask)
    assert shown.count("\033[91m") == len(mask) - sum(mask)
    assert f"({tokenizer.bos})" in tokenizer.visualize_tokenization(ids, mask, with_ids=True)
