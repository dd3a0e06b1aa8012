"""Connections that wait: idle ones are kept for the proxies in front of the server, slow ones are closed."""

import contextlib
import json
import socket
import time

import httpx
import pytest
from serving import ScriptedEngine, answer_ids, serving, until

from nanochat_jax.config import ChatWeb
from nanochat_jax.serve import connection, middleware

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def response(client: socket.socket) -> bytes:
    """Reads one response with a Content-Length. Returns b"" if the server has closed the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while b"\r\n\r\n" not in received:
            if not (piece := client.recv(65536)):
                return received
            received += piece
        head, _, body = received.partition(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        while len(body) < length:
            body += client.recv(65536)
        return head + b"\r\n\r\n" + body
    return b""


def seconds_until_closed(client: socket.socket) -> float:
    start = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        while client.recv(65536):
            pass
    client.close()
    return time.monotonic() - start


def test_an_idle_connection_is_kept_as_long_as_the_flag_says(engine):
    with serving(engine) as server, connect(server) as client:
        client.sendall(HEALTH)
        assert b"keep-alive: timeout=75" in response(client).lower()  # longer than nginx (60 s) and AWS (60 s)
        time.sleep(6)  # uvicorn's default is 5
        client.sendall(HEALTH)
        assert response(client).startswith(b"HTTP/1.1 200")
    with serving(engine, ChatWeb(keep_alive=1)) as server, connect(server) as client:
        for _ in range(2):
            client.sendall(HEALTH)
            assert b"keep-alive: timeout=1\r\n" in response(client).lower()
        assert 0.5 < seconds_until_closed(client) < 5


SLOW = {
    "nothing": b"",
    "half a head": b"GET /health HTTP/1.1\r\nHost: loc",
    "half a head after a request": HEALTH + b"GET /health HT",
    "half a body": POST + b"Content-Length: 100\r\n\r\n{",
    "half a body that nobody reads": b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
    "half a chunked body": POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(connection, "GRACE_SECONDS", 0.5)
    for module in (middleware, connection):
        monkeypatch.setattr(module, "BODY_SECONDS", 0.5)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("sent", SLOW)
def test_clients_that_send_nothing_or_too_little_are_closed(engine, sent):
    """Also if they send a byte now and then."""
    with serving(engine) as server:
        clients = [connect(server) for _ in range(170)]
        for client in clients:
            client.sendall(SLOW[sent])
        dripping = connect(server)
        dripping.sendall(SLOW[sent])
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < start + 15:
                dripping.sendall(b"x" if sent != "nothing" else b"G")
                dripping.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    if not dripping.recv(65536):
                        break
        assert time.monotonic() - start < 10
        for client in clients:
            seconds_until_closed(client)
        assert time.monotonic() - start < 15
        dripping.close()
        answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        assert answer.json()["choices"][0]["message"]["content"] == "well and good"


@pytest.mark.usefixtures("impatient")
def test_half_a_request_is_told_why(engine):
    with serving(engine) as server:
        for sent in ("half a head", "half a body"):
            with connect(server) as client:
                client.sendall(SLOW[sent])
                answer = response(client)
                assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer.lower()


@pytest.mark.usefixtures("impatient")
def test_a_body_after_the_answer_ends_in_an_idle_connection(engine):
    """A client may finish its body after it has its answer. The connection then waits for the next request."""
    with serving(engine, ChatWeb(keep_alive=1.5)) as server, connect(server) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nx")
        assert response(client).startswith(b"HTTP/1.1 200")
        client.sendall(b"yz")
        time.sleep(1)
        client.sendall(HEALTH)
        assert response(client).startswith(b"HTTP/1.1 200")
        assert seconds_until_closed(client) < 5


@pytest.mark.usefixtures("impatient")
def test_a_long_answer_is_not_cut(tokenizer):
    text = "and so on " * 6
    engine = ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, text), delay=0.08)
    body = {"messages": [{"role": "user", "content": "go"}], "stream": True}
    with serving(engine, ChatWeb(keep_alive=1)) as server:
        start = time.monotonic()
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=30) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert time.monotonic() - start > 2 and lines[-1] == "data: [DONE]"
        pieces = [json.loads(line[6:])["choices"][0]["delta"].get("content") or "" for line in lines[:-1]]
        assert "".join(pieces) == text


def test_further_connections_take_the_place_of_those_that_wait(tokenizer, monkeypatch):
    monkeypatch.setattr(connection, "SPARE_CONNECTIONS", 6)
    endless = ScriptedEngine(tokenizer, lambda _: tokenizer.encode("and so on ") * 500, context=100_000, delay=0.01)
    body = {"messages": [{"role": "user", "content": "go"}], "stream": True, "max_tokens": 4000}
    with (
        serving(endless, ChatWeb(slots=2, max_waiting=2)) as server,
        httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=30) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        waiting = [connect(server) for _ in range(30)]  # 10 connections are allowed, and one of them has an answer
        for _ in range(3):
            assert httpx.get(f"{server.url}/health").status_code == 200
        closed = 0
        for client in waiting:
            client.settimeout(0.2)
            with contextlib.suppress(TimeoutError), client:
                try:
                    closed += client.recv(1) == b""
                except ConnectionResetError:
                    closed += 1
        assert 21 <= closed <= 24
        assert all(next(lines) is not None for _ in range(20))  # the answer goes on


def test_a_server_full_of_answers_says_so(tokenizer, monkeypatch):
    monkeypatch.setattr(connection, "SPARE_CONNECTIONS", -1)
    monkeypatch.setattr(connection, "MIN_CONNECTIONS", 1)
    endless = ScriptedEngine(tokenizer, lambda _: tokenizer.encode("and so on ") * 500, context=100_000, delay=0.01)
    body = {"messages": [{"role": "user", "content": "go"}], "stream": True, "max_tokens": 4000}
    url = "/v1/chat/completions"
    with (
        serving(endless, ChatWeb(slots=2, max_waiting=1)) as server,
        httpx.stream("POST", server.url + url, json=body, timeout=30),
    ):
        with httpx.stream("POST", server.url + url, json=body, timeout=30):
            full = httpx.get(f"{server.url}/health")
            assert full.status_code == 503 and full.headers["retry-after"]
        until(lambda: httpx.get(f"{server.url}/health").status_code == 200)


def test_only_the_names_of_this_machine_are_served(engine):
    """A page of another site may let its name point to this machine (DNS rebinding), but the browser sends the name."""
    good = ["localhost", "LOCALHOST:8000", "localhost.:1", "127.0.0.1", "127.0.0.2:8000", "[::1]", "[::1]:8000"]
    bad = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "x@y:1"]

    def status(server, host: str, path: str = "/v1/models", **headers) -> int:
        return httpx.get(server.url + path, headers={"Host": host, **headers}).status_code

    with serving(engine) as server:
        for path in ("/", "/health", "/v1/models", "/metrics"):
            assert [status(server, host, path) for host in good] == [200] * len(good)
            assert [status(server, host, path) for host in bad] == [403] * len(bad)
        refused = httpx.post(
            f"{server.url}/v1/chat/completions",
            headers={"Host": "evil.example"},
            json={"messages": [{"role": "user", "content": "x"}]},
        ).json()["error"]
        assert "'evil.example'" in refused["message"] and "--allowed_hosts" in refused["message"]
        with connect(server) as client:  # HTTP/1.0, as some health checks send it
            client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert response(client).startswith(b"HTTP/1.1 200")
    for cfg, allowed, others in (
        (ChatWeb(allowed_hosts="chat.example, other.example"), ["chat.example", "other.example:443"], "evil.example"),
        (ChatWeb(allowed_hosts="*"), bad, None),
        (ChatWeb(api_key="secret"), bad, None),  # the page of another site has no key
        (ChatWeb(host="0.0.0.0"), bad, None),  # other machines may know this one by any name
        (ChatWeb(host="0.0.0.0", allowed_hosts="chat.example"), ["chat.example"], "evil.example"),
    ):
        with serving(engine, cfg) as server:
            for host in [*allowed, "localhost:8000", "127.0.0.1"]:
                assert status(server, host, Authorization="Bearer secret") == 200, (cfg, host)
            assert others is None or status(server, others) == 403


def test_no_answer_is_given_to_a_page_of_another_site(engine):
    """Browsers let any page send such requests without asking; they must have no effect."""
    with serving(engine) as server:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None):
            for path in ("/chat/completions", "/v1/chat/completions", "/v1/completions"):
                headers = {"Origin": "http://evil.example"} | ({"Content-Type": kind} if kind else {})
                body = json.dumps({"messages": [{"role": "user", "content": "x"}], "prompt": "x"}).encode()
                assert httpx.post(server.url + path, content=body, headers=headers).status_code == 400
    assert not engine.requests
