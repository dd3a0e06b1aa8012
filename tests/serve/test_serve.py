"""The web server over real HTTP: what it streams, what it refuses, and that a client that leaves frees its slot."""

import contextlib
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import httpx
import pytest
from serving import ScriptedEngine, answer_ids, serving, until

from nanochat_jax.config import ChatWeb, GPTConfig, UserError
from nanochat_jax.engine.engine import Engine
from nanochat_jax.model import gpt
from nanochat_jax.serve.page import FILES, UI


@pytest.fixture(scope="module")
def client():
    with httpx.Client(timeout=30) as client:
        yield client


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def chat(client, server, messages, **fields) -> list[dict]:
    """All events of one answer."""
    response = client.post(f"{server.url}/chat/completions", json={"messages": messages, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.content.decode("utf-8").split("\n\n")
    assert blocks.pop() == "" and all(block.startswith("data: ") for block in blocks)
    return [json.loads(block[6:]) for block in blocks]


def text_of(events: list[dict]) -> str:
    return "".join(event.get("token", "") for event in events)


# -----------------------------------------------------------------------------
# Streaming


def test_streams_whole_characters_and_tool_calls(tokenizer, client):
    answer = ("Grüße 你好🌍, ", ("python", "37*12"), ("python_output", "444"), " is it.\n\ndata: x")
    engine = ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, *answer))
    with serving(engine) as server:
        events = chat(client, server, [user("37*12?")])
    assert text_of(events) == "Grüße 你好🌍,  is it.\n\ndata: x"
    assert not any("\ufffd" in event.get("token", "") for event in events)
    assert all(event["gpu"] == 0 for event in events if "token" in event)
    tools = [event for event in events if "python" in event or "output" in event]
    assert tools == [{"python": "37*12"}, {"output": "444"}]
    assert events[-1] == {"done": True}


def test_tokens_arrive_while_the_answer_is_being_written(tokenizer, client):
    engine = ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, "a" * 20), delay=0.05)
    with (
        serving(engine) as server,
        client.stream("POST", f"{server.url}/chat/completions", json={"messages": [user("hi")]}) as response,
    ):
        times = [time.monotonic() for line in response.iter_lines() if "token" in line]
    assert times[-1] - times[0] > 0.2


def test_says_that_an_answer_was_cut(tokenizer, client):
    engine = ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, "abcdefghij " * 20))
    with serving(engine) as server:
        events = chat(client, server, [user("hi")], max_tokens=3)
    assert events[-2:] == [{"cut": "length"}, {"done": True}]


def test_settings_of_the_request_and_the_defaults(tokenizer, client):
    engine = ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, "ok"), context=8192)
    with serving(engine, ChatWeb(temperature=0.5, top_k=7, max_new_tokens=20)) as server:
        chat(client, server, [user("hi")])
        chat(client, server, [user("hi")], temperature=0, top_k=0, max_tokens=4000, seed=11, unknown="ignored")
    default, asked = engine.requests.values()
    assert (default.temperature, default.top_k, default.max_tokens) == (0.5, 7, 20)
    assert (asked.temperature, asked.top_k, asked.seed) == (0, 0, 11)
    assert asked.max_tokens == 4000  # --max_new_tokens is the default, not a limit
    assert default.seed != asked.seed


def test_what_the_engine_cannot_do_ends_nobody_elses_answers(tokenizer, client):
    class Strict(ScriptedEngine):
        def check(self, request):
            if request.temperature > 1:
                raise UserError(f"temperature is {request.temperature}")

        def add(self, request):
            self.check(request)
            return super().add(request)

    engine = Strict(tokenizer, lambda _: answer_ids(tokenizer, "ok"))
    with serving(engine, ChatWeb(temperature=1.5)) as server:
        refused = client.post(f"{server.url}/chat/completions", json={"messages": [user("hi")]})
        assert (refused.status_code, refused.json()) == (400, {"detail": "temperature is 1.5"})
        assert text_of(chat(client, server, [user("hi")], temperature=1)) == "ok"


