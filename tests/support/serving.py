"""Shared by the tests of the server and of the page: an engine with scripted answers, and a real HTTP server."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import uvicorn

from nanochat_jax import checkpoint
from nanochat_jax.config import REPOSITORY, ChatWeb, GPTConfig
from nanochat_jax.engine.request import Event
from nanochat_jax.serve.app import create_app
from nanochat_jax.serve.connection import server_config

TEXT = [
    "Why is the sky blue? Because air scatters blue light more than red light.",
    "What is 37 times 12? It is 444. How many r are in strawberry? There are three.",
    "The sea is calm tonight, the tide is full, the moon lies fair upon the straits. Grüße, 你好, 🌍!",
] * 20

SUGGESTIONS = ["Why is the sky blue?", "What is 37 times 12?"]


class ScriptedEngine:
    """The engine's interface for servers, with scripted answers.

    `script(request)` returns the token ids of the answer, which are generated one per step. A step takes `delay`
    seconds, in place of the model's work.
    """

    def __init__(self, tokenizer, script, slots: int = 2, context: int = 256, delay: float = 0.0):
        self.tokenizer, self.script, self.slots, self.delay = tokenizer, script, slots, delay
        self.model_cfg = GPTConfig(sequence_len=context, vocab_size=tokenizer.vocab_size)
        self.requests, self.cancelled = {}, []
        self._waiting, self._left = [], {}

    cached, replaced = 0, ()

    def missing(self, requests) -> list:
        """Nothing is compiled."""
        return []

    def check(self, request) -> None:
        """Accepts any request."""

    def add(self, request) -> int:
        id = len(self.requests)
        self.requests[id] = request
        self._waiting.append(id)
        return id

    def cancel(self, id: int, sample: int | None = None) -> None:
        self.cancelled.append(id)
        self._left.pop(id, None)
        self._waiting = [other for other in self._waiting if other != id]

    def step(self) -> list[Event]:
        time.sleep(self.delay)
        while self._waiting and len(self._left) < self.slots:
            id = self._waiting.pop(0)
            self._left[id] = list(self.script(self.requests[id]))[: self.requests[id].max_tokens]
        return [self._next(id) for id in list(self._left)]

    def _next(self, id: int) -> Event:
        token = self._left[id].pop(0)
        stop = token == self.tokenizer.special("<|assistant_end|>")
        reason = "stop" if stop else None if self._left[id] else "length"
        if reason:
            del self._left[id]
        return Event(id, 0, [token], [1], [0.0], reason)


def answer_ids(tokenizer, *parts) -> list[int]:
    """Token ids of an answer, up to and including <|assistant_end|>.

    A part is a text, ("python", expression) or ("python_output", result).
    """
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p[0], "text": p[1]} for p in parts]
    conversation = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]}
    ids, _ = tokenizer.render_conversation(conversation)
    return ids[ids.index(tokenizer.special("<|assistant_start|>")) + 1 :]


def until(condition, seconds: float = 10.0) -> None:
    """Waits until `condition()` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.02)


def save_model(base: Path, params, model_cfg: GPTConfig, tokenizer, stage: str = "sft", mixture: dict | None = None):
    """Saves a checkpoint with the tag tiny, trained on the tasks in `mixture`. `base` must be $NANOCHAT_BASE_DIR."""
    tokenizer.save(base / "tokenizer")
    saver = checkpoint.Saver(checkpoint.run_dir(stage, "tiny"), keep_last=1)
    meta = checkpoint.model_meta(model_cfg) | {"tokenizer": tokenizer.hash}
    if mixture:
        meta["config"] = {"mixture": mixture}
    saver.save(7, params, {"count": np.zeros(1)}, {}, meta)
    saver.wait_all()


@contextlib.contextmanager
def command(base: Path, *flags: str, run: tuple[str, str] = ("-m", "scripts.chat_web")):
    """Runs scripts.chat_web in its own process, on a free port; yields its `url` and the `process`."""
    line = [sys.executable, *run, "--port=0", "--device_type=cpu", "--compute_dtype=float32", *flags]
    env = os.environ | {"NANOCHAT_BASE_DIR": str(base)}
    process = subprocess.Popen(line, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = next((word for line in process.stdout for word in line.split() if word.startswith("http")), None)
        assert url, process.stderr.read()
        yield SimpleNamespace(url=url, process=process)
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def serving(
    engine, cfg: ChatWeb | None = None, send_buffer: int = 0, port: int = 0, warmups=(), device="cpu",
    suggestions=SUGGESTIONS,
):  # fmt: skip
    """A real server on a free port of the loopback interface; yields its `url`, its `port` and a function `stop`.

    `engine` is one engine or a list. `send_buffer` limits the bytes that the system buffers for a client that does not
    read; the default is megabytes. `warmups`, `device` and `suggestions`: see `create_app`.
    """
    engines = engine if isinstance(engine, list) else [engine]
    app = create_app(engines, cfg or ChatWeb(), "nanochat-test-sft", device, warmups, suggestions)
    listener = socket.create_server(("127.0.0.1", port))
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    cfg = cfg or ChatWeb()
    server_cfg = server_config(app, cfg.keep_alive, cfg.slots + cfg.max_waiting)
    server_cfg.timeout_graceful_shutdown = 1
    server = uvicorn.Server(server_cfg)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()

    def stop() -> None:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not stop"

    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server does not start"
            time.sleep(0.01)
        port = listener.getsockname()[1]
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, stop=stop)
    finally:
        stop()
        listener.close()
