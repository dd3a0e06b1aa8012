"""The Rust crate refuses invalid input and can be interrupted: an error names the cause, and nothing is left broken."""

import itertools
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from trained_bpe import english as english_tokenizer
from trained_bpe import flat, trained

import rustbpe
from nanochat_jax.tokenizer import SPLIT_PATTERN


@pytest.fixture(scope="module")
def english():
    return english_tokenizer()


@pytest.mark.parametrize("vocab_size", [255, 0, -5, -(2**63), -(2**70), 2**32, 2**63, 2**70])
def test_vocab_size_below_the_bytes_or_past_all_ids(vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size is {vocab_size}.*256"):
        trained(["a"], vocab_size)


def test_items_that_are_not_text_are_named():
    with pytest.raises(TypeError, match=r"item 2 .* int, expected str"):
        trained(["a", "b", 3], 300)
    with pytest.raises(TypeError, match=r"item 10000 .* bytes"):
        trained((b"x" if i == 10000 else "x" for i in range(20000)), 300)
    with pytest.raises(UnicodeEncodeError, match=r"item 1 of the iterator is not valid Unicode: a lone surrogate"):
        trained(["a", "x\ud800"], 300)
    with pytest.raises(TypeError, match="put it in a list"):
        trained("a text", 300)
    with pytest.raises(TypeError):
        trained(3, 300)


def test_lone_surrogates_are_errors_that_name_the_text(english):
    # A str may contain them, UTF-8 may not. UnicodeEncodeError is a ValueError.
    for text in ["\ud800", "a\udfff b", "\udc00\ud800"]:
        with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
            english.encode(text)
        for encode in (english.batch_encode, english.encode_batch):
            with pytest.raises(UnicodeEncodeError, match="item 2 of the batch is not valid Unicode: a lone surrogate"):
                encode(["a", "b" * 300_000, text, "c"])


def test_batches_of_what_is_not_text(english):
    for encode in (english.batch_encode, english.encode_batch):
        with pytest.raises(TypeError, match=r"item 1 of the batch is bytes, expected str"):
            encode(["a", b"b"])
        with pytest.raises(TypeError, match="put it in a list"):
            encode("a text")
        with pytest.raises(TypeError):
            encode(3)
    for num_threads in (0, -1):
        with pytest.raises(ValueError, match=f"num_threads is {num_threads}, expected 1 or more"):
            english.encode_batch(["a"], num_threads=num_threads)
    assert flat(english, ["a"] * 3, num_threads=2**62) == flat(english, ["a"] * 3, num_threads=2**70) == [[97]] * 3
    with pytest.raises(TypeError):
        english.encode(b"bytes")


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt, SystemExit])
def test_errors_of_callers_come_through_and_leave_the_tokenizer_as_it_was(error):
    def fail(*_):
        raise error("on fire")

    def texts():
        yield "some text " * 100_000
        fail()

    tokenizer = trained(["abab"], 300)
    before = tokenizer.get_merges()
    for call in (
        lambda: tokenizer.train_from_iterator(texts(), 300),
        lambda: tokenizer.train_from_iterator(["some text"], 257, progress=fail),
        lambda: tokenizer.encode_batch(texts()),
        lambda: tokenizer.batch_encode(texts()),
    ):
        with pytest.raises(error, match="on fire"):
            call()
    assert tokenizer.get_merges() == before


def test_unusable_settings_are_value_errors():
    for texts, pattern in (([], None), (["", ""], None), (["some text"], r"\d")):
        with pytest.raises(ValueError, match="the corpus is empty"):
            trained(texts, 300, pattern=pattern)
    with pytest.raises(ValueError, match="does not compile"):
        trained(["a"], 300, pattern="(")
    with pytest.raises(ValueError, match="match the empty string"):
        trained(["a"], 300, pattern="x*")
    with pytest.raises(ValueError, match=r"text 1: the pattern matches the empty string at byte 2"):
        trained(["bbb", "b ab"], 300, pattern=r"b|(?=a)")
    overlapping = rustbpe.Tokenizer.from_mergeable_ranks(r"x(?<=\Kabx)|.", [(bytes([b]), b) for b in range(256)])
    for use in (overlapping.encode, overlapping.split, lambda text: overlapping.encode_batch([text])):
        with pytest.raises(ValueError, match="the pattern's matches overlap: one ends at byte 2"):
            use("abx" * 100)
    for buffer_size in (0, -(2**70)):
        with pytest.raises(ValueError, match="buffer_size"):
            trained(["a"], 300, buffer_size=buffer_size)
    for wrong in ({"vocab_size": 300.0}, {"vocab_size": "300"}, {"buffer_size": 1.5}, {"pattern": b"a"}):
        with pytest.raises(TypeError):
            trained(["a"], **{"vocab_size": 300} | wrong)
    assert trained(["ab"], np.int64(257), buffer_size=2**70).vocab_size == 257


