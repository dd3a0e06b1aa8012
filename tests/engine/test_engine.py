"""The engine generates what the full forward would: alone or among other requests, with and without tools."""

import dataclasses
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scripted_model import line_ids, scripted

from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.engine import cache as kv
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import Request, Sample
from nanochat_jax.model import gpt
from nanochat_jax.tokenizer import Tokenizer

CONTEXT = 160


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["12 * 3 = 36, hello there, what is 7 + 5?"] * 3, 280)


@pytest.fixture(scope="module")
def model_cfg(tokenizer):
    return GPTConfig(2, 4, 2, 64, tokenizer.vocab_size, CONTEXT)


@pytest.fixture(scope="module")
def params(model_cfg):
    """Random weights, including the output projections, and an uneven head, so that text is varied but not noise."""
    return tiny.random_params(model_cfg, 0.15)


@pytest.fixture(scope="module")
def engine(params, model_cfg, tokenizer):
    return Engine(params, model_cfg, tokenizer, slots=3, chunk=4)


@pytest.fixture(scope="module")
def full(model_cfg):
    """A function (params, ids) -> log-softmax [t,v] after each token, by the full forward in one compiled shape."""
    forward = jax.jit(lambda params, ids: jax.nn.log_softmax(gpt.forward(params, model_cfg, ids)[0]))

    def run(params, ids):
        return np.asarray(forward(params, np.array([[*ids, *[0] * (CONTEXT - len(ids))]])))[: len(ids)]

    return run


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def check_logprobs(sample, request, logits):
    """`logits` [t,v]: the full forward over prompt and sample."""
    start = len(request.ids) - 1
    expected = [logits[start + i, token] for i, token in enumerate(sample.ids)]
    np.testing.assert_allclose(sample.logprobs, expected, atol=2e-4)


# -----------------------------------------------------------------------------
# The same text as without a cache, slots and chunks


def test_greedy_text_and_logprobs_equal_the_full_forward(engine, params, full):
    """Five prompts of different lengths, one of them a single token, in three slots, which are refilled."""
    requests = [Request(prompt(n, n), max_tokens=m, temperature=0, stop_ids=())
                for n, m in [(1, 9), (5, 14), (40, 1), (33, 6), (20, 11)]]  # fmt: skip
    for request, (sample,) in zip(requests, engine.run(requests), strict=True):
        ids = list(request.ids)
        for _ in range(request.max_tokens):
            ids.append(int(full(params, ids)[-1].argmax()))
        assert sample.ids == ids[len(request.ids) :]
        assert sample.mask == [1] * request.max_tokens and sample.finish_reason == "length"
        check_logprobs(sample, request, full(params, ids))


def test_a_long_row_outgrows_its_cache_bucket(engine, params, full):
    request = Request(prompt(100), max_tokens=1000, temperature=0, stop_ids=())
    [[sample]] = engine.run([request])
    # The context holds 160 tokens. One more is generated, since nothing is computed from it.
    assert len(sample.ids) == CONTEXT - 100 + 1 and sample.finish_reason == "length"
    logits = full(params, [*request.ids, *sample.ids[:-1]])
    assert sample.ids == logits[99:].argmax(-1).tolist()


def test_a_prompt_may_fill_the_context_but_not_more(engine, params, full):
    [[sample]] = engine.run([Request(prompt(CONTEXT), temperature=0, stop_ids=())])
    assert sample.ids == [int(full(params, prompt(CONTEXT))[-1].argmax())] and sample.finish_reason == "length"
    with pytest.raises(UserError, match=r"161 tokens.*160"):
        engine.run([Request(prompt(CONTEXT + 1))])
    assert not engine.busy


