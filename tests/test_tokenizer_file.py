"""The tokenizer on disk: what is saved is loaded again, and every damaged or foreign file is refused with a reason."""

import hashlib
import json
import pickle

import pytest

from nanochat_jax.config import UserError
from nanochat_jax.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

TEXT = "Hello, world! It's a test of 1234 tokens; the tests test the tokenizer.\n naïve café 你好 😀\n"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT] * 3, 256 + 50 + len(SPECIAL_TOKENS))


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "tokenizer")
    again = Tokenizer.load(tmp_path / "new" / "tokenizer")
    assert again.hash == tokenizer.hash
    assert again.vocab_size == tokenizer.vocab_size
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert {path.name for path in (tmp_path / "new" / "tokenizer").iterdir()} == {"tokenizer.json", "nanochat.json"}
    assert tokenizer.hash != Tokenizer.train([TEXT], 300).hash


def test_hugging_face_layout(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    layout = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocab, merges = layout["model"]["vocab"], layout["model"]["merges"]
    assert [vocab[left + right] for left, right in merges] == list(range(256, 256 + 50))
    assert [token["content"] for token in layout["added_tokens"]] == list(SPECIAL_TOKENS)
    assert layout["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == SPLIT_PATTERN
    assert vocab["Ġ"] == ord(" ")
    assert vocab["Ċ"] == ord("\n")


def _edit(path, change):
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def _swap_for_folder(path):
    path.unlink()
    path.mkdir()


OURS_DAMAGED = {
    "not UTF-8": (lambda p: p.write_bytes(b"\xff\xfe"), "nanochat.json: not JSON"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "nanochat.json: not JSON"),
    "empty": (lambda p: p.write_bytes(b""), "nanochat.json: not JSON"),
    "a pickle": (lambda p: p.write_bytes(pickle.dumps({"format": "nanochat-tokenizer"})), "nanochat.json: not JSON"),
    "nested": (lambda p: p.write_text("[" * 100_000), "nanochat.json: not JSON"),
    "a list": (lambda p: p.write_text("[]"), "nanochat.json: expected a JSON object, got list"),
    "a folder": (_swap_for_folder, "nanochat.json: cannot be read .Is a directory"),
    "foreign": (lambda p: p.write_text('{"model_type": "gpt2"}'), "format is None, expected 'nanochat-tokenizer'"),
    "another format": (lambda p: _edit(p, lambda v: v.update(format="other")), "format is 'other'"),
    "another version": (lambda p: _edit(p, lambda v: v.update(version=99)), "version is 99, this program reads 1"),
    "no version": (lambda p: _edit(p, lambda v: v.pop("version")), "version is None, this program reads 1"),
    "no checksum": (lambda p: _edit(p, lambda v: v.pop("sha256")), "its SHA-256 is not the one in nanochat.json"),
    "no size": (lambda p: _edit(p, lambda v: v.pop("vocab_size")), "vocab_size is None, tokenizer.json says 315"),
    "another size": (lambda p: _edit(p, lambda v: v.update(vocab_size=9)), "vocab_size is 9, tokenizer.json says 315"),
    "other special tokens": (lambda p: _edit(p, lambda v: v["special_tokens"].popitem()), "special_tokens is"),
}


@pytest.mark.parametrize("how", OURS_DAMAGED)
def test_a_damaged_nanochat_json_says_what_is_wrong(tokenizer, tmp_path, how):
    damage, complaint = OURS_DAMAGED[how]
    tokenizer.save(tmp_path)
    damage(tmp_path / "nanochat.json")
    with pytest.raises(UserError, match=complaint):
        Tokenizer.load(tmp_path)


def test_missing_and_damaged_files_are_named(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"nanochat\.json does not exist.*tok_train"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_bytes()
    for damaged in (whole[:-100], b"", pickle.dumps(whole), whole.replace(b"test", b"tset")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"tokenizer\.json: its SHA-256 is not"):
            Tokenizer.load(tmp_path)
    _swap_for_folder(path)
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read .Is a directory"):
        Tokenizer.load(tmp_path)
    path.rmdir()
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)


WORDPIECE = {
    "model": {"type": "WordPiece", "vocab": {"[UNK]": 0, "a": 1}},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "added_tokens": [],
}


def _change(where, **new):
    return lambda value: (where(value) if callable(where) else value[where]).update(new)


def _vocab(value):
    return value["model"]["vocab"]


THEIRS_FOREIGN = {
    "WordPiece": (lambda v: (v.clear(), v.update(WORDPIECE)), "the model is of type 'WordPiece', expected 'BPE'"),
    "no model": (lambda v: v.pop("model"), "the model is of type None, expected 'BPE'"),
    "a model of a wrong type": (lambda v: v.update(model=[]), "the model is of type None, expected 'BPE'"),
    "no split": (lambda v: v.pop("pre_tokenizer"), "not a byte-level BPE with a split pattern"),
    "no vocabulary": (lambda v: v["model"].pop("vocab"), "not a byte-level BPE .*'vocab'"),
    "a vocabulary of a wrong type": (_change("model", vocab=[["a", 0]]), "not a byte-level BPE"),
    "another pattern": (
        lambda v: v["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+|\W+"),
        r"the split pattern is '.*w\+|.*', expected '",
    ),
    "a special token less": (lambda v: v["added_tokens"].pop(), "special tokens are"),
    "another special token": (lambda v: v["added_tokens"][0].update(content="<s>"), "special tokens are .*'<s>'"),
    "no byte letters": (_change(_vocab, 中=0), "token '中' has characters outside the byte alphabet"),
    "an id that is text": (_change(_vocab, a="97"), "the id of token 'a' is '97', expected a whole number"),
    "an id that is a fraction": (_change(_vocab, a=97.0), "the id of token 'a' is 97.0"),
    "an id below zero": (_change(_vocab, a=-1), "there are 306 tokens, but none has the id 97"),
    "a gap": (_change(_vocab, zz=5000), "there are 307 tokens, but none has the id 306"),
    "an id twice": (_change(_vocab, a=98), "there are 306 tokens, but none has the id 97"),
    "a byte less": (lambda v: _vocab(v).pop("Ġ"), "there are 305 tokens, but none has the id 32"),
    "no merge makes it": (_change(_vocab, zqzqz=306), "token 306 "),
    "another merge": (lambda v: v["model"]["merges"].reverse(), "model.merges differs from what this program writes"),
    "a normalizer": (lambda v: v.update(normalizer={"type": "NFC"}), "normalizer differs from what"),
    "dropout": (lambda v: v["model"].update(dropout=0.1), "model.dropout differs from what"),
    "something more": (lambda v: v.update({"extra\n\x1b": 1}), r"'extra\\n\\x1b' differs from what"),
    "another order": (lambda v: v.update(version=v.pop("version")), "the order or the spacing differs from what"),
}


@pytest.mark.parametrize("how", THEIRS_FOREIGN)
def test_a_foreign_tokenizer_json_says_what_is_wrong(tokenizer, tmp_path, how):
    """Even if nanochat.json has its checksum."""
    change, complaint = THEIRS_FOREIGN[how]
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    if how == "no merge makes it":
        for i, token in enumerate(value["added_tokens"]):
            token["id"] = 307 + i
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    special = {token["content"]: token["id"] for token in value["added_tokens"]}
    about = {"sha256": digest, "special_tokens": special, "vocab_size": 307 + 9 if "no merge" in how else 315}
    _edit(tmp_path / "nanochat.json", lambda v: v.update(about))
    with pytest.raises(UserError, match=complaint) as error:
        Tokenizer.load(tmp_path)
    assert str(error.value).isprintable()


@pytest.mark.parity
def test_hugging_face_reads_the_file_and_gives_the_same_ids(tokenizer, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (TEXT, " " * 50 + "x", "12345 678", "'s'LL\r\n\n \t x", "字字é\u0301 😀"):
        assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    assert theirs.token_to_id("<|bos|>") == tokenizer.bos
