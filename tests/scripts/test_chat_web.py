"""The command that starts the server: which settings it refuses, and how it ends."""

import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
from serving import TEXT, ScriptedEngine, command, save_model, serving

from nanochat_jax.config import REPOSITORY, GPTConfig
from nanochat_jax.model import gpt
from nanochat_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter(TEXT), 300)


def run_chat_web(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.chat_web", *args]
    return subprocess.run(command, cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True, timeout=60)


def test_a_taken_port_is_one_line(tokenizer):
    with serving(ScriptedEngine(tokenizer, lambda _: [])) as server:
        port = server.url.rpartition(":")[2]
        done = run_chat_web(f"--port={port}")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"--port={port}" in done.stderr and "in use" in done.stderr


def test_a_missing_model_and_wrong_flags_are_one_line():
    for flag, word in (
        ("--port=0", "no sft checkpoint"),
        ("--port=99999", "--port"),
        ("--host=256.1", "--host"),
        ("--host=192.0.2.1", "--host=192.0.2.1: not an address of this machine"),
        ("--temperature=nan", "--temperature"),
        ("--slots=0", "--slots"),
    ):
        done = run_chat_web(flag)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and word in done.stderr, done.stderr


def test_the_command_serves_a_checkpoint_and_ends_on_ctrl_c(tokenizer, own_base_dir):
    tiny_model(tokenizer, own_base_dir, sequence_len=128, mixture={"spellingbee": 0, "identity": 9, "customjson:x": 0})
    with command(own_base_dir, "--slots=1") as server:
        body = {"messages": [{"role": "user", "content": "a private remark"}], "max_tokens": 5}
        response = httpx.post(f"{server.url}/chat/completions", json=body, timeout=30)
        assert response.status_code == 200 and response.text.endswith('data: {"done": true}\n\n')
        health = httpx.get(f"{server.url}/health").json()
        assert health["model"] == "nanochat-tiny-sft"
        # The page suggests only what the tasks of the model's mixture ask.
        assert health["suggestions"] == [
            "How many e are in element?", "Who are you?", "How many r are in character?", "What can you do?",
        ]  # fmt: skip
        start = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        rest, errors = server.process.communicate(timeout=20)
        assert time.monotonic() - start < 10
        assert server.process.returncode == 130 and errors == "stopped\n" and "private" not in rest


def test_sigterm_lets_nobody_in_and_answers_under_way_end(tokenizer, own_base_dir):
    tiny_model(tokenizer, own_base_dir, sequence_len=2048)
    with command(own_base_dir, "--slots=1", "--max_new_tokens=1500", "--temperature=1", "--top_k=0") as server:
        answers, begun = [], threading.Barrier(3)

        def ask(seed):
            body = {"prompt": "go", "max_tokens": 1500, "stream": True, "seed": seed}
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
                lines = response.iter_lines()
                begun.wait(30)
                answers.append(list(lines)[-2])

        threads = [threading.Thread(target=ask, args=[seed]) for seed in (1, 2)]  # one waits for the other's slot
        for thread in threads:
            thread.start()
        begun.wait(30)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        while True:  # no request is answered: the first may be disconnected, later ones are refused
            try:
                raise AssertionError(f"answered: {httpx.get(f'{server.url}/health')}")
            except httpx.ReadError:
                time.sleep(0.1)
            except httpx.ConnectError:
                break
        for thread in threads:
            thread.join(60)
        _, errors = server.process.communicate(timeout=20)
        assert (server.process.returncode, errors) == (0, "")
        assert answers == ["data: [DONE]"] * 2


def tiny_model(tokenizer, base, sequence_len: int, mixture: dict | None = None) -> None:
    model_cfg = GPTConfig(1, 1, 1, 16, tokenizer.vocab_size, sequence_len)
    params = gpt.init(model_cfg)
    never = [tokenizer.special("<|assistant_end|>"), tokenizer.bos]  # the tokens that would end an answer
    save_model(
        base, params | {"lm_head": params["lm_head"].at[np.array(never)].set(0)}, model_cfg, tokenizer, mixture=mixture
    )
