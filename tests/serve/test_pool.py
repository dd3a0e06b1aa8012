"""Several engines behind one server, and the warm-up of each while the server is idle."""

import json
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import jax
import pytest
import tiny
from serving import TEXT, ScriptedEngine, answer_ids, command, save_model, serving, until

from nanochat_jax.config import ChatWeb, GPTConfig
from nanochat_jax.engine.engine import Engine


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random weights, large enough for varied text, and their GPTConfig."""
    model_cfg = GPTConfig(2, 2, 2, 32, tokenizer.vocab_size, 192)
    return tiny.random_params(model_cfg, 0.2), model_cfg


def ask(server, text: str = "hi", **fields) -> list[dict]:
    """The events of an answer from the page's endpoint."""
    body = {"messages": [{"role": "user", "content": text}], **fields}
    response = httpx.post(f"{server.url}/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return [json.loads(block[6:]) for block in response.text.split("\n\n") if block.startswith("data: ")]


def gpus(events: list[dict]) -> set[int]:
    return {event["gpu"] for event in events if "token" in event}


def test_requests_go_where_there_is_room(tokenizer):
    engines = [ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, "a" * 40), slots=1) for _ in range(2)]
    with serving(engines, ChatWeb(max_waiting=2)) as server, ThreadPoolExecutor(5) as clients:
        assert gpus(ask(server)) == gpus(ask(server)) == {0}  # a single chat stays where its earlier turns are cached
        for engine in engines:
            engine.delay = 0.25  # so that no answer is complete before all four have arrived, also on a busy machine
        answers = [clients.submit(ask, server) for _ in range(4)]
        until(lambda: httpx.get(f"{server.url}/stats").json()["waiting"] == 2)
        stats = httpx.get(f"{server.url}/stats").json()
        assert (stats["total_workers"], stats["busy_workers"], stats["available_workers"]) == (2, 2, 0)
        assert [worker["gpu_id"] for worker in stats["workers"]] == [0, 1]
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "hi"})
        assert refused.status_code == 429 and refused.headers["retry-after"]
        for engine in engines:
            engine.delay = 0.0
        assert sorted(gpus(answer.result()).pop() for answer in answers) == [0, 0, 1, 1]
        assert httpx.get(f"{server.url}/health").json()["devices"] == "2 cpu"


def test_one_that_fails_takes_nobody_with_it(tokenizer):
    def broken(request):
        raise RuntimeError("out of memory")

    engines = [ScriptedEngine(tokenizer, script) for script in (broken, lambda _: answer_ids(tokenizer, "fine"))]
    with serving(engines) as server:
        assert "stopped working" in ask(server)[0]["error"]
        assert gpus(ask(server)) == {1}
        health, stats = (httpx.get(f"{server.url}/{path}").json() for path in ("health", "stats"))
        assert health["ready"] and (health["devices"], health["available_workers"]) == ("1 cpu", 2)
        assert [worker["gpu_id"] for worker in stats["workers"]] == [1, 1]


def test_warmup_that_fails_ends_nothing_else(tokenizer, caplog):
    def warmup():
        yield 32
        raise MemoryError("out of memory")

    with serving(ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, "fine")), warmups=[warmup()]) as server:
        until(lambda: not httpx.get(f"{server.url}/stats").json()["warming"])
        assert ask(server)[-1] == {"done": True}
    assert "warm-up stopped: out of memory" in caplog.text


def test_compiles_while_nobody_asks_and_lets_requests_go_on(tokenizer):
    engine, done = ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, "fine")), []
    go_on = threading.Semaphore(1)

    def warmup():
        for size in (32, 64, 128):
            go_on.acquire()
            done.append((size, len(engine.requests)))
            yield size

    with serving(engine, warmups=[warmup()]) as server:
        until(lambda: done)
        assert ask(server)[-1] == {"done": True}  # although a program is being compiled
        assert httpx.get(f"{server.url}/stats").json()["warming"]
        engine.delay = 0.5  # long enough for a slow machine to look while the answer is under way
        with ThreadPoolExecutor(1) as clients:
            answer = clients.submit(ask, server)
            until(lambda: httpx.get(f"{server.url}/stats").json()["busy_workers"] == 1)
            go_on.release()
            assert answer.result()[-1] == {"done": True}
            assert len(done) == 2  # the next program was not begun while there was work
        go_on.release()
        until(lambda: not httpx.get(f"{server.url}/stats").json()["warming"])
    assert [size for size, _ in done] == [32, 64, 128]


