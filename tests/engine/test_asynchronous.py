"""With asynchronous scheduling, the device starts the next chunk before the host has read the last one. The tokens are
the same."""

import itertools
import random
import re

import jax
import numpy as np
import pytest
import tiny
from scripted_model import scripted

from nanochat_jax.config import GPTConfig
from nanochat_jax.engine import cache as kv
from nanochat_jax.engine.ahead import Program
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import Request
from nanochat_jax.tokenizer import Tokenizer

CALL, NO_CALL = ["?", "<|python_start|>", "12*3", "<|python_end|>"], ["~", "<|python_start|>", "<|python_end|>"]
END = ["<|output_end|>", "!", "<|assistant_end|>"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["12 * 3 = 36, hello there, what is 7 + 5?"] * 3, 280)


@pytest.fixture(scope="module")
def weights(tokenizer):
    """The weights of two models, and their GPTConfig. Both call the calculator after a "?"."""
    model_cfg = GPTConfig(2, 4, 2, 64, tokenizer.vocab_size, 160)
    return [scripted(tiny.random_params(model_cfg, scale), model_cfg, tokenizer, CALL, END) for scale in (0.15, 0.2)], (
        model_cfg
    )


@pytest.fixture(scope="module")
def engines(tokenizer, weights):
    """Two engines with the same weights: (synchronous, asynchronous)."""
    [params, _], model_cfg = weights
    return [Engine(params, model_cfg, tokenizer, slots=3, chunk=4, asynchronous=flag) for flag in (False, True)]


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def plain(length: int, seed: int, max_tokens: int, **settings) -> Request:
    """A request that ends only after `max_tokens`."""
    return Request(prompt(length, seed), max_tokens=max_tokens, stop_ids=(), tools=False, **settings)


def run(engine, requests: list[Request]) -> list:
    """As Engine.run, but fails if an answer never ends."""
    steps, step = itertools.count(), engine.step

    def counted():
        assert next(steps) < 500, "the answers never end"
        return step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "step", counted)
        return engine.run(requests)


def watch(engine, monkeypatch) -> list[str]:
    """Returns a list that grows with what the host does: "dispatch" a chunk, or "read" the tokens of the oldest one."""
    done, dispatch, decode = [], engine._runner._dispatch, engine._runner._decode

    def dispatched(*args):
        done.append("dispatch")
        return dispatch(*args)

    def decoded(schedule):
        tokens = decode(schedule)
        done.append("read")
        return tokens

    monkeypatch.setattr(engine._runner, "_dispatch", dispatched)
    monkeypatch.setattr(engine._runner, "_decode", decoded)
    return done


def test_one_chunk_is_in_flight_while_the_host_reads(engines, monkeypatch):
    [synchronous, asynchronous] = [watch(engine, monkeypatch) for engine in engines]
    request = plain(5, 0, 17)  # the first token, and 4 chunks
    alone, ahead = [run(engine, [request])[0][0] for engine in engines]
    assert alone == ahead and len(ahead.ids) == 17
    assert synchronous == ["dispatch", "read"] * 4
    assert asynchronous == ["dispatch", *["dispatch", "read"] * 3, "read"], "no chunk follows the last one"


def test_on_a_cpu_no_chunk_is_in_flight_by_default(tokenizer, weights):
    [params, _], model_cfg = weights
    assert not Engine(params, model_cfg, tokenizer)._scheduler.asynchronous


def test_a_waiting_sample_starts_without_a_chunk_in_between(engines, monkeypatch):
    asynchronous = watch(engines[1], monkeypatch)
    run(engines[1], [plain(5, i, 9) for i in range(4)])  # one waits for a slot
    assert asynchronous[:4] == ["dispatch", "read"] * 2, "nothing is in flight while a sample waits"
    assert ("dispatch", "dispatch") in itertools.pairwise(asynchronous)


@pytest.mark.parametrize("others", [[], [plain(5, 1, 40)]], ids=["alone", "beside another row"])
def test_a_calculator_result_waits_for_the_chunk_in_flight(engines, others):
    """While the call ends, the device already decodes the next chunk, in which this row is paused."""
    requests = [Request([*b"ab", ord("?")], max_tokens=30, temperature=0), *others]
    alone, ahead = [run(engine, requests) for engine in engines]
    assert alone == ahead
    assert ahead[0][0].mask.count(0) == 3, "<|output_start|> 36 <|output_end|>"


def test_a_call_without_a_result_goes_on_too(tokenizer, weights):
    """The row pauses, although no tokens are forced."""
    [params, _], model_cfg = weights
    params = scripted(params, model_cfg, tokenizer, NO_CALL, ["<|python_end|>", "a", "b", "c", "d", "a"])
    requests = [Request([*b"ab~"], max_tokens=30, temperature=0)]
    engines = [Engine(params, model_cfg, tokenizer, slots=3, chunk=4, asynchronous=flag) for flag in (False, True)]
    alone, ahead = [run(engine, requests) for engine in engines]
    assert alone == ahead and tokenizer.special("<|python_end|>") in ahead[0][0].ids[:4]
    assert len(ahead[0][0].ids) == 30


