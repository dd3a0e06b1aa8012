"""tok_train and tok_eval on a small folder of text."""

import json
import time

import pytest
import tiktoken

from nanochat_jax import config, run_log
from nanochat_jax.tokenizer import Tokenizer
from scripts import tok_eval, tok_train


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):  # the second is for validation
        lines = [json.dumps({"text": f"Text {i} of {name}: the quick brown fox, {i * i} times."}) for i in range(200)]
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


def test_train_once_then_again(corpus, own_base_dir, capsys):
    cfg = config.TokTrain(data_dir=corpus, vocab_size=300, max_chars=1000, doc_cap=20)
    tok_train.main(cfg)
    folder = own_base_dir / "tokenizer"
    first = Tokenizer.load(folder)
    assert first.vocab_size == 300
    record = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    assert (record["max_chars"], record["doc_cap"], record["hash"]) == (1000, 20, first.hash)
    (log,) = run_log.read(folder)
    assert log["documents"] == 51  # the first that exceeds 1000 characters is the last; each is truncated to 20
    assert log["chars"] == 51 * 20
    assert log["peak_memory_bytes"] > 10e6 and log["seconds"] > 0
    printed = capsys.readouterr().out
    assert (
        "51 documents, 1,020 characters in " in printed
        and "M/s), peak memory " in printed
        and "300 tokens in " in printed
    )

    # The same settings, then the same without a source, which means the recorded one.
    for again in (cfg, config.TokTrain(vocab_size=300, max_chars=1000, doc_cap=20)):
        capsys.readouterr()
        tok_train.main(again)
        assert "already" in capsys.readouterr().out
    tok_train.main(config.TokTrain(data_dir=corpus, vocab_size=300, max_chars=1000, doc_cap=20, fresh=True))
    assert Tokenizer.load(folder).hash == first.hash
    assert not list(own_base_dir.glob("tokenizer-*"))

    # With other settings, the old tokenizer is kept beside the new one.
    tok_train.main(config.TokTrain(data_dir=corpus, vocab_size=310))
    assert Tokenizer.load(folder).vocab_size == 310
    assert Tokenizer.load(own_base_dir / f"tokenizer-{first.hash[:8]}").hash == first.hash


def test_two_recipes_take_turns_without_training_again(corpus, own_base_dir, capsys):
    folder, hashes, trained = own_base_dir / "tokenizer", set(), 0
    for size in (300, 310, 300, 310):
        tok_train.main(config.TokTrain(data_dir=corpus, vocab_size=size))
        assert Tokenizer.load(folder).vocab_size == size
        hashes.add(Tokenizer.load(folder).hash[:8])
        trained += "training a tokenizer" in capsys.readouterr().out
        aside = {p.name for p in own_base_dir.glob("tokenizer-*")}
        assert aside == {f"tokenizer-{h}" for h in hashes - {Tokenizer.load(folder).hash[:8]}}
    assert trained == 2


def test_a_damaged_tokenizer_is_trained_again(corpus, own_base_dir):
    cfg = config.TokTrain(data_dir=corpus, vocab_size=300)
    tok_train.main(cfg)
    good = Tokenizer.load(own_base_dir / "tokenizer").hash
    (own_base_dir / "tokenizer" / "tokenizer.json").write_text("{", encoding="utf-8")
    tok_train.main(cfg)
    assert Tokenizer.load(own_base_dir / "tokenizer").hash == good


def test_too_little_text_for_the_vocabulary_is_said(corpus, own_base_dir, capsys):
    tok_train.main(config.TokTrain(data_dir=corpus, vocab_size=50_000))
    size = Tokenizer.load(own_base_dir / "tokenizer").vocab_size
    assert f"{size:,} tokens instead of --vocab_size=50000" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"vocab_size": 100}, {"max_chars": 0}, {"doc_cap": -1}])
def test_wrong_settings_are_one_line(corpus, wrong):
    with pytest.raises(config.UserError, match="must be at least"):
        tok_train.main(config.TokTrain(data_dir=corpus, **wrong))


def test_eval_records_seven_texts(corpus, own_base_dir, capsys, monkeypatch):
    monkeypatch.setattr(tok_eval, "PEERS", {"GPT-5": "no_such_encoding"})
    tok_train.main(config.TokTrain(data_dir=corpus, vocab_size=300))
    tok_eval.main(config.TokEval())
    assert "GPT-5: skipped" in capsys.readouterr().out
    records = [r for r in run_log.read(own_base_dir / "tokenizer") if r["kind"] == "tok_eval"]
    assert [r["task"] for r in records] == ["news", "korean", "code", "math", "science", "train", "val"]
    assert all(0 < r["tokens"] <= r["bytes"] and r["gpt5_tokens"] is None for r in records)


def test_eval_against_peers_that_are_there(corpus, own_base_dir, capsys, monkeypatch):
    bytes_only = {bytes([b]): b for b in range(256)}
    peer = tiktoken.Encoding("peer", pat_str=r"(?s:.+)", mergeable_ranks=bytes_only, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: peer)
    tok_train.main(config.TokTrain(data_dir=corpus, vocab_size=300))
    tok_eval.main(config.TokEval())
    printed = capsys.readouterr().out
    assert "skipped" not in printed and "vocabulary: ours 300, GPT-2 256, GPT-4 256" in printed
    records = [r for r in run_log.read(own_base_dir / "tokenizer") if r["kind"] == "tok_eval"]
    for record in records:
        assert record["gpt2_tokens"] == record["gpt4_tokens"] == record["bytes"]
        [line] = [line for line in printed.splitlines() if line.startswith(record["task"] + " ")]
        percent = 100 * (record["bytes"] - record["tokens"]) / record["bytes"]
        assert f"{percent:+.1f}%" in line and f"{record['bytes'] / record['tokens']:.2f}" in line


def test_eval_does_not_wait_long_for_peers(corpus, own_base_dir, capsys, monkeypatch):
    """Neither for a network that does not answer, nor for a missing one."""
    monkeypatch.setattr(tok_eval, "PEER_SECONDS", 0.2)
    answers = {"gpt2": lambda: time.sleep(5), "cl100k_base": lambda: 1 / 0}
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: answers[name]())
    tok_train.main(config.TokTrain(data_dir=corpus, vocab_size=300))
    start = time.monotonic()
    tok_eval.main(config.TokEval())
    assert time.monotonic() - start < 4
    printed = capsys.readouterr().out
    for label, name in tok_eval.PEERS.items():
        assert f"{label}: skipped, tiktoken found {name} neither in its cache nor on the network\n" in printed
    assert "news " in printed


def test_eval_without_a_tokenizer():
    with pytest.raises(config.UserError, match="tok_train"):
        tok_eval.main(config.TokEval())
