"""The command that starts the server: which settings it refuses, and how it ends."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import tiny
from serving import TEXT, ScriptedEngine, command, save_model, serving, until

from nanochat_jax.config import REPOSITORY, GPTConfig, UserError
from nanochat_jax.model import gpt
from nanochat_jax.tokenizer import Tokenizer
from scripts import chat_web


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


def test_two_servers_started_at_once_on_one_port(tokenizer, own_base_dir):
    """One of them serves. The others say in one line that the port is taken."""
    tiny_model(tokenizer, own_base_dir, sequence_len=128)
    port = tiny.free_address().rpartition(":")[2]
    line = [sys.executable, "-m", "scripts.chat_web", f"--port={port}", "--device_type=cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    starting = [subprocess.Popen(line, cwd=REPOSITORY, **pipes) for _ in range(3)]
    try:
        until(lambda: sum(process.poll() is not None for process in starting) == 2, seconds=60)
        for process in starting:
            if process.poll() is None:
                assert any(f"chat at http://127.0.0.1:{port} " in line for line in process.stdout)
                assert "context of 128 tokens, which is shorter than --max_new_tokens=512" in process.stdout.readline()
                assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=30).json()["ready"]
                continue
            out, errors = process.communicate()
            assert process.returncode == 2 and out == ""
            reason = f"--port={port} on 127.0.0.1: Address already in use; try another, like --port={int(port) + 1}"
            assert errors == f"error: {reason}\n"
    finally:
        for process in starting:
            process.kill()
            process.communicate()


def test_addresses_of_all_kinds():
    for host, shown in (("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("[::1]", "[::1]"), ("0.0.0.0", "localhost")):
        if ":" in host and not has_ipv6():
            continue
        with chat_web.bind(host, 0) as listener:
            address, port = listener.getsockname()[:2]
            assert chat_web.url(listener) == f"http://{shown}:{port}"
            with pytest.raises(UserError, match=f"--port={port} on .*in use; try another, like --port="):
                chat_web.bind(host, port)
            socket.create_connection((address, port)).close()
    # A name may have several addresses, not all of which are this machine's.
    with chat_web.bind("localhost", 0) as listener:
        assert listener.getsockname()[0] in ("127.0.0.1", "::1")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user who may not use the port")
def test_a_port_that_only_root_may_use_is_one_line():
    first = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if first.exists() and int(first.read_text()) <= 80:
        pytest.skip("every user may use all ports here")
    code = "import encodings.idna, os; from scripts import chat_web; os.setuid(65534); chat_web.bind('127.0.0.1', 80)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert "UserError: --port=80: only root may use the ports below 1024; use --port=8000" in done.stderr


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


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
    with command(own_base_dir, "--slots=1", "--max_new_tokens=300", "--temperature=1", "--top_k=0") as server:
        answers, begun = [], threading.Barrier(3)

        def ask(seed):
            body = {"prompt": "go", "max_tokens": 300, "stream": True, "seed": seed}
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


def test_a_closed_terminal_lets_an_answer_end(tokenizer, own_base_dir):
    tiny_model(tokenizer, own_base_dir, sequence_len=512)
    with command(own_base_dir, "--slots=1", "--temperature=1", "--top_k=0") as server:
        body = {"prompt": "go", "max_tokens": 100, "stream": True, "seed": 1}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.stderr.close()  # as if the terminal were gone: every write fails
            server.process.send_signal(signal.SIGHUP)
            assert list(lines)[-2] == "data: [DONE]"
        assert server.process.wait(20) == 128 + signal.SIGHUP


def test_nohup_keeps_a_server_running(tokenizer, own_base_dir):
    tiny_model(tokenizer, own_base_dir, sequence_len=128)
    code = "import runpy, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    code += "runpy.run_module('scripts.chat_web', run_name='__main__', alter_sys=True)"
    with command(own_base_dir, "--slots=1", run=("-c", code)) as server:
        server.process.send_signal(signal.SIGHUP)
        assert httpx.get(f"{server.url}/health", timeout=30).json()["ready"]
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 130


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]])
def test_signals_in_a_storm_of_output(tokenizer, own_base_dir, signals):
    """The handlers write through no buffered stream, which would fail in the middle of a line."""
    tiny_model(tokenizer, own_base_dir, sequence_len=128)
    with command(own_base_dir, "--log_chats", "--max_waiting=200") as server:
        port, printed, stop = int(server.url.rpartition(":")[2]), [], threading.Event()

        def send_junk():  # the main thread writes a warning for each
            while not stop.is_set():
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                    client.sendall(b"no request\r\n\r\n")
                    client.recv(1000)

        def ask():  # the engine's thread writes each conversation
            with contextlib.suppress(httpx.HTTPError), httpx.Client(timeout=30) as client:
                while not stop.is_set():
                    client.post(f"{server.url}/v1/completions", json={"prompt": "go", "max_tokens": 1})

        def read():
            for line in server.process.stderr:
                printed.append(line)

        threads = [threading.Thread(target=target) for target in [read, ask, ask, *[send_junk] * 4]]
        for thread in threads:
            thread.start()
        warnings = lambda: sum("Invalid HTTP" in line for line in printed)  # noqa: E731
        until(lambda: warnings() > 50 and any('"prompt"' in line for line in printed), seconds=100)
        for i in range(2000):
            if server.process.poll() is not None:
                break
            server.process.send_signal(signals[i % len(signals)])
            time.sleep(0.001)
        code = server.process.wait(30)
        stop.set()
        for thread in threads:
            thread.join(30)
        assert i > 5
        assert code in (0, 130) and (code == 0 or signal.SIGINT in signals)
        assert not [line for line in printed if "Traceback" in line or "Error" in line]


def tiny_model(tokenizer, base, sequence_len: int, mixture: dict | None = None) -> None:
    model_cfg = GPTConfig(1, 1, 1, 16, tokenizer.vocab_size, sequence_len)
    params = gpt.init(model_cfg)
    never = [tokenizer.special("<|assistant_end|>"), tokenizer.bos]  # the tokens that would end an answer
    save_model(
        base, params | {"lm_head": params["lm_head"].at[np.array(never)].set(0)}, model_cfg, tokenizer, mixture=mixture
    )