def test_a_pattern_that_fails_ends_endless_text():
    texts = itertools.repeat("some text")
    with pytest.raises(ValueError, match=r"text \d+: the pattern matches the empty string at byte"):
        trained(texts, 300, pattern=r"a|\b")
    tokenizer = rustbpe.Tokenizer.from_mergeable_ranks(r"a|\b", [(bytes([b]), b) for b in range(256)])
    for encode in (tokenizer.batch_encode, tokenizer.encode_batch):
        with pytest.raises(ValueError, match=r"text \d+: the pattern matches the empty string at byte"):
            encode(texts)


def test_ids_outside_the_vocabulary(english):
    for decode in (english.decode, english.decode_bytes):
        with pytest.raises(ValueError, match="token id 100000 is outside the vocabulary"):
            decode([97, 100000])
        for bad in (-1, 2**32, 2**70):
            with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary"):
                decode([97, bad])
        with pytest.raises(TypeError):
            decode([1.5])
        with pytest.raises(TypeError):
            decode("text")
        assert len(decode(np.array([97, 98], dtype=np.uint16))) == 2


def test_foreign_ranks_are_refused(english):
    ranks = english.get_mergeable_ranks()
    make = rustbpe.Tokenizer.from_mergeable_ranks
    with pytest.raises(ValueError, match="at least the 256 bytes"):
        make(SPLIT_PATTERN, ranks[:200])
    with pytest.raises(ValueError, match="gap"):
        make(SPLIT_PATTERN, [*ranks, (b"zz", 5000)])
    with pytest.raises(ValueError, match="twice"):
        make(SPLIT_PATTERN, [*ranks[:-1], (b"zz", 3)])
    with pytest.raises(ValueError, match=r"token 256 .* not a merge of two earlier tokens"):
        make(SPLIT_PATTERN, [*ranks[:256], (b"zzzzz", 256)])
    with pytest.raises(ValueError, match=r"token 257 .* not a merge of two earlier tokens"):
        make(SPLIT_PATTERN, [*ranks[:256], (b"ab", 256), (b"ab", 257)])
    for rank in (-1, 2**70):
        with pytest.raises(ValueError, match="a number that is neither a byte"):
            make(SPLIT_PATTERN, [*ranks, (b"zz", rank)])
    with pytest.raises(ValueError, match="a number that is neither a byte"):
        make(SPLIT_PATTERN, [([256], 0)])
    for wrong in ([("a", 0)], [(b"a", 0.0)], [b"a"], None):
        with pytest.raises(TypeError):
            make(SPLIT_PATTERN, wrong)


def test_progress_reaches_the_end():
    seen = []
    trained(["the cat sat on the mat with the hat"], 270, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (14, 14)


ENDLESS = {
    "waiting for text": "slow()",
    "reading text": "iter(lambda: 'some text ' * 1000, None)",
    "reading empty text": "iter(str, None)",
    "merging": "words()",  # so many distinct words that merging takes much longer than reading
}


@pytest.mark.parametrize("phase", ENDLESS)
def test_ctrl_c_stops_training(phase):
    program = f"""
import random, rustbpe, time
def slow():
    yield "some text"
    time.sleep(1000)
def words():
    random.seed(0)
    for _ in range(300):
        yield " ".join("".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=60)) for _ in range(300))
    print("read", flush=True)
tokenizer = rustbpe.Tokenizer()
print("start", flush=True)
tokenizer.train_from_iterator({ENDLESS[phase]}, 2**31)
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True)
    for _ in range(2 if phase == "merging" else 1):
        process.stdout.readline()
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