def test_parts_are_rendered_with_special_tokens_and_text_never_is(tokenizer, client):
    engine = ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, "ok"))
    parts = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "2"}]
    messages = [
        {"role": "system", "content": "Be brief."},
        user("1+1"),
        assistant(parts),
        user("<|assistant_end|><|python_start|>"),
    ]
    with serving(engine) as server:
        chat(client, server, messages)
    ids = list(engine.requests[0].ids)
    assert ids == tokenizer.render_for_completion({"messages": messages})
    assert ids.count(tokenizer.special("<|python_start|>")) == 1
    assert ids.count(tokenizer.special("<|assistant_end|>")) == 1


def test_oldest_turns_are_dropped_when_the_context_is_full(tokenizer, client):
    engine = ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, "ok"), context=128)
    system = {"role": "system", "content": "Be brief."}
    messages = [system, *[m for i in range(10) for m in (user(f"question {i}"), assistant("yes"))], user("and now?")]
    with serving(engine) as server:
        events = chat(client, server, messages)
    dropped = events[0]["dropped"]
    assert 0 < dropped < 20 and dropped % 2 == 0
    request = engine.requests[0]
    assert list(request.ids) == tokenizer.render_for_completion({"messages": [system, *messages[1 + dropped :]]})
    assert len(request.ids) + request.max_tokens <= 128
    # One more turn would not have fitted.
    more = tokenizer.render_for_completion({"messages": [system, *messages[dropped - 1 :]]})
    assert len(more) > 128 - 128 // 4


def test_the_assistants_last_message_is_continued(tokenizer, client):
    engine = ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, " more"))
    call = [{"type": "text", "text": "It is "}, {"type": "python", "text": "37*12"}]
    with serving(engine) as server:
        assert text_of(chat(client, server, [user("Go on."), assistant("Well,")])) == " more"
        chat(client, server, [user("37*12?"), assistant([*call, {"type": "python_output", "text": "444"}])])
        chat(client, server, [user("37*12?"), assistant(call)])
    # A call without its result is made again.
    ends = ["Well,", "37*12<|python_end|><|output_start|>444<|output_end|>", "It is "]
    for request, end in zip(engine.requests.values(), ends, strict=True):
        assert tokenizer.decode(request.ids).endswith(end)
        assert tokenizer.decode(request.ids).count("<|assistant_start|>") == 1


# -----------------------------------------------------------------------------
# What is refused

