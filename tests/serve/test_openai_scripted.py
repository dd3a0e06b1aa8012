"""OpenAI's API, through OpenAI's own client, with scripted answers: stop strings, limits, refusals and failures."""

import contextlib
import json
import math

import httpx
import openai
import pytest
from serving import ScriptedEngine, answer_ids, serving, until

from nanochat_jax.config import ChatWeb


def user(text: str) -> dict:
    return {"role": "user", "content": text}


@contextlib.contextmanager
def scripted(tokenizer, *answer, cfg=None, **engine):
    """A client of a server whose model always gives `answer`, and its engine."""
    script = answer[0] if callable(answer[0]) else lambda _: answer_ids(tokenizer, *answer)
    engine = ScriptedEngine(tokenizer, script, **engine)
    with (
        serving(engine, cfg) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=30) as client,
    ):
        yield client, engine


def test_stop_strings_end_the_text_wherever_they_fall(tokenizer):
    text = "The sea is calm tonight. Grüße 🌍, the tide is full"
    with scripted(tokenizer, text, delay=0.001) as (client, engine):
        for stop, kept in (
            ("calm", "The sea is "), ("T", ""), (["full!", "tide is full"], text[:-12]), ("🌍", text[:31]),
            ("never", text), (["tonight", "sea"], "The "), ("full", text[:-4]), ("fully", text),
        ):  # fmt: skip
            ask = {"model": "nanochat-test-sft", "messages": [user("?")], "stop": stop}
            whole = client.chat.completions.create(**ask, logprobs=True)
            assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (kept, "stop")
            tokens = b"".join(bytes(token.bytes) for token in whole.choices[0].logprobs.content)
            assert tokens.startswith(kept.encode()) and len(tokens) <= len(kept.encode()) + 12
            streamed = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**ask, stream=True)]
            assert "".join(streamed) == kept and not any("\ufffd" in piece for piece in streamed)
            assert whole.usage.completion_tokens <= len(tokenizer.encode(text)) + 1
    assert set(engine.cancelled) and not engine._left


def test_a_stop_string_in_one_of_several_samples_ends_only_that(tokenizer):
    def counting(request):
        return answer_ids(tokenizer, f"{request.seed} a b c d e f")

    with scripted(tokenizer, counting, slots=2) as (client, _):
        ask = lambda seed, stop: client.chat.completions.create(  # noqa: E731
            model=None, messages=[user("?")], seed=seed, stop=stop
        ).choices[0]
        assert ask(1, "c").message.content == "1 a b " and ask(2, "f").message.content == "2 a b c d e "


def test_tool_calls_are_not_text(tokenizer):
    answer = ("37 times 12 is ", ("python", "37*12"), ("python_output", "444"), "444.")
    with scripted(tokenizer, *answer) as (client, _):
        whole = client.chat.completions.create(model="nanochat-test-sft", messages=[user("37*12?")], logprobs=True)
        assert whole.choices[0].message.content == "37 times 12 is 444."
        tokens = [token.token for token in whole.choices[0].logprobs.content]
        assert "".join(tokens) == "37 times 12 is 444."
        assert whole.usage.completion_tokens == len(answer_ids(tokenizer, *answer))


def test_the_last_message_of_the_assistant_is_continued(tokenizer):
    with scripted(tokenizer, " there") as (client, engine):
        messages = [user("37*12?"), {"role": "assistant", "content": "It is"}]
        answer = client.chat.completions.create(model="nanochat-test-sft", messages=messages)
        assert answer.choices[0].message.content == " there"
        ids = list(engine.requests[0].ids)
        assert tokenizer.decode(ids).endswith("<|assistant_start|>It is")


def test_a_full_queue_is_429_with_a_time_to_come_back(tokenizer):
    endless = lambda _: tokenizer.encode("and so on ") * 500  # noqa: E731
    cfg = ChatWeb(max_waiting=1)
    with (
        scripted(tokenizer, endless, slots=1, delay=0.01, cfg=cfg) as (client, _),
        contextlib.ExitStack() as stack,
    ):
        for _ in range(2):
            stack.enter_context(client.completions.create(model=None, prompt="go", max_tokens=400, stream=True))
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model=None, prompt="go")
        assert int(refused.value.response.headers["retry-after"]) > 0 and refused.value.code == "server_busy"


