"""Clients that misbehave, by mistake or on purpose: the server refuses what it must and keeps serving the others."""

import contextlib
import json
import os
import socket
import time

import httpx
import pytest
from serving import ScriptedEngine, answer_ids, serving, until

from nanochat_jax.config import ChatWeb

JSON = {"Content-Type": "application/json"}
PATHS = ("/chat/completions", "/v1/chat/completions")
HEADERS = "Host: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
QUESTION = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


@pytest.fixture
def endless(tokenizer):
    return ScriptedEngine(tokenizer, lambda _: tokenizer.encode("and so on ") * 500, context=100_000)


def post(server, path: str, body, headers: str = "", receive_buffer: int = 0) -> socket.socket:
    """A connection on which `body` has been posted; the response is not read."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(20)
    client.connect(("127.0.0.1", server.port))
    head = f"POST {path} HTTP/1.1\r\n{HEADERS}{headers}"
    client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return client


def read(client: socket.socket) -> bytes:
    """Reads until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(65536):
            received += piece
    client.close()
    return received


def answers(server) -> bool:
    """Whether nothing runs or waits, and the server answers a question."""
    stats = httpx.get(f"{server.url}/stats").json()
    text = httpx.post(f"{server.url}/v1/chat/completions", json=QUESTION | {"stream": False}).text
    return stats["busy_workers"] == stats["waiting"] == 0 and "well and good" in text


def test_what_is_no_request_is_400_and_the_server_goes_on(engine):
    bodies = [
        b"", b"{", b"null", b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"messages": ' * 10_000, b"\x00" * 100,
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', b'{"messages": NaN}', b'{"messages": [NaN]}',
        b'{"messages": {"role": "user", "content": "x"}}', b'{"messages": [{"role": ["user"], "content": "x"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "x"}], "top_k": -1e400}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 5000 + b"}",
    ]  # fmt: skip
    with serving(engine) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        for path in (*PATHS, "/v1/completions"):
            for body in bodies:
                body = body if "chat" in path else body.replace(b"messages", b"prompt")
                response = client.post(path, content=body, headers=JSON)
                assert response.status_code == 400, (path, body[:80], response.text)
                assert response.json()
            response = client.post(path, content=b'{"messages": "\xff"}', headers=JSON)
            assert "not JSON in UTF-8" in response.text
        for path in PATHS:
            for method in ("GET", "PUT", "DELETE"):
                assert client.request(method, path).status_code == 405
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
                refused = client.post(path, content=json.dumps(QUESTION), headers={"Content-Type": kind})
                assert refused.status_code == 400  # another site's page can send these without a preflight request
        assert client.get("/../../etc/passwd").status_code == client.get("/%00").status_code == 404
        assert answers(server)


def test_halves_of_characters_come_back_as_question_marks(engine):
    broken = '{"%s": "half \\ud83c, nul \\u0000", "echo": true, "user": "\\ud800", "model": %s}'
    with serving(engine) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        echoed = client.post("/v1/completions", content=broken % ("prompt", "null"), headers=JSON)
        assert echoed.status_code == 200 and "half \ufffd, nul \0" in echoed.json()["choices"][0]["text"]
        assert client.post("/v1/completions", content=broken % ("prompt", '"\\ud83c"'), headers=JSON).status_code == 404
        message = '{"messages": [{"role": "\\ud83c", "content": "x"}]}'
        for path in PATHS:
            assert client.post(path, content=message, headers=JSON).status_code == 400
        assert answers(server)


def test_a_huge_body_is_413_and_is_not_held(engine):
    with serving(engine) as server:
        for path in PATHS:
            client = post(server, path, b"x" * (3 << 20))
            assert b" 413 " in read(client).split(b"\r\n")[0]
            # Chunked, without an end and without a length.
            client = socket.create_connection(("127.0.0.1", server.port), timeout=20)
            client.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            with contextlib.suppress(ConnectionError):
                for _ in range(1000):
                    client.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
                pytest.fail("the server accepted 64 MiB")
            client.close()
        assert answers(server)