@pytest.mark.parametrize("length", [65, 96, 127, 159, CONTEXT])
def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode(engine, params, full, length, monkeypatch):
    """Chunks of 64 in rows of 128 or 160 positions; in the latter, the last chunk overlaps the one before."""
    monkeypatch.setattr("nanochat_jax.engine.scheduler.PREFILL_CHUNK", 64)
    short, long = (Request(prompt(n, n), max_tokens=20, temperature=0, stop_ids=()) for n in (5, length))
    [[expected]] = engine.run([short])
    [[alone]] = engine.run([long])
    text = [*long.ids, *alone.ids[:-1]]
    assert alone.ids == full(params, text)[length - 1 :].argmax(-1).tolist()
    engine.set_params(params)  # clears what is cached of the prompt
    first = engine.add(short)
    events = engine.step()
    second = engine.add(long)
    chunks = -(-length // 64)
    for _ in range(chunks - 1):
        new = engine.step()
        assert [event.request for event in new] == [first] and engine.waiting == 1  # the short one decodes its chunk
        events += new
    while engine.busy:
        events += engine.step()
    texts = {id: [token for event in events if event.request == id for token in event.ids] for id in (first, second)}
    assert texts == {first: expected.ids, second: alone.ids}
    engine.set_params(params)
    cancelled = engine.add(long)
    engine.step()
    engine.cancel(cancelled)
    assert not engine.busy


# -----------------------------------------------------------------------------
# Prefix caching: what is in the cache already is not computed again


def greedy(engine, ids, max_tokens=20, **more) -> tuple[list[int], int]:
    """The continuation of `ids`, and how many of them were in the cache."""
    events = list(engine.stream(Request(ids, max_tokens=max_tokens, temperature=0, stop_ids=(), **more)))
    return [token for event in events for token in event.ids], events[0].cached_tokens


def test_the_next_turn_of_a_chat_goes_on_from_the_last_one(engine, params, full):
    engine.set_params(params)
    turn = prompt(70)
    answer, cached_tokens = greedy(engine, turn)
    assert cached_tokens == 0
    for _ in range(2):  # the second time, both turns are cached
        engine.run([Request(prompt(5, 1), max_tokens=9, temperature=0)])  # another request, in another slot
        turn = [*turn, *answer, *prompt(4, 2)]
        before = len(turn) - 4
        answer, cached_tokens = greedy(engine, turn)
        assert cached_tokens == before - 1  # nothing has been computed from the last token of an answer
        assert answer == full(params, [*turn, *answer[:-1]])[len(turn) - 1 :].argmax(-1).tolist()


def test_a_system_prompt_is_shared_with_samples_under_way(engine, params, full):
    engine.set_params(params)
    system = prompt(90)
    prompts = [[*system, *prompt(6 + i, i)] for i in range(3)]
    requests = [Request(ids, max_tokens=30, temperature=0, stop_ids=(), n=2) for ids in prompts]
    ids = [engine.add(request) for request in requests]
    events = []
    while engine.busy:
        events += engine.step()
    for id, request in zip(ids, requests, strict=True):
        for sample in range(2):
            text = [token for e in events if (e.request, e.sample) == (id, sample) for token in e.ids]
            logits = full(params, [*request.ids, *text[:-1]])
            assert text == logits[len(request.ids) - 1 :].argmax(-1).tolist()
    assert [sum(e.cached_tokens for e in events if e.request == id) for id in ids] == [0, 90, 90]  # once per request


def test_what_is_left_in_a_slot_ends_with_its_use(engine, params, full):
    engine.set_params(params)
    turn = prompt(70)
    answer, _ = greedy(engine, turn, max_tokens=62)  # 131 positions are in use
    # Others use the slots, and the cache shrinks to 128 positions, the last of which is overwritten.
    engine.run([Request(prompt(5, i), max_tokens=9, temperature=0) for i in range(2)])
    longer = [*turn, *answer, *prompt(4, 2)]
    again, cached_tokens = greedy(engine, longer)
    assert cached_tokens == 127 and again == full(params, [*longer, *again[:-1]])[len(longer) - 1 :].argmax(-1).tolist()
    engine.run([Request(prompt(5, i), max_tokens=9, temperature=0) for i in range(3)])  # a sample in every slot
    assert greedy(engine, longer)[1] == 0
    stopped = engine.add(Request(longer, max_tokens=20, temperature=0, stop_ids=()))
    engine.step()
    engine.step()
    engine.cancel(stopped)
    assert greedy(engine, [*longer, *again[:2], 7])[1] == len(longer) + 2
    assert greedy(engine, [*longer, 8], score=True)[1] == 0  # every token is scored, so every one is computed
    engine.set_params(params)
    assert greedy(engine, longer)[1] == 0


def test_a_sample_that_ends_where_the_cache_does_is_not_reused_to_its_last_token(engine, params, full):
    engine.set_params(params)
    turn = prompt(99)
    answer, _ = greedy(
        engine, turn, max_tokens=30
    )  # to position 127 of 128, which the rest of its last chunk overwrites
    request = Request([*turn, *answer, *prompt(4, 2)], max_tokens=8, temperature=0, stop_ids=())
    events = list(engine.stream(request))
    assert events[0].cached_tokens == 127
    again = Sample(*([x for e in events for x in getattr(e, name)] for name in ("ids", "mask", "logprobs")), "length")
    check_logprobs(again, request, full(params, [*request.ids, *again.ids]))


def test_a_prompt_whose_prefill_failed_is_not_reused(engine, params, monkeypatch):
    def fail(batch):
        raise MemoryError

    engine.set_params(params)
    ids = prompt(70)
    with monkeypatch.context() as failing, pytest.raises(MemoryError):
        failing.setattr(engine._runner, "_prefill_batch", fail)
        engine.run([Request(ids)])
    assert not engine.busy and greedy(engine, ids)[1] == 0


def test_a_failed_prefill_is_forgotten_though_samples_still_waited_for_it(engine, params, full, monkeypatch):
    def fail(batch):
        raise MemoryError

    engine.set_params(params)
    id = engine.add(Request(prompt(70), n=engine.slots + 1))
    with monkeypatch.context() as failing, pytest.raises(MemoryError):
        failing.setattr(engine._runner, "_prefill_batch", fail)
        engine.step()
    assert not engine.busy
    engine.cancel(id)  # as its caller does: it has gone already
    ids = prompt(5)
    answer, _ = greedy(engine, ids)
    assert answer == full(params, [*ids, *answer[:-1]])[len(ids) - 1 :].argmax(-1).tolist()


def test_sampled_text_does_not_depend_on_the_company(engine):
    """Each request runs alone, then all run together: they are prefilled in a batch and refill the slots."""
    requests = [
        Request(prompt(7, 1), max_tokens=9, seed=1),
        Request(prompt(9, 2), max_tokens=13, seed=2, temperature=0.7, top_k=5),
        Request(prompt(3, 3), max_tokens=10, seed=3, top_p=0.6, n=2),
        Request(prompt(60, 4), max_tokens=7, seed=4, temperature=0),
        Request(prompt(2, 5), max_tokens=10, seed=5, top_k=20, top_p=0.9),
    ]
    alone = [engine.run([request])[0] for request in requests]
    for together in (engine.run(requests), engine.run(requests[::-1])[::-1]):
        for mine, theirs in zip(chain(*together), chain(*alone), strict=True):
            assert (mine.ids, mine.finish_reason) == (theirs.ids, theirs.finish_reason)
            np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-4)


