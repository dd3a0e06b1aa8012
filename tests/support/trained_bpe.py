"""Shared by the tests of the Rust crate: tokenizers that train in a moment, and flat arrays as lists."""

import itertools

import numpy as np

import rustbpe
from nanochat_jax.tokenizer import SPLIT_PATTERN


def trained(texts, vocab_size: int, **settings) -> rustbpe.Tokenizer:
    """A tokenizer trained on the texts."""
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, vocab_size, **settings)
    return tokenizer


def english() -> rustbpe.Tokenizer:
    """A tokenizer of up to 400 tokens, with nanochat's pattern."""
    text = "the quick brown fox jumps over the lazy dog; the dogs don't care, they're 12 or 345 years old.\n" * 3
    return trained([text, "naïve café 你好 😀 " * 4], 400, pattern=SPLIT_PATTERN)


def flat(tokenizer, texts, **kwargs):
    """The ids of each text from encode_batch, split at its offsets, as lists."""
    tokens, offsets = tokenizer.encode_batch(texts, **kwargs)
    assert tokens.dtype == np.uint16 and offsets.dtype == np.int64
    assert tokens.flags.owndata and tokens.flags.writeable and tokens.flags.c_contiguous
    assert offsets[0] == 0 and offsets[-1] == len(tokens) and len(offsets) == len(texts) + 1
    return [tokens[start:end].tolist() for start, end in itertools.pairwise(offsets)]
