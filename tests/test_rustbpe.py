"""The Rust crate: equal to a slow implementation, to its peers and to recorded merges, in any thread, at any length."""

import doctest
import gzip
import inspect
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import regex
import slow_bpe
from hypothesis import given, settings
from hypothesis import strategies as st
from trained_bpe import english as english_tokenizer
from trained_bpe import flat, trained

import rustbpe
from nanochat_jax.config import REPOSITORY
from nanochat_jax.tokenizer import SPLIT_PATTERN

PEERS = json.loads((Path(__file__).parent / "recorded" / "bpe_peers.json").read_text(encoding="utf-8"))
GPT4_PATTERN = SPLIT_PATTERN.replace("{1,2}", "{1,3}")
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# Few distinct characters, so that pairs repeat, tie and overlap ("aaa"), and chunks of every kind occur.
dense = st.text(alphabet="aaabcé '\n\t19.s字", max_size=60)
corpora = st.lists(dense, min_size=1, max_size=8)


@pytest.fixture(scope="module")
def english():
    return english_tokenizer()


def test_the_examples_of_the_slow_implementation_hold():
    results = doctest.testmod(slow_bpe)
    assert results.attempted >= 4 and not results.failed


@settings(max_examples=150, deadline=None)
@given(corpora, st.integers(256, 300), st.sampled_from([SPLIT_PATTERN, GPT2_PATTERN]), dense)
def test_equals_the_slow_implementation(texts, vocab_size, pattern, other):
    if not any(texts):
        texts = ["a"]
    ours = trained(texts, vocab_size, pattern=pattern)
    merges = slow_bpe.train(texts, vocab_size, pattern)
    assert ours.get_merges() == merges
    for text in [*texts, other]:
        assert ours.encode(text) == slow_bpe.encode(text, merges, pattern)


# What the pattern distinguishes, and characters close to that: words, contractions, numbers, many kinds of white space.
# Only assigned code points: a later version of Unicode may make letters of those that an earlier one leaves free.
assigned = st.characters(exclude_categories=("Cs", "Cn"))
near_the_pattern = st.text(
    alphabet="aZé字ſ'sTlLvErRdDmM  \t\u00a0\u2003\n\r\u2028\x0b079²Ⅷ,.-’“\u0301\u200d😀\0", max_size=80
)


@settings(max_examples=1000, deadline=None)
@given(st.one_of(near_the_pattern, st.text(assigned, max_size=80)), st.sampled_from([1, 2, 3]))
def test_splits_as_the_regex_does(text, digits):
    pattern = SPLIT_PATTERN.replace("{1,2}", f"{{1,{digits}}}")
    tokenizer = rustbpe.Tokenizer.from_mergeable_ranks(pattern, [(bytes([b]), b) for b in range(256)])
    assert tokenizer.split(text) == regex.findall(pattern, text)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=200), near_the_pattern))
def test_round_trip(english, text):
    ids = english.encode(text)
    assert english.decode(ids) == text
    assert english.decode_bytes(ids) == text.encode("utf-8")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_bytes_round_trip_as_ids(english, data):
    assert english.decode_bytes(list(data)) == data
    assert english.decode(list(data)) == data.decode("utf-8", errors="replace")


def test_tokens_are_raw_bytes(english):
    # A token that is part of a character must count its own bytes, not those of the U+FFFD it is displayed as: bits per
    # byte depend on it (upstream #693).
    ranks = dict(english.get_mergeable_ranks())
    parts = [token for token in ranks if len(token.decode("utf-8", errors="ignore").encode("utf-8")) < len(token)]
    assert any(len(token) > 1 for token in parts)
    for token in parts:
        assert english.decode_bytes([ranks[token]]) == token
        assert english.decode([ranks[token]]) == token.decode("utf-8", errors="replace")