def test_samples_of_one_prompt_start_differently(engine):
    """More samples than slots; they share a prefill but not their first tokens."""
    request = Request(prompt(6), max_tokens=3, n=8, stop_ids=())
    [samples] = engine.run([request])
    assert len(samples) == 8 and len({s.ids[0] for s in samples}) > 3
    assert [s.ids for s in samples] != [s.ids for s in engine.run([dataclasses.replace(request, seed=7)])[0]]


def test_sampled_logprobs_are_those_of_the_full_softmax(engine, params, full):
    request = Request(prompt(12), max_tokens=20, temperature=0.8, top_k=10, stop_ids=())
    [[sample]] = engine.run([request])
    check_logprobs(sample, request, full(params, [*request.ids, *sample.ids]))


def test_a_prompt_is_scored_as_the_full_forward_scores_it(engine, params, full):
    """With and without an answer after it, in a batch and alone, with the most likely tokens at each position."""
    requests = [
        Request(prompt(n, n), max_tokens=m, temperature=0, stop_ids=(), score=True, top_logprobs=top)
        for n, m, top in [(20, 0, 3), (31, 0, 0), (25, 6, 2), (1, 0, 1), (90, 3, 20)]
    ]
    ids = [engine.add(request) for request in requests]
    events = []
    while engine.busy:
        events += engine.step()
    for id, request in zip(ids, requests, strict=True):
        mine = [event for event in events if event.request == id]
        sampled = [token for event in mine for token in event.ids]
        text = [*request.ids, *sampled]
        logits = full(params, text)
        assert len(sampled) == request.max_tokens and mine[-1].finish_reason == "length"
        scores, rest = mine[0].scores, [event.scores for event in mine[1:]]
        assert scores.logprobs[0] is None and rest == [None] * len(rest)
        expected = [logits[i, token] for i, token in enumerate(request.ids[1:])]
        np.testing.assert_allclose(np.array(scores.logprobs[1:], float), expected, atol=2e-4)
        if not request.top_logprobs:
            assert all(event.top is None for event in mine)
            continue
        top = [*scores.top, *(named for event in mine for named in event.top or ())]
        assert top.pop(0) is None and len(top) == len(text) - 1
        for named, after in zip(top, logits, strict=False):
            assert len(named) == request.top_logprobs
            np.testing.assert_allclose([p for _, p in named], np.sort(after)[::-1][: len(named)], atol=2e-4)
            np.testing.assert_allclose([after[token] for token, _ in named], [p for _, p in named], atol=2e-4)


