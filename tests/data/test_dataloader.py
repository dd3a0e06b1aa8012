"""Loaders: exact state, an order that does not depend on the processes, and targets where they belong."""

import json
import subprocess
import sys
import threading
import time

import grain
import numpy as np
import pytest
from loaders import KINDS, TOKENIZER, T, Task, flat, make, take

from nanochat_jax.config import REPOSITORY, UserError
from nanochat_jax.data import dataloader, documents, sources, token_cache

pytestmark = pytest.mark.usefixtures("small_buffers")


def test_every_token_is_a_target_exactly_once_an_epoch(files, corpus):
    batches = take(make("split", files, epochs=1))
    targets = flat(batches, "targets")
    assert sorted(targets[targets > 0].tolist()) == sorted(corpus)
    assert all(b["inputs"].shape == b["targets"].shape == (4, T) for b in batches)
    assert all(b["inputs"].dtype == np.int32 for b in batches)
    assert (flat(batches, "inputs")[:, 0] == TOKENIZER.bos).all()


def test_targets_are_the_next_inputs(files):
    for batch in take(make("split", files, epochs=1)):
        shifted, targets = batch["inputs"][:, 1:], batch["targets"][:, :-1]
        assert ((targets == shifted) | (targets == -1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_at_every_position_equals_uninterrupted(kind, files):
    loader = make(kind, files, seed=3, epochs=2)
    states, batches, infos = [loader.state()], [], []
    for batch in loader:
        batches.append(batch)
        infos.append(loader.info)
        states.append(json.loads(json.dumps(loader.state())))
    assert len(batches) > 5
    for i, state in enumerate(states):
        resumed = make(kind, files, seed=3, epochs=2)
        if i % 2:
            next(resumed)  # a loader that has already run ahead can be restored too
        resumed.restore(state)
        assert resumed.state() == state
        for expected, info in zip(batches[i:], infos[i:], strict=True):
            np.testing.assert_equal(next(resumed), expected)
            assert resumed.info == info
        with pytest.raises(StopIteration):
            next(resumed)
        resumed.close()


@pytest.mark.parametrize("method", ["split", "crop", "stream"])
def test_grain_agrees_that_the_state_is_exact(method, files):
    text = documents.Documents(files, TOKENIZER, seed=3, epochs=1)
    grain.experimental.assert_equal_output_after_checkpoint(dataloader.Batches(text, method, 4, T))


@pytest.mark.parametrize("supervise", ["all", "mask"])
def test_grain_agrees_about_conversations(supervise):
    conversations = documents.Conversations(Task(30), TOKENIZER, T + 1 if supervise == "mask" else None, 3, 1)
    method = "whole" if supervise == "mask" else "split"
    grain.experimental.assert_equal_output_after_checkpoint(dataloader.Batches(conversations, method, 4, T))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_share_the_batches_of_one(kind, files):
    whole = take(make(kind, files, epochs=2))
    halves = [take(make(kind, files, epochs=2, process_index=i, process_count=2)) for i in range(2)]
    assert len(whole) == len(halves[0]) == len(halves[1])
    for a, b, c in zip(whole, *halves, strict=True):
        np.testing.assert_equal(a, {k: np.concatenate([b[k], c[k]]) for k in a})


def test_the_state_of_one_process_serves_two(files):
    loader = make("split", files)
    next(loader)
    state = loader.state()
    expected = take(loader, 3)
    halves = [make("split", files, process_index=i, process_count=2) for i in range(2)]
    for half in halves:
        half.restore(state)
    halves = [take(half, 3) for half in halves]
    for a, b, c in zip(expected, *halves, strict=True):
        np.testing.assert_equal(a, {k: np.concatenate([b[k], c[k]]) for k in a})


@pytest.mark.parametrize("method", ["split", "crop", "stream"])
@pytest.mark.parametrize("chars", [2_000_000, 60])
def test_tokenized_files_give_the_same_batches_and_states(method, chars, files, monkeypatch):
    monkeypatch.setattr(documents, "CHARS_AT_ONCE", chars)
    TOKENIZER.hash = "0" * 64
    source = sources.Source("texts", tuple(files), (files[1],), "")
    cache_dir = token_cache.build(source, TOKENIZER)
    text = make(method, files, seed=3, epochs=2)
    tokens = make(method, files, seed=3, epochs=2, cache_dir=cache_dir)
    states = []
    for batch in text:
        np.testing.assert_equal(batch, next(tokens))
        assert text.info == tokens.info and text.state() == tokens.state()
        states.append(text.state())
    for i in (1, len(states) // 2):  # resumed from text to tokens, and with only one file cached
        (cache_dir / "a.index.npz").unlink(missing_ok=True)
        resumed = make(method, files, seed=3, epochs=2, cache_dir=cache_dir)
        resumed.restore(states[i])
        expected = make(method, files, seed=3, epochs=2)
        expected.restore(states[i])
        np.testing.assert_equal(take(resumed), take(expected))
    text.close(), tokens.close()
    token_cache.build(source, TOKENIZER)
    for path in files:
        path.unlink()
    batches = take(make(method, files, seed=3, epochs=2, cache_dir=cache_dir))
    assert len(batches) == len(states), "the text is not needed"


def test_the_state_of_two_processes_serves_one(files):
    halves = [make("split", files, process_index=i, process_count=2) for i in range(2)]
    for half in halves:
        next(half), next(half)
    states = [half.state() for half in halves]
    assert states[0] == states[1]
    one, reference = make("split", files), make("split", files)
    one.restore(states[1])
    next(reference), next(reference)
    np.testing.assert_equal(take(one, 3), take(reference, 3))
    for half in halves:
        half.close()


def test_rows_that_processes_cannot_share_are_refused(files):
    with pytest.raises(UserError, match="4 rows cannot be shared by 3"):
        make("split", files, process_count=3)


def test_a_state_of_other_rows_is_refused(files):
    loader, other = make("split", files), make("crop", files)
    with pytest.raises(UserError, match="packing split, this run crop"):
        other.restore(loader.state())
    loader.close(), other.close()


def test_seed_decides_the_order_and_epochs_differ(files):
    first, again, other = (take(make("split", files, seed=s, epochs=2)) for s in (1, 1, 2))
    np.testing.assert_equal(first, again)
    assert not np.array_equal(flat(first, "inputs"), flat(other, "inputs"))
    targets = flat(first, "targets")
    _, counts = np.unique(targets[targets > 0], return_counts=True)
    assert (counts == 2).all(), "two epochs: every token occurs twice"


def test_without_epochs_it_never_ends(files):
    assert len(take(make("split", files), 200)) == 200
    assert len(take(make("sft", files), 200)) == 200


@pytest.mark.parametrize("kind", KINDS)
def test_progress_rises_to_the_number_of_epochs(kind, files):
    loader = make(kind, files, epochs=2)
    infos, states = zip(*[(loader.info, loader.state()) for _ in loader], strict=True)
    progress = [info["progress"] for info in infos]
    assert progress == sorted(progress) and progress[-1] == 2
    assert progress[0] < 1.5
    assert [info["progress_before"] for info in infos] == [0, *progress[:-1]]
    resumed = make(kind, files, epochs=2)
    resumed.restore(states[2])
    next(resumed)
    assert resumed.info == infos[3]


@pytest.mark.parametrize("method", ["split", "crop", "stream"])
def test_validation_tokens_do_not_depend_on_the_batch(files, method):
    def rows(n):
        batches = take(dataloader.val_batches(files, TOKENIZER, n, T, 40 * T, packing=method))
        assert all(b["inputs"].shape == (n, T) for b in batches)
        inputs, targets = flat(batches, "inputs"), flat(batches, "targets")
        assert (targets[40:] == -1).all()
        return inputs[:40], targets[:40]

    for n in (7, 64):
        np.testing.assert_equal(rows(n), rows(1))


def test_validation_of_everything(files, corpus):
    targets = flat(take(dataloader.val_batches(files, TOKENIZER, 8, T, None)), "targets")
    assert set(targets[targets > 0].tolist()) == corpus


def test_sft_rows_hold_whole_conversations_with_the_mask_of_the_renderer():
    task = Task(40)
    rendered = {tuple(map(tuple, TOKENIZER.render_conversation(c))) for c in task}
    for batch in take(dataloader.chat_loader(task, TOKENIZER, 4, 32, supervise="mask", epochs=1)):
        for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
            starts = np.flatnonzero(inputs == TOKENIZER.bos).tolist()
            for begin, end in zip(starts, [*starts[1:], 33], strict=True):
                # The last token of a row is only a target; if there is none, the row ends with padding.
                ids = inputs[begin:end].tolist() + ([int(targets[-1])] if end == 33 and targets[-1] != -1 else [])
                mask = [0] + [int(t != -1) for t in targets[begin : begin + len(ids) - 1]]
                if len(ids) > 1:
                    rendered.remove((tuple(ids), tuple(mask)))
                else:
                    assert targets[begin] == -1
    assert not rendered, "every conversation occurs once"


def test_padding_follows_the_same_rows():
    def batches(**kwargs):
        return take(dataloader.chat_loader(Task(50), TOKENIZER, 5, T, supervise="mask", epochs=1, **kwargs))

    plain, padded = batches(), batches(padding=3)
    assert len(plain) == len(padded)
    for a, b in zip(plain, padded, strict=True):
        assert b["inputs"].shape == (8, T)
        for name in ("inputs", "targets"):
            np.testing.assert_array_equal(b[name][:5], a[name])
        assert (b["targets"][5:] == -1).all()
    halves = [batches(padding=3, process_index=i, process_count=2) for i in range(2)]
    for whole, *parts in zip(padded, *halves, strict=True):
        np.testing.assert_array_equal(whole["targets"], np.concatenate([p["targets"] for p in parts]))


def test_mid_supervises_every_token_and_cuts_nothing():
    task = Task(20, answer=lambda i: 3 * T)  # longer than a row
    targets = flat(take(dataloader.chat_loader(task, TOKENIZER, 4, T, supervise="all", epochs=1)), "targets")
    expected = [t for c in task for t in TOKENIZER.render_conversation(c)[0] if t != TOKENIZER.bos]
    assert sorted(targets[targets > 0].tolist()) == sorted(expected)


def test_waste_is_reported(files):
    waste = {}
    for kind in ("split", "crop"):
        loader = make(kind, files)
        for _ in range(30):
            next(loader)
        waste[kind] = loader.info["waste"]
        loader.close()
    assert waste["split"] == 0 and 0.05 < waste["crop"] < 0.9


def test_an_error_in_the_thread_reaches_the_consumer(files):
    files[1].write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"shard_00001\.parquet") as caught:
        take(make("split", files, epochs=1))
    assert "\n" not in str(caught.value)


def test_the_first_files_are_read_while_the_next_is_on_its_way(files):
    late, hidden = files[1], files[1].with_suffix(".incomplete")
    expected = take(make("split", files, epochs=1))
    late.rename(hidden)
    loader = make("split", files, epochs=1)
    threading.Timer(1.0, lambda: hidden.rename(late)).start()
    np.testing.assert_equal(take(loader), expected)


def test_close_ends_the_thread_even_while_it_waits(files):
    files[1].unlink()  # the thread runs ahead and soon waits for it
    before = threading.active_count()
    loader = make("split", files)
    for _ in range(2):
        next(loader)
    start = time.time()
    loader.close()
    loader.close()
    assert time.time() - start < 5 and threading.active_count() <= before
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_batches_are_made_while_the_device_computes(files, monkeypatch):
    make_one = dataloader.BatchIterator.__next__
    monkeypatch.setattr(dataloader.BatchIterator, "__next__", lambda self: time.sleep(0.2) or make_one(self))
    loader, waits = make("split", files), []
    for _ in range(4):
        start = time.monotonic()
        next(loader)
        waits.append(time.monotonic() - start)
        time.sleep(0.5)  # a training step
    loader.close()
    assert waits[0] >= 0.2 and sum(waits[1:]) < 0.3, waits


def test_nothing_is_said_at_exit_about_loaders_left_open(files):
    code = (
        "import sys, pathlib; sys.path.insert(0, 'tests/support')\n"
        "from fake_tokenizer import FakeTokenizer; from nanochat_jax.data import dataloader\n"
        f"loader = dataloader.base_loader([pathlib.Path({str(files[0])!r})], FakeTokenizer(), 4, 16); next(loader)\n"
        "idle = dataloader.base_loader(loader and [pathlib.Path('x')], FakeTokenizer(), 4, 16)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_with_the_real_tokenizer():
    pytest.importorskip("rustbpe")
    from nanochat_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(["how many legs has a spider? eight legs", "and a dog? four"], 300)
    task = [
        {"messages": [{"role": "user", "content": f"legs of {n}?"}, {"role": "assistant", "content": f"{n} has legs"}]}
        for n in ("spider", "dog", "snake", "fish")
    ]
    targets = flat(take(dataloader.chat_loader(task, tokenizer, 2, 64, supervise="mask", epochs=1)), "targets")
    rendered = [tokenizer.render_conversation(c) for c in task]
    expected = [i for ids, mask in rendered for i, m in zip(ids, mask, strict=True) if m]
    assert sorted(targets[targets >= 0].tolist()) == sorted(expected)
    assert documents.token_counts(task, tokenizer).tolist() == [len(ids) for ids, _ in rendered]