def test_the_queue_is_counted_in_samples(tokenizer):
    """So a request for many samples cannot take the places of everybody else."""
    endless = lambda _: tokenizer.encode("and so on ") * 500  # noqa: E731
    with scripted(tokenizer, endless, slots=1, cfg=ChatWeb(max_waiting=0)) as (client, engine):
        for ask in ({"prompt": "go", "n": 128}, {"prompt": "go", "n": 2}, {"prompt": ["go"] * 2}):
            with pytest.raises(openai.BadRequestError, match="at most 1 at once") as never:
                client.completions.create(model=None, **ask)
            assert never.value.param == "n"
        assert client.completions.create(model=None, prompt="go").choices[0].text and len(engine.requests) == 1
    engine = {"slots": 2, "delay": 0.01, "context": 100_000}
    with scripted(tokenizer, endless, cfg=ChatWeb(max_waiting=3), **engine) as (client, _):
        long = {"model": None, "prompt": "go", "max_tokens": 5000, "stream": True}
        with client.completions.create(**long, n=1), client.completions.create(**long, n=1):
            with pytest.raises(openai.RateLimitError) as refused:  # 3 places are left
                client.completions.create(**long, n=4)
            assert int(refused.value.response.headers["retry-after"]) > 0
            with client.completions.create(**long, n=3), pytest.raises(openai.RateLimitError):
                client.completions.create(**long)


def test_max_tokens_is_honoured_up_to_the_context(tokenizer):
    with scripted(tokenizer, lambda _: tokenizer.encode("and so on ") * 500, cfg=ChatWeb(max_new_tokens=8)) as (
        client,
        engine,
    ):
        ask = {"model": None, "messages": [user("hi")]}
        lengths = [
            client.chat.completions.create(**ask, **limit).usage.completion_tokens
            for limit in ({}, {"max_tokens": 20}, {"max_completion_tokens": 100}, {"max_tokens": 10**6})
        ]
        prompt = len(engine.requests[0].ids)
        assert lengths == [8, 20, 100, engine.model_cfg.sequence_len - prompt]
        assert client.completions.create(model=None, prompt="hi").usage.completion_tokens == 16  # OpenAI's default


def test_time_runs_out(tokenizer):
    endless = lambda _: tokenizer.encode("and so on ") * 500  # noqa: E731
    with scripted(tokenizer, endless, slots=1, delay=0.05, cfg=ChatWeb(timeout=0.5)) as (client, engine):
        with pytest.raises(openai.InternalServerError) as failed:
            client.completions.create(model=None, prompt="go", max_tokens=500)
        assert failed.value.status_code == 504 and failed.value.code == "timeout"
        heard = []
        with pytest.raises(openai.APIError, match=r"0.5 seconds"):
            for chunk in client.completions.create(model=None, prompt="go", max_tokens=500, stream=True):
                heard.append(chunk.choices[0].text)
        assert heard
        until(lambda: len(engine.cancelled) == 2)


def test_an_engine_that_dies_is_an_error_in_the_stream(tokenizer):
    def dying(request):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    with scripted(tokenizer, dying) as (client, _):
        with pytest.raises(openai.APIError, match="stopped working") as failed:
            list(client.chat.completions.create(model=None, messages=[user("hi")], stream=True))
        assert "RESOURCE" not in str(failed.value)
        with pytest.raises(openai.InternalServerError) as refused:
            client.chat.completions.create(model=None, messages=[user("hi")])
        assert refused.value.status_code == 503