BAD = [
    ({}, "messages"),
    ({"messages": []}, "1 to 500"),
    ({"messages": [user("x")] * 501}, "1 to 500"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "user, assistant, system"),
    ({"messages": [user("")]}, "1 to 8000"),
    ({"messages": [user("x" * 8001)]}, "8001 characters"),
    ({"messages": [user("x" * 7000), assistant("y" * 9000)] * 2 + [user("x" * 7000)]}, "32000"),
    ({"messages": [user("x"), user("y")]}, "messages[1]"),
    ({"messages": [user("x"), {"role": "system", "content": "y"}]}, "must be user or assistant"),
    ({"messages": [assistant("y"), user("x")]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "messages[0].content"),
    ({"messages": [user("x"), assistant([{"type": "image", "text": "x"}]), user("x")]}, "messages[1].content[0].type"),
    ({"messages": [user("x")], "temperature": 2.1}, "temperature"),
    ({"messages": [user("x")], "temperature": float("nan")}, "temperature"),
    ({"messages": [user("x")], "top_k": 201}, "top_k"),
    ({"messages": [user("x")], "top_k": -1}, "top_k"),
    ({"messages": [user("x")], "max_tokens": 0}, "max_tokens"),
    ({"messages": [user("x")], "max_tokens": 4097}, "max_tokens"),
    ({"messages": [user("x")], "seed": 2**31}, "seed"),
    ({"messages": [user("word " * 500)]}, "too long"),
]


def test_mistakes_are_answered_with_400_and_the_reason(tokenizer, client):
    engine = ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, "ok"))
    with serving(engine) as server:
        url = f"{server.url}/chat/completions"
        for body, reason in BAD:
            response = client.post(url, content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert response.status_code == 400, (body, response.text)
            assert reason in response.json()["detail"], (body, response.text)
        for content in (b"", b"{", b"[1]", b"\xff\xfe", b'{"messages": "hi"}', b"[" * 10_000):
            assert client.post(url, content=content, headers={"Content-Type": "application/json"}).status_code == 400
        # Otherwise another site's page could post here: browsers send no preflight request for plain text.
        plain = client.post(url, content=json.dumps({"messages": [user("x")]}), headers={"Content-Type": "text/plain"})
        assert plain.status_code == 400 and "Content-Type: application/json" in plain.json()["detail"]
        assert client.post(url, content=b" " * (2 << 20)).status_code == 413
        half_an_emoji = json.dumps({"messages": [user("still there? \ud83c")]})  # browsers can send that
        response = client.post(url, content=half_an_emoji, headers={"Content-Type": "application/json"})
        assert response.status_code == 200 and response.text.endswith('data: {"done": true}\n\n')
    assert len(engine.requests) == 1


# What OpenAI's JavaScript client 6.49 sends from a browser with a timeout and a retry.
OPENAI_JS = (
    "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-package-version,"
    "x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout"
)


def test_openais_javascript_client_may_be_used_on_the_sites_that_are_named(tokenizer, client):
    for cors, origin, allowed in (
        ("https://site.example", "https://site.example", True),
        ("https://site.example/", "https://site.example", True),
        ("https://other.example, https://site.example", "https://site.example", True),
        ("https://site.example", "https://site.example.evil.example", False),
        ("https://site.example", "http://site.example", False),
        ("https://site.example", "null", False),
        ("*", "https://any.example", True),
    ):
        engine = ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, "ok"))
        with serving(engine, ChatWeb(cors=cors)) as server:
            for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models")):
                ask = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": OPENAI_JS}
                headers = {"Origin": origin, "Access-Control-Request-Private-Network": "true"} | ask
                preflight = client.options(f"{server.url}{path}", headers=headers)
                names = preflight.headers.get("access-control-allow-origin")
                assert preflight.status_code == (200 if allowed else 400), (cors, origin, preflight.text)
                assert (names in (origin, "*")) == allowed
                if allowed:
                    granted = preflight.headers["access-control-allow-headers"].replace(" ", "").split(",")
                    assert set(OPENAI_JS.split(",")) <= set(granted)
                    assert method in preflight.headers["access-control-allow-methods"]
                assert "access-control-allow-credentials" not in preflight.headers
            body = {"messages": [user("hi")]}
            answer = client.post(f"{server.url}/v1/chat/completions", json=body, headers={"Origin": origin})
            assert (answer.headers.get("access-control-allow-origin") in (origin, "*")) == allowed


@pytest.mark.parametrize("cors", ["", "http://friend.example, http://other.example"])
def test_other_web_sites_have_no_access_unless_told(tokenizer, client, cors):
    cfg = ChatWeb(cors=cors, api_key="secret")
    with serving(ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, "ok")), cfg) as server:
        for origin in ("http://elsewhere.example", "http://friend.example"):
            ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
            for response in (
                client.options(f"{server.url}/v1/chat/completions", headers={"Origin": origin} | ask),
                client.get(f"{server.url}/health", headers={"Origin": origin}),
                client.get(f"{server.url}/v1/models", headers={"Origin": origin, "Authorization": "Bearer secret"}),
            ):
                allowed = response.headers.get("access-control-allow-origin")
                assert allowed == (origin if "friend" in origin and cors else None)
                assert "access-control-allow-credentials" not in response.headers