def test_one_sample_can_be_cancelled(engine):
    alone = engine.run([Request(prompt(5), max_tokens=9, n=3, stop_ids=())])[0]
    i = engine.add(Request(prompt(5), max_tokens=9, n=3, stop_ids=()))
    events = engine.step()
    engine.cancel(i, sample=1)
    assert engine.running == 2 and engine.cached == 10
    while engine.busy:
        events += engine.step()
    text = [[token for event in events if event.sample == s for token in event.ids] for s in range(3)]
    assert text == [alone[0].ids, alone[1].ids[:1], alone[2].ids]


def test_bfloat16_runs_alone_and_in_a_batch(params, model_cfg, tokenizer):
    engine = Engine(params, model_cfg, tokenizer, slots=4, dtype=jnp.bfloat16, chunk=4)
    for count in (1, 4):  # four are prefilled together
        answers = engine.run([Request(prompt(5, i), max_tokens=6, stop_ids=()) for i in range(count)])
        assert [len(sample.ids) for [sample] in answers] == [6] * count
    buffers = jax.tree.leaves(engine._runner.cache)
    assert {x.dtype for x in buffers} == {jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)}


# -----------------------------------------------------------------------------
# Tools and stopping, with a model that follows a script


def generate(engine, params, ids, **settings):
    engine.set_params(params)
    request = Request(ids, **{"max_tokens": 40, "temperature": 0} | settings)
    [[sample]] = engine.run([request])
    return request, sample


CALL = ["?", "<|python_start|>", "12*3", "<|python_end|>"]
END = ["<|output_end|>", "!", "<|assistant_end|>"]


@pytest.mark.parametrize("padding", ["", "ab", "abc", "abcd"])
def test_the_result_is_forced_right_after_the_call(engine, params, model_cfg, tokenizer, full, padding):
    """Wherever in a chunk the call ends. The log-probabilities show that later tokens see the forced ones."""
    call = [f"{padding}?", *CALL[1:]]
    weights = scripted(params, model_cfg, tokenizer, call, END)
    request, sample = generate(engine, weights, line_ids(tokenizer, call)[:1])
    called = line_ids(tokenizer, call)[1:]
    output = [tokenizer.special("<|output_start|>"), *tokenizer.encode("36"), tokenizer.special("<|output_end|>")]
    assert sample.ids == called + output + line_ids(tokenizer, END)[1:]
    assert sample.mask == [1] * len(called) + [0] * len(output) + [1, 1]
    assert sample.finish_reason == "stop"
    check_logprobs(sample, request, full(weights, [*request.ids, *sample.ids]))


def test_a_result_longer_than_a_chunk_is_forced_whole(engine, params, model_cfg, tokenizer):
    call = ["?", "<|python_start|>", "9*817263540", "<|python_end|>"]
    _, sample = generate(engine, scripted(params, model_cfg, tokenizer, call, END), [ord("?")])
    output = [
        tokenizer.special("<|output_start|>"),
        *tokenizer.encode("7355371860"),
        tokenizer.special("<|output_end|>"),
    ]
    assert len(output) > engine.chunk + 1
    start = len(line_ids(tokenizer, call)) - 1
    assert sample.ids[start : start + len(output)] == output
    assert [i for i, m in enumerate(sample.mask) if not m] == list(range(start, start + len(output)))


@pytest.mark.parametrize("expression", ["12+", ""])
def test_a_refused_or_empty_call_forces_nothing(engine, params, model_cfg, tokenizer, expression):
    line = ["?", "<|python_start|>", expression, "<|python_end|>", "!", "<|assistant_end|>"]
    _, sample = generate(engine, scripted(params, model_cfg, tokenizer, line), [ord("?")])
    assert sample.ids == line_ids(tokenizer, line)[1:] and sample.mask == [1] * len(sample.ids)


def test_without_tools_a_call_is_text(engine, params, model_cfg, tokenizer):
    line = [*CALL, "!", "<|assistant_end|>"]
    _, sample = generate(engine, scripted(params, model_cfg, tokenizer, line), [ord("?")], tools=False)
    assert sample.ids == line_ids(tokenizer, line)[1:]


def test_forced_tokens_count_toward_max_tokens(engine, params, model_cfg, tokenizer):
    weights = scripted(params, model_cfg, tokenizer, CALL, END)
    _, sample = generate(engine, weights, [ord("?")], max_tokens=8)
    assert len(sample.ids) == 8 and sample.mask == [1] * 6 + [0] * 2 and sample.finish_reason == "length"