BAD = [
    ("chat/completions", {}, "messages"),
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {"messages": "hi"}, "messages"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ("chat/completions", {"messages": [user("x"), {"role": "tool", "content": "x"}]}, "messages[1].role"),
    ("chat/completions", {"messages": [user("x"), {"role": "system", "content": None}]}, "messages[1].content"),
    ("chat/completions", {"messages": [{"role": "assistant", "content": None}]}, "messages"),
    ("chat/completions", {"messages": [user([{"type": "image_url", "image_url": {}}])]}, "messages[0].content[0].type"),
    ("chat/completions", {"messages": [user([{"type": "text", "value": "x"}])]}, "messages[0].content[0].text"),
    ("chat/completions", {"messages": [user([{"type": "python", "text": "x"}])]}, "messages[0].content[0].type"),
    ("chat/completions", {"messages": [user("x")], "temperature": 2.1}, "temperature"),
    ("chat/completions", {"messages": [user("x")], "temperature": math.nan}, "temperature"),
    ("chat/completions", {"messages": [user("x")], "top_p": -0.1}, "top_p"),
    ("chat/completions", {"messages": [user("x")], "top_p": math.inf}, "top_p"),
    ("chat/completions", {"messages": [user("x")], "n": 0}, "n"),
    ("chat/completions", {"messages": [user("x")], "n": 129}, "n"),
    ("chat/completions", {"messages": [user("x")], "max_tokens": 0}, "max_tokens"),
    ("chat/completions", {"messages": [user("x")], "max_tokens": -5}, "max_tokens"),
    ("chat/completions", {"messages": [user("x")], "max_tokens": 1e999}, "max_tokens"),
    ("chat/completions", {"messages": [user("x")], "top_logprobs": 21}, "top_logprobs"),
    ("chat/completions", {"messages": [user("x")], "top_logprobs": 2}, "top_logprobs"),
    ("chat/completions", {"messages": [user("x")], "stop": [""]}, "stop[0]"),
    ("chat/completions", {"messages": [user("x")], "stop": ["x"] * 17}, "stop"),
    ("chat/completions", {"messages": [user("x")], "seed": "x"}, "seed"),
    ("chat/completions", {"messages": [user("x")], "seed": 2**63}, "seed"),
    ("chat/completions", {"messages": [user("x")], "tools": [{"type": "function"}]}, "tools"),
    ("chat/completions", {"messages": [user("x")], "response_format": {"type": "json_object"}}, "response_format"),
    ("chat/completions", {"messages": [user("x")], "presence_penalty": 0.5}, "presence_penalty"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": [[]]}, "prompt[0]"),
    ("completions", {"prompt": [1.5]}, "prompt[0]"),
    ("completions", {"prompt": ["x", 1]}, "prompt[1]"),
    ("completions", {"prompt": ["x"] * 65, "n": 2}, "n"),
    ("completions", {"prompt": "x", "logprobs": 21}, "logprobs"),
    ("completions", {"prompt": "x", "suffix": "y"}, "suffix"),
    ("completions", {"prompt": "x", "best_of": 2}, "best_of"),
    ("completions", {"prompt": "x", "best_of": 3, "n": 2}, "best_of"),
    ("chat/completions", {"messages": [user("x")], "n": 69}, "n"),  # 4 slots and 64 places in the queue
    ("completions", {"prompt": ["x"] * 35, "n": 2}, "n"),
]


def test_mistakes_are_named_in_openais_shape(tokenizer):
    with (
        scripted(tokenizer, "ok", slots=4) as (client, engine),
        httpx.Client(base_url=str(client.base_url), timeout=10) as http,
    ):
        for path, body, param in BAD:
            answer = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert answer.status_code == 400, (body, answer.text)
            error = answer.json()["error"]
            assert error["param"] == param and error["type"] == "invalid_request_error", (body, error)
            assert error["message"].startswith(param), (body, error)
        for method, path, status in (("GET", "nothing", 404), ("GET", "completions", 405), ("POST", "models", 405)):
            answer = http.request(method, path)
            assert answer.status_code == status and answer.json()["error"]["message"]
        for method, url in (("GET", "/nope"), ("POST", "/completions"), ("GET", "/v1/nothing")):
            answer = http.request(method, str(client.base_url.copy_with(raw_path=url.encode())))
            error = answer.json()["error"]
            assert answer.status_code == 404 and error["type"] == "not_found_error"
            assert repr(url) in error["message"] and "/v1" in error["message"]
        body = json.dumps({"messages": [user("x")]})
        for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/jsonish"}):
            error = http.post("chat/completions", content=body, headers=headers).json()["error"]
            assert error["code"] == "invalid_content_type" and "Content-Type: application/json" in error["message"]
        kind = {"Content-Type": "application/json; charset=utf-8"}
        assert http.post("chat/completions", content="{", headers=kind).json()["error"]["code"] == "invalid_json"
        # Neutral values of unsupported fields, unknown fields and null are accepted.
        fine = {"presence_penalty": 0, "tools": None, "response_format": {"type": "text"}, "user": "me", "stop": None,
                "stream_options": None, "logit_bias": {}, "best_of": 1, "n": None, "seed": -1, "top_p": 0}  # fmt: skip
        assert http.post("chat/completions", json={"messages": [user("x")]} | fine).status_code == 200
    assert len(engine.requests) == 1


def test_the_official_client_may_send_all_its_fields(tokenizer):
    with scripted(tokenizer, "ok") as (client, engine):
        answer = client.chat.completions.create(
            model="nanochat-test-sft", messages=[user("x")], frequency_penalty=0, presence_penalty=0, logit_bias={},
            logprobs=False, max_completion_tokens=9, metadata={"a": "b"}, modalities=["text"], n=1, service_tier="auto",
            parallel_tool_calls=True, response_format={"type": "text"}, seed=1, stop=["never"], store=False, top_p=1,
            stream=False, temperature=1, tool_choice="auto", tools=[], user="me", reasoning_effort="low",
            prediction=None, verbosity="low", safety_identifier="me", prompt_cache_key="me",
        )  # fmt: skip
        assert answer.choices[0].message.content == "ok"
        options = {"include_usage": True, "include_obfuscation": False}
        ask = {"model": "nanochat-test-sft", "messages": [user("x")]}
        *_, last = client.chat.completions.create(**ask, stream=True, stream_options=options)
        assert last.usage.completion_tokens == len(answer_ids(tokenizer, "ok"))
        # An answer comes back as the client's own object, with all its fields.
        again = [user("x"), answer.choices[0].message, user("y")]
        assert client.chat.completions.create(**ask | {"messages": again}).choices[0].message.content == "ok"
        with pytest.raises(openai.NotFoundError, match="/v1"):
            client.embeddings.create(model="nanochat-test-sft", input="x")
    assert len(engine.requests) == 3
