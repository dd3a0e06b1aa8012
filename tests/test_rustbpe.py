"""The Rust crate: equal to a slow twin and to recorded merges, and polite about bad input."""

import gzip
import json
import signal
import subprocess
import sys
import time

import pytest
import slow_bpe
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe
from nanochat_jax.tokenizer import SPLIT_PATTERN

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# Few distinct characters, so that pairs repeat, tie and overlap ("aaa"), and chunks of every kind occur.
dense = st.text(alphabet="aaabcé '\n\t19.s字", max_size=60)
corpora = st.lists(dense, min_size=1, max_size=8)


def trained(texts, vocab_size, **kwargs):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, vocab_size, **kwargs)
    return tokenizer


@pytest.fixture(scope="module")
def english():
    text = "the quick brown fox jumps over the lazy dog; the dogs don't care, they're 12 or 345 years old.\n" * 3
    return trained([text, "naïve café 你好 😀 " * 4], 400, pattern=SPLIT_PATTERN)


@settings(max_examples=150, deadline=None)
@given(corpora, st.integers(256, 300), st.sampled_from([SPLIT_PATTERN, GPT2_PATTERN]), dense)
def test_equals_the_slow_twin(texts, vocab_size, pattern, other):
    if not any(texts):
        texts = ["a"]
    ours = trained(texts, vocab_size, pattern=pattern)
    merges = slow_bpe.train(texts, vocab_size, pattern)
    assert ours.get_merges() == merges
    for text in [*texts, other]:
        assert ours.encode(text) == slow_bpe.encode(text, merges, pattern)


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_round_trip(english, text):
    ids = english.encode(text)
    assert english.decode(ids) == text
    assert english.decode_bytes(ids) == text.encode("utf-8")


@pytest.mark.golden
def test_recorded_merges(golden_dir, data_dir):
    golden = json.loads((golden_dir / "bpe.json").read_text(encoding="utf-8"))
    with gzip.open(data_dir / "pretrain" / "tinyshakespeare.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    ours = trained(iter(texts), len(golden["ranks"]), pattern=golden["pattern"])
    assert [[token.hex(), rank] for token, rank in ours.get_mergeable_ranks()] == golden["ranks"]


def test_buffer_size_and_kind_of_iterable_do_not_matter():
    texts = [f"text number {i} of {i * i}" for i in range(100)]
    merges = trained(texts, 400).get_merges()
    assert merges == trained(iter(texts), 400, buffer_size=7).get_merges()
    assert merges == trained((t for t in reversed(texts)), 400, buffer_size=1).get_merges()


def test_default_pattern_takes_three_digits_and_a_given_one_is_kept():
    tokenizer = trained(["1234 1234 1234"], 260)
    assert r"\p{N}{1,3}" in tokenizer.get_pattern()
    assert trained(["1234 1234 1234"], 260, pattern=SPLIT_PATTERN).get_pattern() == SPLIT_PATTERN
    assert (b"123", 257) in tokenizer.get_mergeable_ranks()


def test_vocabulary_is_smaller_when_pairs_run_out():
    assert trained(["abcd"], 1000).vocab_size == 256 + 3
    assert trained(["a"], 1000).vocab_size == 256


def test_untrained_is_bytes_only():
    tokenizer = rustbpe.Tokenizer()
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode("é!") == [0xC3, 0xA9, 0x21]


def test_batch_equals_one_by_one(english):
    texts = ["the fox", "", "2345 dogs 😀", "x" * 500] * 20
    assert english.batch_encode(texts) == [english.encode(text) for text in texts]


def test_ranks_round_trip_in_any_order(english):
    again = rustbpe.Tokenizer.from_mergeable_ranks(english.get_pattern(), english.get_mergeable_ranks()[::-1])
    assert again.get_merges() == english.get_merges()
    assert again.get_mergeable_ranks() == english.get_mergeable_ranks()


@pytest.mark.parametrize("unit", [" ", "a", "\n", "!", "7", "\u3000", "é", "ab "])
def test_a_million_characters_of_one_kind(english, unit):
    text = unit * (1_000_000 // len(unit))
    start = time.monotonic()
    ids = english.encode(text)
    assert english.decode(ids) == text
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("vocab_size", [255, 0, -5])
def test_vocab_size_below_the_bytes(vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size is {vocab_size}.*256"):
        trained(["a"], vocab_size)


def test_items_that_are_not_text_are_named():
    with pytest.raises(TypeError, match=r"item 2 .* int, expected str"):
        trained(["a", "b", 3], 300)
    with pytest.raises(TypeError, match=r"item 10000 .* bytes"):
        trained((b"x" if i == 10000 else "x" for i in range(20000)), 300)
    with pytest.raises(ValueError, match=r"item 1 .* not valid Unicode"):
        trained(["a", "\ud800"], 300)
    with pytest.raises(TypeError, match="put it in a list"):
        trained("a text", 300)
    with pytest.raises(TypeError):
        trained(3, 300)


def test_errors_of_the_iterator_come_through_and_leave_the_tokenizer_as_it_was(english):
    def texts():
        yield "some text"
        raise OSError("disk on fire")

    tokenizer = trained(["abab"], 300)
    before = tokenizer.get_merges()
    with pytest.raises(OSError, match="on fire"):
        tokenizer.train_from_iterator(texts(), 300)
    assert tokenizer.get_merges() == before


def test_unusable_settings_are_value_errors():
    with pytest.raises(ValueError, match="empty"):
        trained([], 300)
    with pytest.raises(ValueError, match="does not compile"):
        trained(["a"], 300, pattern="(")
    with pytest.raises(ValueError, match="match nothing"):
        trained(["a"], 300, pattern="x*")
    with pytest.raises(ValueError, match="buffer_size"):
        trained(["a"], 300, buffer_size=0)


def test_ids_outside_the_vocabulary(english):
    for decode in (english.decode, english.decode_bytes):
        with pytest.raises(ValueError, match="token id 100000 is outside the vocabulary"):
            decode([97, 100000])
        with pytest.raises((OverflowError, TypeError)):
            decode([-1])


def test_foreign_ranks_are_refused(english):
    ranks = english.get_mergeable_ranks()
    make = rustbpe.Tokenizer.from_mergeable_ranks
    with pytest.raises(ValueError, match="at least the 256 bytes"):
        make(SPLIT_PATTERN, ranks[:200])
    with pytest.raises(ValueError, match="gap"):
        make(SPLIT_PATTERN, [*ranks, (b"zz", 5000)])
    with pytest.raises(ValueError, match="twice"):
        make(SPLIT_PATTERN, [*ranks[:-1], (b"zz", 3)])
    with pytest.raises(ValueError, match=r"token 256 .* not the union"):
        make(SPLIT_PATTERN, [*ranks[:256], (b"zzzzz", 256)])


def test_progress_reaches_the_end():
    seen = []
    trained(["the cat sat on the mat with the hat"], 270, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (14, 14)


@pytest.mark.parametrize("phase", ["reading", "merging"])
def test_ctrl_c_stops_training(phase):
    # Endless text, or so many distinct words that merging takes long after the short reading.
    texts = "iter(lambda: 'some text ' * 1000, None)" if phase == "reading" else "words()"
    program = f"""
import random, rustbpe
def words():
    random.seed(0)
    for _ in range(300):
        yield " ".join("".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=60)) for _ in range(300))
    print("read", flush=True)
tokenizer = rustbpe.Tokenizer()
print("start", flush=True)
tokenizer.train_from_iterator({texts}, 2**31)
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True)
    for _ in range(1 if phase == "reading" else 2):
        process.stdout.readline()
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