def traffic(engine, seed: int) -> dict:
    """Adds and cancels requests between steps, and returns the answers of those that were not cancelled."""
    rng, answers, cancelled, sent = random.Random(seed), {}, set(), []
    arrivals = [
        Request(
            [*prompt(rng.randrange(2, 60), rng.randrange(100)), *rng.choice([b"", b"?"])],
            max_tokens=rng.randrange(1, 40), n=rng.choice([1, 1, 3]), temperature=rng.choice([0.0, 0.7, 1.3]),
            top_k=rng.choice([0, 20]), seed=i, stop_ids=rng.choice([None, (), range(0, 256, 32)]),
        )
        for i in range(8)
    ]  # fmt: skip
    for _ in range(1000):
        if not engine.busy and not arrivals:
            break
        if arrivals and rng.random() < 0.3:
            sent.append((engine.add(request := arrivals.pop()), request))
            if rng.random() < 0.3:
                cancelled.add(sent[-1][0])
        for event in engine.step():
            ids, logprobs, masks, reasons = answers.setdefault((event.request, event.sample), ([], [], [], []))
            assert not reasons and event.ids, "tokens after the end of an answer"
            ids += event.ids
            logprobs += event.logprobs
            masks += event.mask
            if event.finish_reason:
                reasons.append(event.finish_reason)
        if sent and sent[-1][0] in cancelled:
            engine.cancel(sent[-1][0])
    assert not engine.busy, "the answers never end"
    order = [id for id, _ in sent]
    return {(order.index(id), sample): answer for (id, sample), answer in answers.items() if id not in cancelled}


@pytest.mark.parametrize("seed", range(6))
def test_the_tokens_are_the_same_whatever_comes_and_goes(engines, seed):
    alone, ahead = [traffic(engine, seed) for engine in engines]
    assert alone.keys() == ahead.keys() and len(ahead) > 3
    for key, (ids, logprobs, masks, reasons) in alone.items():
        assert (ids, masks, reasons) == (ahead[key][0], *ahead[key][2:])
        np.testing.assert_allclose(ahead[key][1], logprobs, atol=1e-4)  # a cached prefix is rounded differently


def test_the_next_turn_of_a_chat_starts_from_the_cache(engines):
    """Also if the chunk in flight went on in the rows of the last turn."""
    [[first]] = run(engines[1], [Request(prompt(60, 7), max_tokens=30, temperature=0, stop_ids=())])
    after = Request([*prompt(60, 7), *first.ids, *prompt(5, 8)], max_tokens=20, temperature=0, stop_ids=(), tools=False)
    engines[1].add(Request(prompt(60, 7), max_tokens=60, temperature=0, stop_ids=(), tools=False))
    for _ in range(4):
        engines[1].step()
    engines[1].cancel(engines[1]._next_id)
    cached = [event.cached_tokens for event in engines[1].stream(after)]
    assert cached[0] > 60
    [[alone]], [[ahead]] = [run(engine, [after]) for engine in engines]
    assert alone.ids == ahead.ids
    np.testing.assert_allclose(alone.logprobs, ahead.logprobs, atol=1e-4)  # a cached prefix is rounded differently


def test_new_weights_decode_with_no_old_chunk(engines, weights):
    """As in RL, which gives the engine new weights between two batches of samples."""
    request = Request(prompt(9, 9), max_tokens=30, n=3, seed=4)
    answers = []
    for engine in engines:
        answers.append([])
        for params in (*reversed(weights[0]), weights[0][0]):
            engine.set_params(params)
            answers[-1].append(run(engine, [request]))
            assert engine._runner._in_flight is None
    assert answers[0] == answers[1] and answers[1][0] != answers[1][1]


def test_when_all_samples_have_ended_no_chunk_is_in_flight(engines):
    engine = engines[1]
    for end in ("cancelled", "stopped"):
        engine.add(plain(5, 2, 40))
        for _ in range(3):
            engine.step()
        assert engine._runner._in_flight is not None
        if end == "cancelled":
            engine.cancel(engine._next_id)
        else:  # any token now ends the answer
            for sequence in engine._scheduler.slots.running().values():
                sequence.stop_ids = tuple(range(engine.model_cfg.vocab_size))
            engine.step()
        assert not engine.busy and engine._runner._in_flight is None and not engine._scheduler.in_flight


@pytest.mark.parametrize("where", ["_dispatch", "_decode", "_postprocess"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_the_answer_goes_on_without_the_chunk_in_flight(engines, where, error):
    engine, request = engines[1], plain(5, 2, 24)
    [[expected]] = run(engine, [request])
    engine.add(request)
    ids = [token for _ in range(3) for event in engine.step() for token in event.ids]
    assert engine._runner._in_flight is not None
    owner = engine if where == "_postprocess" else engine._runner
    with pytest.MonkeyPatch.context() as broken, pytest.raises(error, match="no device"):
        broken.setattr(owner, where, lambda *args: (_ for _ in ()).throw(error("no device")))
        engine.step()
    assert engine._runner._in_flight is None and not engine._scheduler.in_flight
    while engine.busy:
        ids += [token for event in engine.step() for token in event.ids]
    assert ids == expected.ids


def test_a_chunk_in_flight_needs_no_program_of_its_own(tokenizer, weights, caplog):
    """The inputs of a chunk are on the device, whether the host put them there or the last chunk left them there."""
    [params, _], model_cfg = weights
    request = plain(5, 0, 25, temperature=0)
    for chunk, compiled_ahead in ((5, False), (6, True)):  # chunks that no other test has compiled
        engine = Engine(params, model_cfg, tokenizer, slots=2, chunk=chunk, asynchronous=True)
        caplog.clear()
        with jax.log_compiles():
            if compiled_ahead:
                engine.compile(Program("decode", cache=kv.bucket(0, 160)))
            run(engine, [request])
        compiled = re.findall(r"Compiling (?:jit\()?(\w+)", caplog.text)
        assert compiled.count("decode") == 1, compiled
