"""Two minutes of 200 clients, half of which leave in the middle of an answer. LOAD_SECONDS changes the duration."""

import asyncio
import json
import os
import random
import time
from collections import Counter

import httpx
import pytest
import tiny
from serving import TEXT, command, save_model, until

from nanochat_jax.config import GPTConfig
from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer

CLIENTS = 200
SECONDS = float(os.environ.get("LOAD_SECONDS", 120))
GROWTH = 24 << 20  # bytes that are not a leak: connection buffers, the allocator's arenas


async def ask(port: int, prompt: str, leave_after: int = 0) -> str | int | None:
    """The text of a streamed completion; None if the client left after `leave_after` events; the status if refused."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        fields = {"prompt": prompt, "max_tokens": 60, "temperature": 1, "top_k": 0, "seed": 7, "stream": True}
        body = json.dumps(fields).encode()
        headers = "Host: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"POST /v1/completions HTTP/1.1\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status = int((await reader.readline()).split()[1])
        if status != 200:
            return status
        text, events = "", 0
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                return text
            text += json.loads(line[6:])["choices"][0]["text"]
            events += 1
            if leave_after and events >= leave_after:
                return None
        raise AssertionError(f"the answer broke off: {text!r}")
    finally:
        writer.transport.abort()


async def client(port: int, expected: dict[str, str], number: int, until: float, ends: Counter) -> None:
    rng = random.Random(number)
    while time.monotonic() < until:
        prompt = rng.choice(list(expected))
        leaves = rng.randint(1, 4) if rng.random() < 0.5 else 0
        answer = await ask(port, prompt, leaves)
        if isinstance(answer, int):
            assert answer == 429
            await asyncio.sleep(rng.random())
        elif answer is not None:
            assert answer == expected[prompt], f"{prompt}: {answer!r}"
        ends[answer if isinstance(answer, int) else "left" if answer is None else "whole"] += 1


@pytest.mark.slow
def test_two_hundred_clients_half_of_whom_leave(own_base_dir):
    tokenizer = Tokenizer.train(iter(TEXT), 300)
    model_cfg = GPTConfig(2, 2, 2, 32, tokenizer.vocab_size, 128)
    params = tiny.random_params(model_cfg, 0.2)
    params["lm_head"] = params["lm_head"].at[model_cfg.vocab_size - len(SPECIAL_TOKENS) :].set(0)
    save_model(own_base_dir, params, model_cfg, tokenizer)

    with command(own_base_dir, "--slots=8") as server:

        def metric(name: str) -> float:
            lines = httpx.get(f"{server.url}/metrics").text.splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

        async def load(expected: dict[str, str]) -> tuple[Counter, list[float]]:
            ends, memory, port = Counter(), [], int(server.url.rpartition(":")[2])
            for prompt in [f"{word} and then" for word in ("The sea", "The moon", "Blue light", "37", "Air", "你好")]:
                expected[prompt] = await ask(port, prompt)
            clients = [client(port, expected, i, time.monotonic() + SECONDS, ends) for i in range(CLIENTS)]
            tasks = [asyncio.ensure_future(task) for task in clients]
            for _ in range(4):
                await asyncio.sleep(SECONDS / 4)
                memory.append(await asyncio.to_thread(metric, "process_resident_memory_bytes"))
            await asyncio.gather(*tasks)
            return ends, memory

        ends, memory = asyncio.run(load({}))
        print(dict(ends), [f"{used / 2**20:.0f} MiB" for used in memory])
        assert ends["whole"] > CLIENTS and ends["left"] > CLIENTS
        until(lambda: metric("nanochat_requests_running") == metric("nanochat_requests_waiting") == 0)
        assert memory[-1] - memory[0] < GROWTH
        assert httpx.get(f"{server.url}/health").json()["available_workers"] == 8
        server.process.terminate()
        _, errors = server.process.communicate(timeout=20)
        assert (server.process.returncode, errors) == (0, "")