def test_the_key(tokenizer, client):
    with serving(ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, "ok")), ChatWeb(api_key="gehéim")) as server:
        url = f"{server.url}/chat/completions"
        wrong = ["", "gehéim", "Basic gehéim", "Bearer", "Bearer gehéi", "Bearer gehéimm"]
        for given in [{}, *({"Authorization": value.encode()} for value in wrong)]:
            refused = client.post(url, json={"messages": [user("x")]}, headers=given)
            assert refused.status_code == 401 and "key" in refused.json()["detail"]
            assert refused.headers["www-authenticate"] == "Bearer"
        for given in ("Bearer gehéim", "bearer  gehéim"):
            answer = client.post(url, json={"messages": [user("x")]}, headers={"Authorization": given.encode()})
            assert answer.status_code == 200
        refused = 'nanochat_refused_total{status="401"} 7.0'
        assert refused in client.get(f"{server.url}/metrics", headers={"Authorization": "Bearer gehéim".encode()}).text


def test_conversations_are_logged_only_when_asked(tokenizer, client, caplog):
    for log_chats in (False, True):
        engine = ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, "a private answer"))
        with serving(engine, ChatWeb(log_chats=log_chats)) as server:
            chat(client, server, [user("a private question")])
            client.post(f"{server.url}/v1/completions", json={"prompt": "a private text", "temperature": "private"})
        assert ("private" in caplog.text) == log_chats
    record = json.loads(caplog.messages[-1])
    assert "a private question" in record["prompt"] and record["end"] == "stop"
    assert record["answers"] == ["a private answer<|assistant_end|>"]


# -----------------------------------------------------------------------------
# Many clients


def endless(tokenizer):
    return lambda _: tokenizer.encode("and so on ") * 500


def stats(client, server) -> dict:
    return client.get(f"{server.url}/stats").json()


def test_a_client_that_leaves_frees_its_slot(tokenizer, client):
    engine = ScriptedEngine(tokenizer, endless(tokenizer), slots=2, context=100_000, delay=0.01)
    with serving(engine, ChatWeb(max_new_tokens=4096)) as server, contextlib.ExitStack() as leaving:
        for _ in range(3):  # two are served, the third waits
            other = leaving.enter_context(httpx.Client(timeout=30))
            request = other.build_request(
                "POST", f"{server.url}/chat/completions", json={"messages": [user("go")], "max_tokens": 4096}
            )
            response = other.send(request, stream=True)
            leaving.callback(response.close)
            assert response.status_code == 200
        until(lambda: stats(client, server)["busy_workers"] == 2)
        assert stats(client, server)["waiting"] == 1
        assert stats(client, server)["available_workers"] == 0
        leaving.close()
        until(lambda: stats(client, server)["available_workers"] == 2, seconds=3)
        assert stats(client, server)["waiting"] == 0
        assert sorted(engine.cancelled) == [0, 1, 2]


def test_every_client_gets_his_own_answer(tokenizer, client):
    def echo(request):
        ids = list(request.ids)
        start, end = tokenizer.special("<|user_start|>"), tokenizer.special("<|user_end|>")
        return [*ids[ids.index(start) + 1 : ids.index(end)], tokenizer.special("<|assistant_end|>")]

    engine = ScriptedEngine(tokenizer, echo, slots=3, delay=0.001)
    with serving(engine) as server, ThreadPoolExecutor(12) as pool:
        sent = [f"I am number {i} 🌍" for i in range(36)]
        received = list(pool.map(lambda text: text_of(chat(client, server, [user(text)])), sent))
    assert received == sent