def test_a_warmed_engine_compiles_no_more_than_copies(tokenizer, model, caplog):
    params, model_cfg = model
    engine = Engine(params, model_cfg, tokenizer, slots=4, chunk=8)
    sizes = list(engine.warmup(0.8, 50))
    assert sizes == sorted(sizes) and set(sizes) == {32, 64, 128, 192} and not engine.busy
    with serving(engine) as server:
        jax.config.update("jax_log_compiles", True)  # in every thread
        history = []
        for turn in range(3):
            history.append({"role": "user", "content": TEXT[turn][:40]})
            body = {"messages": history, "max_tokens": 20, "seed": turn}
            reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
            history.append(reply["choices"][0]["message"])
        for length in (20, 50, 100, 150):  # prompts that share no prefix with earlier ones, prefilled together
            body = {"prompt": [[length + i] * length for i in range(4)], "max_tokens": 2}
            assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        jax.config.update("jax_log_compiles", False)
        compiled = set(re.findall(r"Compiling (?:jit\()?(\w+)", caplog.text))
        assert not compiled - {"_resize", "copy_row"}  # which copy rows between buckets and compile in an instant
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] > reply["usage"]["prompt_tokens"] / 2
        metrics = httpx.get(f"{server.url}/metrics").text
    reused = next(line for line in metrics.splitlines() if line.startswith("nanochat_prompt_tokens_reused_total"))
    assert float(reused.split()[1]) >= reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_the_command_serves_on_every_device_and_ends_in_the_middle_of_compiling(
    tokenizer, model, own_base_dir, monkeypatch
):
    save_model(own_base_dir, *model, tokenizer)
    monkeypatch.setenv("XLA_FLAGS", tiny.xla_flags(2))
    with command(own_base_dir, "--num_gpus=2", "--slots=1", "--temperature=1") as server:
        with ThreadPoolExecutor(2) as clients:
            # While one device is busy, the other gets the next request; both give the same text.
            answers = list(clients.map(lambda _: ask(server, "The sea", seed=7, max_tokens=100), range(2)))
        assert gpus(answers[0]) | gpus(answers[1]) == {0, 1}
        first, second = ("".join(event.get("token", "") for event in answer) for answer in answers)
        assert first == second != ""
        assert len(httpx.get(f"{server.url}/stats").json()["workers"]) == 2
        server.process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        _, errors = server.process.communicate(timeout=60)
        assert (server.process.returncode, errors) == (0, "") and time.monotonic() - start < 30


IMPATIENT = """
import runpy
from nanochat_jax.serve.pool import Pool
Pool.stop.__defaults__ = (0.0,)
runpy.run_module("scripts.chat_web", run_name="__main__")
"""


@pytest.mark.parametrize(("sig", "end"), [(signal.SIGTERM, (0, "")), (signal.SIGINT, (130, "stopped\n"))])
def test_a_program_that_takes_long_to_compile_is_not_waited_for(tokenizer, model, own_base_dir, sig, end):
    save_model(own_base_dir, *model, tokenizer)
    with command(own_base_dir, run=("-c", IMPATIENT)) as server:
        time.sleep(0.2)
        server.process.send_signal(sig)
        _, errors = server.process.communicate(timeout=30)
        assert (server.process.returncode, errors) == end


def test_more_devices_than_there_are_is_one_line(tokenizer, model, own_base_dir):
    save_model(own_base_dir, *model, tokenizer)
    with (
        pytest.raises(AssertionError, match=r"--num_gpus=3: only 1 device"),
        command(own_base_dir, "-n", "3"),
    ):
        pass
