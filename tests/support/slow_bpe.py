"""Byte-level BPE written to be read: it counts all pairs again before each merge. The Rust crate must give the same."""

from collections import Counter
from itertools import pairwise

import regex


def split(text: str, pattern: str) -> list[tuple[int, ...]]:
    r"""Chunks of a text, each as its bytes.

    >>> split("Hi you", r"\w+| \w+")
    [(72, 105), (32, 121, 111, 117)]
    """
    return [tuple(chunk.encode("utf-8")) for chunk in regex.findall(pattern, text)]


def merge(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    """`word` with each occurrence of `pair`, from left to right, replaced by `new`.

    >>> merge((97, 97, 97, 98), (97, 97), 256)  # "aaab": the second "aa" overlaps the first
    (256, 97, 98)
    """
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
    r"""Merges in the order learned: always the most frequent pair; of equally frequent ones, the smallest.

    >>> train(["abab abc"], 258, r"\w+| \w+")  # "ab" occurs three times; then all pairs occur once
    [(97, 98), (32, 256)]
    """
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
    r"""Ids of a text: in each chunk, all merges are applied in the order learned.

    >>> encode("abc", [(97, 98)], r"\w+")
    [256, 99]
    """
    ids = []
    for word in split(text, pattern):
        for i, pair in enumerate(merges):
            word = merge(word, pair, 256 + i)
        ids += word
    return ids