def test_a_body_that_never_comes_is_given_up(engine, monkeypatch):
    monkeypatch.setattr("nanochat_jax.serve.middleware.BODY_SECONDS", 0.3)
    with serving(engine) as server:
        for path in PATHS:
            client = post(server, path, b"", headers="Content-Length: 100\r\nX-")
            assert b" 408 " in read(client).split(b"\r\n")[0]
        assert answers(server)


def test_what_is_not_http_is_dropped(engine):
    with serving(engine) as server:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
        for junk in (
            b"\x16\x03\x01\x02\x00",
            b"GET\r\n\r\n",
            b"\x00" * 70_000,
            b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000,
        ):
            client = socket.create_connection(("127.0.0.1", server.port), timeout=20)
            with contextlib.suppress(ConnectionError):
                client.sendall(junk + b"\r\n\r\n")
            assert read(client)[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")
        assert answers(server)
        for client in idle:
            client.close()


@pytest.mark.parametrize("path", PATHS)
def test_a_slow_reader_holds_no_slot_and_gets_all_of_it(tokenizer, path):
    text = "and so on " * 250
    engine = ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, text), slots=1, context=100_000)
    with serving(engine, ChatWeb(max_new_tokens=4096), send_buffer=4096) as server:
        slow = post(server, path, QUESTION | {"max_tokens": 4000}, receive_buffer=4096)
        until(lambda: httpx.get(f"{server.url}/stats").json()["busy_workers"] == 1)
        until(lambda: httpx.get(f"{server.url}/stats").json()["busy_workers"] == 0)  # all is generated, little is read
        quick = httpx.post(f"{server.url}{path}", json=QUESTION | {"max_tokens": 5})
        assert quick.status_code == 200
        received = b""
        while piece := slow.recv(512):  # slowly
            received += piece
            if len(received) < 20_000:
                time.sleep(0.002)
        lines = [json.loads(line[6:]) for line in received.decode().splitlines() if line.startswith("data: {")]
        pieces = [line.get("token") or line.get("choices", [{}])[0].get("delta", {}).get("content") for line in lines]
        assert "".join(piece or "" for piece in pieces) == text


def test_a_client_that_never_reads_is_given_up(endless, monkeypatch):
    monkeypatch.setattr("nanochat_jax.serve.responses.READ_GRACE", 0.3)
    with serving(endless, ChatWeb(max_new_tokens=4096, timeout=0.5), send_buffer=4096) as server:
        before = len(os.listdir("/proc/self/fd"))
        clients = [post(server, path, QUESTION | {"max_tokens": 4000}, receive_buffer=4096) for path in PATHS]
        until(lambda: httpx.get(f"{server.url}/stats").json()["busy_workers"] == 2)
        until(lambda: httpx.get(f"{server.url}/stats").json()["busy_workers"] == 0)
        for client in clients:
            client.close()
        until(lambda: len(os.listdir("/proc/self/fd")) <= before)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions"])
def test_who_leaves_is_noticed_at_once(endless, path, stream):
    """Both while the answer is generated and while it waits for a slot, streamed or not."""
    endless.delay, endless.slots = 0.02, 1
    with serving(endless, ChatWeb(max_new_tokens=4096)) as server:
        stats = lambda: httpx.get(f"{server.url}/stats").json()  # noqa: E731
        clients = [post(server, path, QUESTION | {"stream": stream, "max_tokens": 4000}) for _ in range(3)]
        until(lambda: (stats()["busy_workers"], stats()["waiting"]) == (1, 2))
        clients[1].close()
        until(lambda: stats()["waiting"] == 1, seconds=2)
        clients[0].close()
        clients[2].shutdown(socket.SHUT_RDWR)
        until(lambda: (stats()["busy_workers"], stats()["waiting"]) == (0, 0), seconds=2)
        assert len(endless.cancelled) == 3


def test_a_prompt_longer_than_the_context_is_refused(engine):
    long = [{"role": "user", "content": "word " * 500}]
    with serving(engine) as server, httpx.Client(base_url=server.url) as client:
        for path, reason in (("/chat/completions", "too long"), ("/v1/chat/completions", "context_length_exceeded")):
            refused = client.post(path, json={"messages": long})
            assert refused.status_code == 400 and reason in refused.text
        assert answers(server)
    assert len(engine.requests) == 1
