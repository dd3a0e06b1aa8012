"""Records tests/recorded/bpe_peers.json: the tokens that other trainers learn and the ids that other encoders return.

Needs an environment with PyPI's rustbpe (which has our import name), tokenizers and tiktoken:
    python tests/recorded/record_bpe.py
"""

import json
from importlib.metadata import version
from pathlib import Path

import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

import rustbpe

TWO = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)
THREE = TWO.replace("{1,2}", "{1,3}")
GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

VERSES = """The owl looked up to the stars above, and counted them: 1, 22, 333, 4444.
"How many?" the mouse asked. "I don't know," the owl said; "they're too many to count, aren't they?"
The mouse DIDN'T like that. She'd have 12345 crumbs of cheese, or 67 of bread; the owl's sums were no use.

\tSo the mouse   counted the crumbs, and the owl counted the stars,
\t\tand they counted and counted -- until the morning came!!  Nobody'd won.
"""
OTHERS = (
    """Zażółć gęślą jaźń; příliš žluťoučký kůň úpěl ďábelské ódy. Γειά σου Κόσμε! Съешь же ещё этих мягких булок.
今日は世界。你好，世界！안녕하세요 세계 😀👍🏽 naïve café — “quoted” ’s ſ's
Ⅷ½² 𝟗𝒳 e\u0301\u00a0\u2003\u3000x\u200d\u0000y
"""
    * 3
)
CODE = """def fib(n):
    # 0, 1, 1, 2, 3, 5, 8, 13, 21, 34
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a\r\n\r\n
assert [fib(i) for i in range(10)] == [0, 1, 1, 2, 3, 5, 8, 13, 21, 34]   \n\n\n  """
RUNS = "aaaa aaa aaaaaaa aa abab ababab bababa     \n\n\n\n      zzzzzzzzzz!!!!!!! 00000000 é" * 2

CASES = [
    ("prose", [VERSES], 420, TWO),
    ("prose, three digits", [VERSES], 420, THREE),
    ("prose, GPT-2", VERSES.splitlines(keepends=True), 400, GPT2),
    ("many scripts", [*OTHERS.splitlines(keepends=True), VERSES], 480, TWO),
    ("code", [CODE, CODE[:200]], 380, TWO),
    ("runs", [RUNS, "aaa", "b"], 300, TWO),
    # Hugging Face breaks ties by the order of the characters it substitutes for bytes. That is the order of the bytes
    # only for visible ASCII characters, so this case has no white space.
    ("words", (VERSES + CODE).split(), 480, TWO),
]
TEXTS = [
    VERSES[:150],
    OTHERS[:120],
    CODE,
    RUNS,
    "",
    " ",
    "don't DON'T don’t",
    "\n\n x\r\n",
    "x" * 300,
    "the owl's 123456",
]


def pypi_rustbpe(texts: list[str], vocab_size: int, pattern: str) -> list[bytes]:
    """Tokens of PyPI's rustbpe in order of rank."""
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, vocab_size, pattern=pattern)
    return [bytes(token) for token, _ in sorted(tokenizer.get_mergeable_ranks(), key=lambda item: item[1])]


def hugging_face(texts: list[str], vocab_size: int, pattern: str) -> list[bytes]:
    """Tokens of Hugging Face's trainer in the order learned."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in visible]
    byte_of = {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(hidden)}
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [bytes(byte_of[c] for c in name) for name, _ in vocab]


def main() -> None:
    cases = []
    for name, texts, vocab_size, pattern in CASES:
        tokens = pypi_rustbpe(texts, vocab_size, pattern)
        peer = hugging_face(texts, vocab_size, pattern)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        cases.append(
            {
                "name": name,
                "pattern": pattern,
                "texts": texts,
                "rustbpe": [token.hex() for token in tokens[256:]],
                "hugging_face": [token.hex() for token in peer[256:]] if name == "words" else None,
                "encoded": [encoding.encode_ordinary(text) for text in TEXTS],
            }
        )
    made_by = {name: version(name) for name in ("rustbpe", "tokenizers", "tiktoken")}
    out = Path(__file__).with_name("bpe_peers.json")
    out.write_text(json.dumps({"made_by": made_by, "encoded_texts": TEXTS, "cases": cases}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