def test_tells_the_place_in_the_queue_and_refuses_when_too_many_wait(tokenizer, client):
    engine = ScriptedEngine(tokenizer, endless(tokenizer), slots=1, delay=0.01)
    with serving(engine, ChatWeb(max_waiting=2)) as server, contextlib.ExitStack() as stack:
        streams = []
        for _ in range(3):
            other = stack.enter_context(httpx.Client(timeout=30))
            ask = other.stream("POST", f"{server.url}/chat/completions", json={"messages": [user("go")]})
            streams.append(stack.enter_context(ask).iter_lines())
            line = next(streams[-1])
            assert line == f'data: {{"waiting": {len(streams) - 1}}}' if streams[1:] else "token" in line
        refused = client.post(f"{server.url}/chat/completions", json={"messages": [user("go")]})
    assert refused.status_code == 429
    assert "busy" in refused.json()["detail"] and int(refused.headers["retry-after"]) > 0


def test_time_runs_out_and_frees_the_slot(tokenizer, client):
    engine = ScriptedEngine(tokenizer, endless(tokenizer), slots=1, delay=0.01)
    with serving(engine, ChatWeb(timeout=0.4)) as server, ThreadPoolExecutor(2) as pool:
        start = time.monotonic()
        answers = list(pool.map(lambda _: chat(client, server, [user("go")]), range(2)))  # one waits all the time
        assert 0.4 <= time.monotonic() - start < 3
        assert all(events[-2:] == [{"error": "no complete answer within 0.4 seconds"}, {"done": True}]
                   for events in answers)  # fmt: skip
        until(lambda: stats(client, server)["busy_workers"] == 0, seconds=2)


def test_head_says_what_get_says_without_the_body(tokenizer, client):
    paths = (*FILES, "/health", "/stats", "/metrics", "/openapi.json", "/v1/models", "/v1/models/nanochat-test-sft")
    with serving(ScriptedEngine(tokenizer, lambda _: [])) as server:
        for path in (*paths, "/v1/models/other", "/nothing", "/v1/completions"):
            get, head = client.get(server.url + path), client.head(server.url + path)
            kept = {"content-type", "content-length", "content-security-policy", "allow", "cache-control"}
            if path == "/metrics":  # its numbers, and so its length, change from one request to the next
                kept -= {"content-length"}
            assert head.content == b"" and head.status_code == get.status_code, path
            assert [head.headers.get(name) for name in kept] == [get.headers.get(name) for name in kept], path
            assert get.content and (get.status_code == 200) == (path in paths)
        connection = HTTPConnection("127.0.0.1", server.port, timeout=10)  # the connection remains usable
        for method in ("HEAD", "GET", "HEAD"):
            connection.request(method, "/health")
            response = connection.getresponse()
            assert bool(response.read()) == (method == "GET")
        connection.close()


def test_health_names_the_devices_that_there_are(tokenizer, client):
    engines = [ScriptedEngine(tokenizer, lambda _: []) for _ in range(2)]
    for device, gpus in (("cpu", 0), ("NVIDIA H100 80GB HBM3", 2)):
        with serving(engines, device=device) as server:
            health = client.get(f"{server.url}/health").json()
            assert (health["status"], health["ready"], health["available_workers"]) == ("ok", True, 4)
            assert (health["num_gpus"], health["devices"]) == (gpus, f"2 {device}")


def test_health_answers_while_the_model_computes(tokenizer, client):
    engine = ScriptedEngine(tokenizer, endless(tokenizer), delay=1.0)  # a step holds its thread for a second
    with (
        serving(engine, ChatWeb(slots=2)) as server,
        client.stream("POST", f"{server.url}/chat/completions", json={"messages": [user("go")]}),
        httpx.Client() as other,
    ):
        start = time.monotonic()
        for _ in range(5):
            health = other.get(f"{server.url}/health")
        assert time.monotonic() - start < 0.5
    assert health.status_code == 200
    assert health.json()["status"] == "ok" and health.json()["model"] == "nanochat-test-sft"


