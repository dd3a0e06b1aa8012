"""Byte-level BPE as one would explain it: count everything afresh before each merge. Twin of the Rust crate."""

from collections import Counter
from itertools import pairwise

import regex


def split(text: str, pattern: str) -> list[tuple[int, ...]]:
    """Chunks of a text, each as its bytes."""
    return [tuple(chunk.encode("utf-8")) for chunk in regex.findall(pattern, text)]


def merge(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    """`word` with each occurrence of `pair`, from left to right, replaced by `new`."""
    out, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def train(texts: list[str], vocab_size: int, pattern: str) -> list[tuple[int, int]]:
    """Merges in the order learned: the most frequent pair, among equals the smallest."""
    words = Counter(word for text in texts for word in split(text, pattern))
    merges = []
    while 256 + len(merges) < vocab_size:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        new = 256 + len(merges)
        merged = Counter()
        for word, count in words.items():
            merged[merge(word, best, new)] += count
        words = merged
        merges.append(best)
    return merges


def encode(text: str, merges: list[tuple[int, int]], pattern: str) -> list[int]:
    """Ids: in each chunk, all merges in the order learned."""
    ids = []
    for word in split(text, pattern):
        for i, pair in enumerate(merges):
            word = merge(word, pair, 256 + i)
        ids += word
    return ids