@pytest.mark.parametrize("case", PEERS["cases"], ids=lambda case: case["name"])
def test_equals_what_others_learn_and_answer(case):
    learned = [bytes.fromhex(token) for token in case["rustbpe"]]
    ours = trained(case["texts"], 256 + len(learned), pattern=case["pattern"])
    assert [token for token, _ in ours.get_mergeable_ranks()[256:]] == learned
    assert case["hugging_face"] in (None, case["rustbpe"])
    assert ours.batch_encode(PEERS["encoded_texts"]) == case["encoded"]
    again = rustbpe.Tokenizer.from_mergeable_ranks(case["pattern"], ours.get_mergeable_ranks())
    assert [again.encode(text) for text in PEERS["encoded_texts"]] == case["encoded"]


@pytest.mark.parametrize("case", PEERS["cases"], ids=lambda case: case["name"])
def test_the_slow_implementation_learns_and_answers_the_same(case):
    merges = slow_bpe.train(case["texts"], 256 + len(case["rustbpe"]), case["pattern"])
    assert trained(case["texts"], 256 + len(case["rustbpe"]), pattern=case["pattern"]).get_merges() == merges
    assert [slow_bpe.encode(text, merges, case["pattern"]) for text in PEERS["encoded_texts"]] == case["encoded"]


@pytest.mark.golden
def test_recorded_merges(golden_dir, data_dir):
    golden = json.loads((golden_dir / "bpe.json").read_text(encoding="utf-8"))
    with gzip.open(data_dir / "pretrain" / "tinyshakespeare.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    ours = trained(iter(texts), len(golden["ranks"]), pattern=golden["pattern"])
    assert [[token.hex(), rank] for token, rank in ours.get_mergeable_ranks()] == golden["ranks"]
    # The slow implementation learns only the first merges, to save time, and encodes with all of the recorded merges.
    merges, pattern = ours.get_merges(), golden["pattern"]
    assert slow_bpe.train(texts, 256 + 20, pattern) == merges[:20]
    for case in json.loads((golden_dir / "encode.json").read_text(encoding="utf-8")):
        assert ours.encode(case["text"]) == slow_bpe.encode(case["text"], merges, pattern) == case["ids"]


def test_stands_in_for_the_package_of_pypi():
    # rustbpe 0.1.0: the same names and positions of arguments; our own arguments come after them.
    signatures = {
        "train_from_iterator": "(self, /, iterator, vocab_size, buffer_size=8192, pattern=None",
        "encode": "(self, /, text",
        "batch_encode": "(self, /, texts",
        "decode": "(self, /, ids",
        "get_mergeable_ranks": "(self, /",
        "get_pattern": "(self, /",
    }
    for name, begins in signatures.items():
        assert str(inspect.signature(getattr(rustbpe.Tokenizer, name))).startswith(begins)
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(["abab"]), 257, 1, r"\w+")
    assert (tokenizer.vocab_size, tokenizer.get_pattern()) == (257, r"\w+")
    assert [bytes(token) for token, _ in tokenizer.get_mergeable_ranks()][256:] == [b"ab"]


def test_buffer_size_and_kind_of_iterable_do_not_matter():
    texts = [f"text number {i} of {i * i}" for i in range(100)]
    merges = trained(texts, 400).get_merges()
    assert merges == trained(iter(texts), 400, buffer_size=7).get_merges()
    assert merges == trained((t for t in reversed(texts)), 400, buffer_size=1).get_merges()


def test_default_pattern_takes_three_digits_and_a_given_one_is_kept():
    tokenizer = trained(["1234 1234 1234"], 260)
    assert tokenizer.get_pattern() == GPT4_PATTERN
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


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=12), st.integers(1, 5))
def test_flat_arrays_equal_one_by_one(english, texts, num_threads):
    assert flat(english, texts, num_threads=num_threads) == [english.encode(text) for text in texts]


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7, None])
def test_a_large_text_is_encoded_in_parallel_and_the_same(english, num_threads):
    words = "The quick brown fox, naïve café.\n\n  你好 12345 don't stop  \r\n\tthe lazy dog's 😀 "
    large = "".join(words[i % 17 :] + str(i * i) for i in range(25_000))
    whole = "x" * 700_000 + "你" * 300_000  # nowhere to split
    texts = ["short", large, "", whole, "the end"]
    assert flat(english, texts, num_threads=num_threads) == [english.encode(text) for text in texts]


