"""Reads and writes a tokenizer's files: tokenizer.json (Hugging Face layout) and nanochat.json (version, checksum).

The files are JSON, not pickle, because loading a pickle file from someone else could run code. A tokenizer.json is
accepted only if this program would write exactly the same file for its vocabulary. Otherwise, an error says what
differs.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from nanochat_jax.config import UserError
from nanochat_jax.files import write_text

FORMAT, VERSION = "nanochat-tokenizer", 1


def write(directory: Path, text: str, vocab_size: int, special: dict[str, int]) -> None:
    """Writes tokenizer.json and nanochat.json into `directory`, which is created if needed. `text` is the content of
    tokenizer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "vocab_size": vocab_size,
        "special_tokens": special,
        "sha256": sha256(text),
    }
    write_text(directory / "tokenizer.json", text)
    write_text(directory / "nanochat.json", json.dumps(about, indent=2) + "\n")


def read(directory: Path, pattern: str, special_names: Sequence[str]) -> tuple[str, list[tuple[bytes, int]]]:
    """Returns the text of tokenizer.json and the (token bytes, id) pairs in it.

    Raises UserError if either file is missing, damaged or from another program. Also raises UserError if the split
    pattern or the special tokens in tokenizer.json differ from the arguments.
    """
    ours, theirs = directory / "nanochat.json", directory / "tokenizer.json"
    for path in (ours, theirs):
        if not path.exists():
            fix = "train a tokenizer with python -m scripts.tok_train"
            raise UserError(f"{path} does not exist: {fix}")
    about = _parse(_read(ours), ours)
    if about.get("format") != FORMAT:
        raise UserError(f"{ours}: format is {about.get('format')!r}, expected {FORMAT!r}")
    if about.get("version") != VERSION:
        raise UserError(f"{ours}: version is {about.get('version')!r}, this program reads {VERSION}")
    data = _read(theirs)
    if about.get("sha256") != hashlib.sha256(data).hexdigest():
        raise UserError(
            f"{theirs}: its SHA-256 is not the one in {ours.name}, so the file was changed or damaged; "
            "run tok_train again with the same settings"
        )

    ranks, special = _vocabulary(_parse(data, theirs), theirs, pattern)
    expected = {name: len(ranks) + i for i, name in enumerate(special_names)}
    if special != expected:
        raise UserError(f"{theirs}: special tokens are {special}, expected {expected}")
    for key, value in {"vocab_size": len(ranks) + len(special), "special_tokens": special}.items():
        if about.get(key) != value:
            raise UserError(f"{ours}: {key} is {about.get(key)!r}, {theirs.name} says {value!r}")
    return data.decode("utf-8"), ranks


def sha256(text: str) -> str:
    """Returns the SHA-256 (hex) of the text of tokenizer.json."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# -----------------------------------------------------------------------------
# The Hugging Face layout


def layout(pattern: str, tokens: list[bytes], merges: list[tuple[int, int]], special: dict[str, int]) -> str:
    """Returns the text of tokenizer.json. `tokens` is sorted by id and has no special tokens. `merges` holds pairs of
    ids."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    names = ["".join(_alphabet()[b] for b in token) for token in tokens]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [[names[left], names[right]] for left, right in merges],
        },
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"


def difference(actual: str, expected: str) -> str:
    """Returns the name of the first part in which two tokenizer.json texts differ, such as "model.merges"."""
    first, second = json.loads(actual), json.loads(expected)
    for a, b, prefix in ((first, second, ""), (first["model"], second["model"], "model.")):
        for key in [*b, *(k for k in a if k not in b)]:
            if key != "model" and (key not in a or key not in b or a[key] != b[key]):
                return prefix + (key if key in b else repr(key))  # an unknown key may be any string, so it is quoted
    return "the order or the spacing"


def _vocabulary(content: dict, path: Path, pattern: str) -> tuple[list[tuple[bytes, int]], dict[str, int]]:
    """Returns the (token bytes, id) pairs of a parsed tokenizer.json, and the ids of its special tokens by name.

    Example of a result: ([(b"\\x00", 0), ...], {"<|bos|>": 65527, ...}). Raises UserError if `content` is invalid, for
    example if an id is missing.
    """
    model = content.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        raise UserError(f"{path}: the model is of type {kind!r}, expected 'BPE'")
    try:
        its_pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        special = {token["content"]: token["id"] for token in content["added_tokens"]}
        vocab = dict(model["vocab"].items())
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a byte-level BPE with a split pattern ({error!r})") from error
    if its_pattern != pattern:
        raise UserError(f"{path}: the split pattern is {its_pattern!r}, expected {pattern!r}")

    byte_of = {c: b for b, c in _alphabet().items()}
    ranks = []
    for name, rank in vocab.items():
        if type(rank) is not int:
            raise UserError(f"{path}: the id of token {name!r} is {rank!r}, expected a whole number")
        if not set(name) <= byte_of.keys():
            raise UserError(f"{path}: token {name!r} has characters outside the byte alphabet")
        ranks.append((bytes(byte_of[c] for c in name), rank))
    missing = set(range(len(ranks))) - {rank for _, rank in ranks}
    if missing:
        raise UserError(f"{path}: there are {len(ranks)} tokens, but none has the id {min(missing)}")
    return ranks, special


@functools.cache
def _alphabet() -> dict[int, str]:
    """Returns the printable character that GPT-2 uses for each byte. A visible character stands for itself. Every other
    byte gets a character from U+0100 up. Examples: ord("a") -> "a", ord(" ") -> "Ġ"."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(256) if b not in visible)
    return {b: chr(b) for b in visible} | {b: chr(0x100 + i) for i, b in enumerate(others)}


# -----------------------------------------------------------------------------
# Files


def _read(path: Path) -> bytes:
    """Returns the content of a file. Raises UserError if the file cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:  # for example, `path` is a folder or permission is denied
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _parse(data: bytes, path: Path) -> dict:
    """Returns the JSON object in `data`, the content of `path`. Raises UserError if `data` is not a JSON object."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
