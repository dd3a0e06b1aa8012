"""What is read: documents that are counted and estimated, and conversations that end after a whole answer."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loaders import TOKENIZER, T, Task, flat, make, take

from nanochat_jax.config import UserError
from nanochat_jax.data import dataloader, documents, parquet, sources, token_cache

pytestmark = pytest.mark.usefixtures("small_buffers")


def test_unusable_documents_are_counted_every_epoch(files):
    texts = [text for f in files for text in pq.read_table(f)["text"].to_pylist()]
    empty = sum(not text for text in texts)
    assert empty
    loader = make("split", files, epochs=2)
    skipped = [loader.info["skipped"] for _ in loader]
    assert skipped == sorted(skipped) and skipped[-1] == 2 * empty


def test_long_documents_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    """Documents waiting to be packed are part of the state of every batch."""
    monkeypatch.setattr(parquet, "MAX_CHARS", 500)
    monkeypatch.setattr(documents, "CHARS_AT_ONCE", 1000)
    path = tmp_path / "long.parquet"
    pq.write_table(pa.table({"text": [" ".join(map(str, range(1000, 21_000)))]}), path)
    loader = make("split", [path], epochs=1)
    targets, largest = [], 0
    for batch in loader:
        targets.append(batch["targets"])
        largest = max(largest, len(loader.state()["packer"]["tokens"]))
    targets = np.concatenate(targets)
    assert sorted(targets[targets > 0].tolist()) == list(range(1000, 21_000))
    assert largest < 20_000  # characters of base64; the whole document would be 110,000


def test_tokens_of_an_epoch_are_estimated(files, corpus):
    tokens = len(corpus) + 60  # with a BOS per document
    assert documents.epoch_tokens(files, TOKENIZER) == pytest.approx(tokens, rel=0.35)  # longer numbers come later
    assert documents.epoch_tokens(files, TOKENIZER, sample=5) == pytest.approx(tokens, rel=0.5)
    late = [*files, *(files[0].with_name(f"{i}.parquet") for i in range(8))]
    assert documents.epoch_tokens(late, TOKENIZER) == pytest.approx(5 * tokens, rel=0.35)
    assert np.isnan(documents.epoch_tokens(late[2:], TOKENIZER))


def test_tokens_of_an_epoch_are_counted_where_there_are_cached_tokens(files, corpus):
    TOKENIZER.hash = "0" * 64
    source = sources.Source("texts", tuple(files), (files[1],), "")
    cache_dir = token_cache.build(source, TOKENIZER)
    for path in files:
        path.unlink()
    late = files[0].with_name("late.parquet")
    assert documents.epoch_tokens(files, TOKENIZER, cache_dir) == len(corpus) + 60
    assert documents.epoch_tokens([*files, late], TOKENIZER, cache_dir) == 1.5 * (len(corpus) + 60)
    assert token_cache.num_cached([*files, late], cache_dir) == 2


def talk(*lengths: int) -> dict:
    """A conversation whose messages have these numbers of words, without the two special tokens of each message. The
    words of message i are the number 1000 + i."""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": " ".join([str(1000 + i)] * n)} for i, n in enumerate(lengths)
    ]
    return {"messages": messages}


OVERLONG = [
    talk(3, T + 1 - 8),  # 0: exactly as long as a row
    talk(3, T + 2 - 8),  # 1: one token too long, so nothing of its only answer is kept
    talk(40, 5),  # 2: the question alone is too long
    talk(2, 2, 2, 20),  # 3: the second answer is too long
    talk(2, 2, 20),  # 4: the second question is too long
    talk(2, 2, 2, T + 1 - 15),  # 5: exactly as long as a row
]


def test_overlong_conversations_end_after_a_whole_answer():
    loader = dataloader.chat_loader(OVERLONG, TOKENIZER, 1, T, supervise="mask", epochs=1)
    batches = take(loader)
    assert (loader.info["truncated"], loader.info["skipped"], loader.info["progress"]) == (4, 2, 1.0)
    targets = flat(batches, "targets")
    # 1001 and 1003 are the words of the answers. Conversation 0 keeps its only answer, 3 and 4 keep their first answer,
    # and 5 keeps both.
    assert (targets == 1001).sum() == T + 1 - 8 + 2 + 2 + 2 and (targets == 1003).sum() == T + 1 - 15
    assert (targets == TOKENIZER.assistant_end).sum() == 5, "every answer that is trained on ends"
    inputs = flat(batches, "inputs")
    assert (inputs == TOKENIZER.user_start).sum() == 5 and 1002 in inputs
    assert all((b["targets"] != -1).any() for b in batches)


def test_every_supervised_answer_is_whole_however_long_a_row_is():
    rng = np.random.default_rng(0)
    task = [talk(*rng.integers(1, 9, 2 * rng.integers(1, 6))) for _ in range(60)]
    for width in (12, 20, 33, 80):
        loader = dataloader.chat_loader(task, TOKENIZER, 3, width, supervise="mask", epochs=1)
        for batch in take(loader):
            for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
                assert (inputs == TOKENIZER.assistant_start).sum() == (targets == TOKENIZER.assistant_end).sum()
        long = sum(len(TOKENIZER.render_conversation(c)[0]) > width + 1 for c in task)
        assert loader.info["truncated"] == long and loader.info["skipped"] <= long


def test_counts_of_truncated_conversations_survive_a_resume():
    def fresh():
        return dataloader.chat_loader(OVERLONG * 20, TOKENIZER, 2, T, supervise="mask", epochs=2, seed=1)

    whole, first = fresh(), fresh()
    expected = take(whole)
    begun = [next(first) for _ in range(9)]
    resumed = fresh()
    resumed.restore(json.loads(json.dumps(first.state())))
    np.testing.assert_equal([*begun, *take(resumed)], expected)
    assert whole.info == resumed.info and whole.info["truncated"] == 160
    first.close()


def test_without_a_seed_conversations_stay_in_order():
    task = [talk(2, 3 + i % 3) for i in range(300)]
    for i, conversation in enumerate(task):
        conversation["messages"][0]["content"] = f"{2000 + i} 5"
    loader = dataloader.chat_loader(task, TOKENIZER, 4, 32, supervise="mask", epochs=1, seed=None)
    seen = [int(i) - 2000 for i in flat(take(loader), "inputs").ravel() if i >= 2000]
    assert sorted(seen) == list(range(300))
    assert max(abs(place - i) for place, i in enumerate(seen)) < 120  # the packer's buffer holds 100 conversations


def test_conversations_without_an_answer_are_refused_if_there_is_nothing_else():
    task = Task(3)
    for conversation in task:
        conversation["messages"].pop()
    for epochs in (1, None):
        with pytest.raises(UserError, match="no token to learn from"):
            take(dataloader.chat_loader(task, TOKENIZER, 2, T, supervise="mask", epochs=epochs), 1)
    with pytest.raises(UserError, match="no conversations"):
        dataloader.chat_loader(Task(0), TOKENIZER, 2, T)


def test_token_counts():
    counts = documents.token_counts(Task(10, answer=lambda i: 4, question=lambda i: 2), TOKENIZER)
    assert counts.tolist() == [11] * 10
