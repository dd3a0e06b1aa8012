"""A request that needs a program which is not compiled yet waits for it, while running answers go on."""

import dataclasses
import itertools
import logging
import re
import threading
import time

import httpx
import jax
import pytest
import tiny
from serving import serving, until

from nanochat_jax.config import ChatWeb, GPTConfig
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import Request
from nanochat_jax.tokenizer import SPECIAL_TOKENS

SLOW = 4.0  # seconds that compiling takes at least: far more than a busy machine delays an answer


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random weights, large enough for varied text, and their GPTConfig. No answer ends before its maximum length."""
    model_cfg = GPTConfig(2, 2, 2, 32, tokenizer.vocab_size, 256)
    params = tiny.random_params(model_cfg, 0.2)
    return params | {"lm_head": params["lm_head"].at[model_cfg.vocab_size - len(SPECIAL_TOKENS) :].set(0)}, model_cfg


ASKS = {
    "greedy": {"prompt": "The sea", "temperature": 0, "max_tokens": 9},
    "top-p": {"prompt": "The sea", "temperature": 1, "top_k": 0, "top_p": 0.9, "max_tokens": 9},
    "logprobs": {"prompt": "The sea", "logprobs": 3, "max_tokens": 9},
    "scores": {"prompt": "The sea is calm", "echo": True, "logprobs": 3, "max_tokens": 0},
    "a longer prompt": {"prompt": "The sea " * 20, "max_tokens": 9},
}


class Stream(threading.Thread):
    """Reads long answers one after the other until `done` is set, and measures the gaps between their pieces."""

    def __init__(self, url: str):
        super().__init__()
        self.url, self.gaps, self.done = url, [], threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            body = {"prompt": "go", "max_tokens": 120, "stream": True, "seed": 1}
            with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=120) as response:
                last = None
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        now = time.monotonic()
                        self.gaps += [now - last] if last else []
                        last = now


def test_running_answers_go_on_while_a_program_is_compiled(tokenizer, model, caplog, monkeypatch):
    engine = Engine(*model, tokenizer, slots=2, chunk=1)
    next(engine.warmup(0.8, 50))  # as the command does: what a short prompt with the server's settings needs
    compile, step = engine.compile, engine.step
    compiled, slept_for = [], set()

    def slow_compile(program):
        if len(answers) not in slept_for:  # once for each request
            slept_for.add(len(answers))
            time.sleep(SLOW)
        compiled.append(program)
        compile(program)

    def slow_step():
        time.sleep(0.02)  # so that an answer lasts for seconds
        return step()

    answers = {}
    monkeypatch.setattr(engine, "compile", slow_compile)
    monkeypatch.setattr(engine, "step", slow_step)
    caplog.set_level(logging.WARNING)
    with serving(engine, ChatWeb(temperature=0.8, top_k=50)) as server:
        stream = Stream(server.url)
        jax.config.update("jax_log_compiles", True)  # in every thread
        try:
            stream.start()
            until(lambda: len(stream.gaps) > 5, seconds=60)
            stream.gaps.clear()
            for name, ask in ASKS.items():
                before, start = len(compiled), time.monotonic()
                answer = httpx.post(f"{server.url}/v1/completions", json=ask | {"seed": 3}, timeout=120)
                assert answer.status_code == 200, answer.text
                answers[name] = answer.json()["choices"][0]
                waited = time.monotonic() - start
                # A program with top-k also serves greedy requests. The one that is compiled for top-p serves all.
                if name not in ("greedy", "logprobs"):
                    assert len(compiled) > before and waited > SLOW, (name, waited)
        finally:
            stream.done.set()
            jax.config.update("jax_log_compiles", False)
        stream.join(60)
    assert len(stream.gaps) > 50 and max(stream.gaps) < SLOW, max(stream.gaps)
    # The engine's thread compiled nothing but copies, which takes an instant.
    records = [record for record in caplog.records if record.threadName == "engine"]
    names = {name for r in records for name in re.findall(r"Compiling (?:jit\()?(\w+)", r.getMessage())}
    assert not names & {"prefill", "prefill_chunk", "insert_rows", "first_tokens", "decode"}, names
    # Compiled ahead or not, the answers are the same.
    plain = Engine(*model, tokenizer, slots=2, chunk=1)
    for name, ask in ASKS.items():
        if ask["max_tokens"]:
            ids = tokenizer.encode(ask["prompt"], "<|bos|>")
            settings = {"temperature": ask.get("temperature", 0.8), "top_k": ask.get("top_k", 50)}
            request = Request(ids, 9, seed=3, top_p=ask.get("top_p", 1.0), **settings)
            [[sample]] = plain.run([request])
            assert answers[name]["text"] == tokenizer.decode(sample.content), name


def test_every_program_of_the_warm_up_serves_what_it_promises(tokenizer, model):
    """After the warm-up, no request with one prompt token or a full context, and with any settings, lacks a program."""
    params, model_cfg = model
    for slots, context in itertools.product((1, 2, 4, 64), (20, 96, 256, 2048)):
        cfg = dataclasses.replace(model_cfg, sequence_len=context)
        engine = Engine(params, cfg, tokenizer, slots=slots, chunk=8)
        engine._runner.compile = lambda program, engine=engine: engine._runner._compiled.update({program: None})
        sizes = list(engine.warmup(0.8, 50))
        assert sizes == sorted(sizes) and sizes[-1] == context
        for n in {1, 20, context // 3, context - 1}:
            for settings in ({}, {"temperature": 0.0}, {"top_k": 7}, {"top_p": 0.5}, {"top_logprobs": 2}):
                assert not engine.missing([Request([65] * n, **settings)]), (slots, context, n, settings)
        assert {program.name for program in engine.missing([Request([65] * 10, score=True)])} == {"prefill"}


def test_what_was_replaced_is_compiled_when_there_is_time(tokenizer, model):
    engine = Engine(*model, tokenizer, slots=1, chunk=8)
    with serving(engine, warmups=[engine.warmup(0.8, 50)]) as server:
        until(lambda: not httpx.get(f"{server.url}/stats").json()["warming"], seconds=120)
        assert not engine.replaced
        body = {"prompt": "The sea", "temperature": 0, "max_tokens": 9}
        first = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
        until(lambda: not engine.replaced, seconds=60)
        again = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
        assert again == first and not engine.replaced


def test_a_program_that_cannot_be_compiled_ends_nothing_else(tokenizer, model, caplog, monkeypatch):
    engine = Engine(*model, tokenizer, slots=2, chunk=1)
    next(engine.warmup(0.8, 50))
    compile, step = engine.compile, engine.step

    def fail(program):
        if program.score:
            raise MemoryError("out of memory")
        compile(program)

    def slow_step():
        time.sleep(0.02)  # so that an answer lasts for seconds
        return step()

    monkeypatch.setattr(engine, "compile", fail)
    monkeypatch.setattr(engine, "step", slow_step)
    with serving(engine, ChatWeb(temperature=0.8, top_k=50)) as server:
        stream = Stream(server.url)
        stream.start()
        try:
            until(lambda: len(stream.gaps) > 5, seconds=60)
            answer = httpx.post(f"{server.url}/v1/completions", json=ASKS["scores"], timeout=60)
            assert answer.status_code == 503 and "not compiled" in answer.json()["error"]["message"], answer.text
            before = len(stream.gaps)
            until(lambda: len(stream.gaps) > before + 5, seconds=60)
        finally:
            stream.done.set()
            stream.join(60)
        body = {"prompt": "The sea", "max_tokens": 9}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    assert "prefill was not compiled: out of memory" in caplog.text