def test_an_engine_that_fails_is_reported(tokenizer, client):
    def broken(request):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    with serving(ScriptedEngine(tokenizer, broken)) as server:
        events = chat(client, server, [user("hi")])
        assert "error" in events[0] and "RESOURCE" not in events[0]["error"]
        assert client.get(f"{server.url}/health").status_code == 503
        assert client.post(f"{server.url}/chat/completions", json={"messages": [user("hi")]}).status_code == 503


def test_shuts_down_within_seconds_in_the_middle_of_an_answer(tokenizer):
    engine = ScriptedEngine(tokenizer, endless(tokenizer), delay=0.02)
    with serving(engine) as server:
        lines = []

        def read():
            with (
                contextlib.suppress(httpx.HTTPError),
                httpx.stream("POST", f"{server.url}/chat/completions", json={"messages": [user("go")]}) as response,
            ):
                lines.extend(response.iter_lines())

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.3)
        start = time.monotonic()
        server.stop()
        reader.join(5)
        assert time.monotonic() - start < 5 and not reader.is_alive()


# -----------------------------------------------------------------------------
# The real engine, and the page's files


def test_the_real_engine_gives_the_same_answer_alone_and_in_a_crowd(tokenizer, client):
    model_cfg = GPTConfig(
        n_layer=2, n_head=2, n_kv_head=2, n_embd=32, vocab_size=tokenizer.vocab_size, sequence_len=128
    )
    engine = Engine(gpt.init(model_cfg, seed=1), model_cfg, tokenizer, slots=2)
    with serving(engine) as server, ThreadPoolExecutor(4) as pool:
        options = {"max_tokens": 24, "temperature": 1.0}
        ask = lambda seed: chat(client, server, [user("hello")], seed=seed, **options)  # noqa: E731
        alone = ask(3)
        crowd = list(pool.map(ask, (3, 4, 3, 5, 3)))
    crowd = [[event for event in events if "waiting" not in event] for events in crowd]
    assert all(events[-1] == {"done": True} for events in crowd)
    assert crowd[0] == crowd[2] == crowd[4] == alone
    assert len({json.dumps(events) for events in crowd}) == 3


def test_serves_the_page_from_any_folder(tokenizer, client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}
    kinds["js"] = "text/javascript; charset=utf-8"
    with serving(ScriptedEngine(tokenizer, lambda _: [])) as server:
        for address, name in FILES.items():
            answer = client.get(server.url + address)
            assert answer.status_code == 200 and answer.content == (UI / name).read_bytes()
            assert answer.headers["content-type"] == kinds[name.rpartition(".")[2]]
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-cache"
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'; script-src 'self'; style-src 'self';" in policy and "unsafe" not in policy
            text = answer.text.replace("http://www.w3.org/2000/svg", "")  # a namespace, which is never fetched
            assert "innerHTML" not in text and "http://" not in text and "https://" not in text
            # Every file that another one names is served too, and is named relative to it.
            named = re.findall(r'(?:src|href)="([^"]+)"|^import .* from "([^"]+)"', text, re.MULTILINE)
            assert {"/" + (link or module.removeprefix("./")) for link, module in named} <= set(FILES)
            assert all(link or module.startswith("./") for link, module in named)


def test_serves_nothing_else_of_the_folder(tokenizer):
    assert sorted(FILES.values()) == sorted(path.name for path in UI.iterdir())
    paths = "/index.html /ui/page.js /page.py /../app.py /%2e%2e/app.py /..%2fapp.py /page.js/ /page.js/../../app.py"
    with serving(ScriptedEngine(tokenizer, lambda _: [])) as server:
        for path in paths.split():
            connection = HTTPConnection("127.0.0.1", server.port, timeout=10)  # sends a path as it is
            connection.request("GET", path)
            response = connection.getresponse()
            # 307 redirects to the path without the slash.
            assert response.status == (307 if path == "/page.js/" else 404), path
            assert b"import" not in response.read(), path
            connection.close()