@pytest.mark.parametrize(("stop", "length"), [(None, 4), (["<|bos|>"], 8), (["x", "<|user_end|>"], 2), ([], 12)])
def test_stop_ids(engine, params, model_cfg, tokenizer, stop, length):
    line = ["a", "b", "x", "y", "<|assistant_end|>", "c", "d", "e", "<|bos|>", "f", "g", "h", "i"]
    ids = None if stop is None else line_ids(tokenizer, stop)
    _, sample = generate(engine, scripted(params, model_cfg, tokenizer, line), [ord("a")], stop_ids=ids, max_tokens=12)
    assert sample.ids == line_ids(tokenizer, line)[1 : 1 + length]
    assert sample.finish_reason == ("length" if length == 12 else "stop")


# -----------------------------------------------------------------------------
# The ways to call it


def test_stream_gives_what_run_gives_in_pieces(engine, params):
    engine.set_params(params)
    request = Request(prompt(5), max_tokens=10, n=2, stop_ids=())
    events = list(engine.stream(request))
    assert all(event.ids and len(event.ids) <= engine.chunk for event in events)
    for index, sample in enumerate(engine.run([request])[0]):
        mine = [event for event in events if event.sample == index]
        assert len(mine[0].ids) == 1  # the first token is not held back for a chunk
        assert [i for event in mine for i in event.ids] == sample.ids
        assert [event.finish_reason for event in mine] == [None] * (len(mine) - 1) + ["length"]


def test_closing_a_stream_frees_the_engine(engine):
    stream = engine.stream(Request(prompt(5), max_tokens=50, stop_ids=()))
    next(stream)
    assert engine.running == 1
    stream.close()
    assert not engine.busy


def test_requests_come_and_go_between_steps(engine):
    """One is cancelled while it runs, one while it waits, and one is added late; the others are not affected."""
    requests = [Request(prompt(4, i), max_tokens=12, seed=i, stop_ids=()) for i in range(5)]
    alone = [engine.run([request])[0][0].ids for request in requests]
    ids = [engine.add(request) for request in requests[:4]]
    text = {}
    events = [engine.step() for _ in range(2)]
    assert engine.running == 3 and engine.waiting == 1
    engine.cancel(ids[1])
    assert engine.running == 2
    engine.cancel(ids[3])
    assert engine.waiting == 0
    ids.append(engine.add(requests[4]))
    while engine.busy:
        events.append(engine.step())
    for event in [event for batch in events for event in batch]:
        text.setdefault(event.request, []).extend(event.ids)
    assert [text[ids[i]] for i in (0, 2, 4)] == [alone[i] for i in (0, 2, 4)]
    assert ids[3] not in text and len(text[ids[1]]) < 12
    engine.cancel(ids[0])  # long finished
    assert engine.step() == []


def test_cancel_drops_the_samples_that_have_not_started(engine):
    i = engine.add(Request(prompt(4), max_tokens=30, n=7, stop_ids=()))
    engine.step()
    assert (engine.running, engine.waiting) == (3, 4)
    engine.cancel(i)
    assert not engine.busy
    assert len(engine.run([Request(prompt(4), max_tokens=2, stop_ids=())])[0][0].ids) == 2


def test_progress_counts_samples(engine):
    seen = []
    engine.run([Request(prompt(3), max_tokens=2, n=4, stop_ids=())], progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (4, 4) and seen == sorted(seen)


@pytest.mark.parametrize(("change", "message"), [
    (dict(ids=[]), "empty"), (dict(ids=[10**6]), "vocabulary"), (dict(ids=[-1]), "vocabulary"),
    (dict(max_tokens=0), "max_tokens"), (dict(n=0), "n is 0"), (dict(temperature=-1), "temperature"),
    (dict(temperature=float("nan")), "temperature"), (dict(top_k=-1), "top_k"), (dict(top_p=0), "top_p"),
    (dict(stop_ids=range(9)), "stop tokens"), (dict(max_tokens=-1, score=True), "max_tokens"),
    (dict(top_logprobs=21), "top_logprobs"),
])  # fmt: skip
def test_bad_requests_are_refused_and_leave_no_trace(engine, change, message):
    with pytest.raises(UserError, match=message):
        engine.run([Request([1]), Request(**{"ids": [1]} | change)])
    assert not engine.busy


def test_buckets_are_few_and_hold_what_they_must():
    sizes = {kv.bucket(n, 2048) for n in range(2049)}
    assert sizes == {128, 256, 512, 1024, 2048}
    assert all(kv.bucket(n, 1500) >= n for n in range(1501)) and kv.bucket(1500, 1500) == 1500
    assert kv.bucket(1, 100) == 100


def test_a_gpu_decodes_a_single_answer_with_two_slots(params, model_cfg, tokenizer, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    engine = Engine(params, model_cfg, tokenizer, slots=1)
    assert engine.slots == 2, "see programs.min_slots"