def test_flat_arrays_of_nothing(english):
    tokens, offsets = english.encode_batch([])
    assert tokens.shape == (0,) and offsets.tolist() == [0]
    tokens, offsets = english.encode_batch(iter(["", ""]))
    assert tokens.shape == (0,) and offsets.tolist() == [0, 0, 0]


def test_flat_tokens_are_wide_enough_for_the_vocabulary():
    # Bytes and pairs of bytes: 65,536 tokens, and one more.
    ranks = [bytes([b]) for b in range(256)] + [bytes([i, j]) for i in range(256) for j in range(256)]
    for size, dtype in [(65_536, np.uint16), (65_537, np.uint32)]:
        some = [(token, rank) for rank, token in enumerate(ranks[:size])]
        tokenizer = rustbpe.Tokenizer.from_mergeable_ranks(r"[\s\S]+", some)
        tokens, _ = tokenizer.encode_batch([bytes([9, 10]).decode(), "ÿ"])
        assert tokens.dtype == dtype
        assert tokens.tolist() == tokenizer.encode("\t\n") + tokenizer.encode("ÿ")


def test_threads_may_share_a_tokenizer(english):
    texts = [f"the quick {i} brown dogs {'fox' * (i % 50)} don't {i * 7}" for i in range(3000)]
    expected = english.batch_encode(texts)
    results = [None] * 6

    def work(i):
        results[i] = [english.encode(text) for text in texts] if i % 2 else flat(english, texts)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(ids == expected for ids in results)


def test_a_tokenizer_may_be_used_while_it_is_trained():
    tokenizer = trained(["the cat"], 260)

    def texts():
        for _ in range(5):
            yield tokenizer.decode(tokenizer.encode("the cat sat on the mat "))

    tokenizer.train_from_iterator(texts(), 270, progress=lambda *_: tokenizer.encode("the"))
    assert tokenizer.get_merges() == trained(["the cat sat on the mat "] * 5, 270).get_merges()


def test_a_forked_process_may_encode():
    # Data loaders fork after the tokenizer has been used; a pool of threads would be gone there.
    program = """
import multiprocessing, rustbpe
tokenizer = rustbpe.Tokenizer()
texts = ["some words " * 20_000] * 4
tokenizer.train_from_iterator(texts, 260)
def lengths(_):
    return len(tokenizer.encode_batch(texts)[0])
expected = lengths(0)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(lengths, range(4)) == [expected] * 4
print("done")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout == "done\n", result.stderr


def test_training_keeps_no_text_in_memory():
    program = """
import rustbpe
from peak_memory import peak_memory
text = "".join(f"word {i % 97} and more, don't stop. " for i in range(2000))
def train(num):
    rustbpe.Tokenizer().train_from_iterator((text + str(i % 10) for i in range(num)), 300)
    return peak_memory()
few = train(20)
print(train(1200) - few, 1200 * len(text))
"""
    environment = os.environ | {"PYTHONPATH": "tests/support"}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    more, text = map(int, result.stdout.split())
    assert text > 60e6 and more < text / 4


@pytest.mark.parametrize("work", ["train_from_iterator", "encode", "encode_batch", "batch_encode"])
def test_other_threads_run_meanwhile(work):
    # One text, and a pattern that has no scanner of its own in the crate, so that this takes a while on any machine.
    # Other threads can only run if the GIL is released while the text is counted or encoded.
    pattern, text = r"\w+|\W", "some words, and 12 more. " * 100_000
    tokenizer = trained(["a word, and another"], 260, pattern=pattern)
    call = {
        "train_from_iterator": lambda: tokenizer.train_from_iterator([text], 257, pattern=pattern),
        "encode": lambda: tokenizer.encode(text),
        "encode_batch": lambda: tokenizer.encode_batch([text]),
        "batch_encode": lambda: tokenizer.batch_encode([text]),
    }[work]
    ready, stop, seen = threading.Event(), threading.Event(), []

    def look():
        while not stop.is_set():
            seen.append(time.perf_counter())
            ready.set()
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    ready.wait()
    start = time.perf_counter()
    call()
    end = time.perf_counter()
    stop.set()
    thread.join()
    assert sum(start < moment < end for moment in seen) >= 5


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
