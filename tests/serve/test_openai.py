"""OpenAI's API, through OpenAI's own client: a small model in a real server process."""

import asyncio
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import jax
import numpy as np
import openai
import pytest
import tiny
from serving import command, save_model, until

from nanochat_jax.config import GPTConfig
from nanochat_jax.model import gpt
from nanochat_jax.serve.page import FILES
from nanochat_jax.tokenizer import SPECIAL_TOKENS

CONTEXT = 128
KEY = "a-key-of-our-own"
MODEL = "nanochat-tiny-sft"


@pytest.fixture(scope="module")
def model_cfg(tokenizer):
    return GPTConfig(1, 2, 2, 32, tokenizer.vocab_size, CONTEXT)


@pytest.fixture(scope="module")
def params(model_cfg):
    """Random weights, large enough for varied text; special tokens are never the most likely ones."""
    made = tiny.random_params(model_cfg, 0.2)
    return made | {"lm_head": made["lm_head"].at[model_cfg.vocab_size - len(SPECIAL_TOKENS) :].set(0)}


@pytest.fixture(scope="module")
def server(params, model_cfg, tokenizer, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        save_model(base, params, model_cfg, tokenizer)
    with command(base, "--slots=2", f"--api_key={KEY}", "--temperature=1", "--top_k=0") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def likelihood(params, model_cfg):
    """Log-probabilities [t,v] after each token of a sequence, by the full forward, padded to one compiled shape."""
    forward = jax.jit(lambda ids: jax.nn.log_softmax(gpt.forward(params, model_cfg, ids)[0]))
    return lambda ids: np.asarray(forward(np.array([[*ids, *[0] * (CONTEXT - len(ids))]])))[: len(ids)]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def test_models(client):
    [model] = client.models.list().data
    assert model.id == MODEL and client.models.retrieve(MODEL).id == MODEL
    for ask in (
        lambda: client.models.retrieve("gpt-4"),
        lambda: client.chat.completions.create(model="gpt-4", messages=[user("hi")]),
        lambda: client.completions.create(model="gpt-4", prompt="hi"),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            ask()
        assert refused.value.code == "model_not_found" and refused.value.param == "model"
        assert MODEL in refused.value.message


def test_the_key_is_asked_for(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as refused:
            stranger.models.list()
        assert refused.value.code == "invalid_api_key"
    for path in ("/stats", "/metrics", "/openapi.json", "/v1/models"):
        assert httpx.get(f"{server.url}{path}").status_code == 401
    assert httpx.post(f"{server.url}/chat/completions", json={"messages": [user("hi")]}).status_code == 401
    assert {httpx.get(f"{server.url}{path}").status_code for path in (*FILES, "/health")} == {200}


def test_a_seed_gives_the_same_chat_streamed_or_not(client, tokenizer):
    ask = {"model": MODEL, "messages": [user("hello")], "seed": 5, "max_tokens": 12, "n": 3}
    whole = client.chat.completions.create(**ask)
    assert whole == client.chat.completions.create(**ask).model_copy(update={"id": whole.id, "created": whole.created})
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3 and [choice.index for choice in whole.choices] == [0, 1, 2]
    assert whole.choices[0].finish_reason in ("stop", "length") and whole.choices[0].message.role == "assistant"
    prompt = tokenizer.render_for_completion({"messages": [user("hello")]})
    assert whole.usage.prompt_tokens == len(prompt) and 3 <= whole.usage.completion_tokens <= 36
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    streamed, reasons, usage = ["", "", ""], {}, None
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        assert chunk.model == MODEL and chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.index not in reasons, "a chunk after the end of its choice"
            streamed[choice.index] += choice.delta.content or ""
            reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert streamed == texts and usage == whole.usage
    assert [reasons[i] for i in range(3)] == [choice.finish_reason for choice in whole.choices]


def test_greedy_chat_with_logprobs_is_what_the_model_says(client, tokenizer, likelihood):
    messages = [{"role": "developer", "content": "Be brief."}, user([{"type": "text", "text": "hello"}])]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_completion_tokens=10, logprobs=True, top_logprobs=4
    )
    prompt = tokenizer.render_for_completion({"messages": [{"role": "system", "content": "Be brief."}, user("hello")]})
    ids = list(prompt)
    for token in (tokens := answer.choices[0].logprobs.content):
        after = likelihood(ids)[-1]
        ids.append(int(after.argmax()))
        assert bytes(token.bytes) == tokenizer.decode_bytes(ids[-1:])
        best = np.argsort(-after)[:4]
        assert [bytes(other.bytes) for other in token.top_logprobs] == [tokenizer.decode_bytes([i]) for i in best]
        np.testing.assert_allclose([other.logprob for other in token.top_logprobs], after[best], atol=2e-4)
        assert token.logprob == token.top_logprobs[0].logprob
    text = b"".join(bytes(token.bytes) for token in tokens).decode("utf-8", "replace")
    assert tokens and text == answer.choices[0].message.content


def test_scores_of_texts_and_ids_are_the_models(client, tokenizer, likelihood):
    """What lm-evaluation-harness asks for: echo, logprobs, nothing or one token after it."""
    texts = ["Why is the sky blue?", "你好, Grüße 🌍!", "37 times 12"]
    answer = client.completions.create(model=MODEL, prompt=texts, echo=True, logprobs=2, max_tokens=0)
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 3
    assert answer.usage.completion_tokens == 0
    for text, choice in zip(texts, answer.choices, strict=True):
        ids = tokenizer.encode(text, "<|bos|>")
        after = likelihood(ids)
        expected = [after[i, token] for i, token in enumerate(ids[1:])]
        np.testing.assert_allclose(choice.logprobs.token_logprobs, expected, atol=2e-4)
        for logits, token, named in zip(after, choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=False):
            assert token in named and len(named) in (2, 3)
            assert math.isclose(max(named.values()), logits.max(), abs_tol=2e-4)
        whole = [not token.startswith("bytes:") for token in choice.logprobs.tokens]
        for ok, token, start in zip(whole, choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
            assert not ok or text[start:].startswith(token)
    # Token ids are used as they are; the first has no log-probability. The one new token is the most likely one.
    ids = tokenizer.encode(texts[0])
    scored = client.completions.create(
        model=MODEL, prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0
    ).choices[0].logprobs  # fmt: skip
    after = likelihood(ids)
    assert scored.token_logprobs[0] is None and scored.top_logprobs[0] is None
    np.testing.assert_allclose(scored.token_logprobs[1:-1], [after[i, t] for i, t in enumerate(ids[1:])], atol=2e-4)
    assert math.isclose(scored.token_logprobs[-1], after[-1].max(), abs_tol=2e-4)


def test_completions_of_several_prompts(client):
    ask = {"model": MODEL, "prompt": ["The sea", "The moon"], "n": 2, "seed": 3, "max_tokens": 6, "echo": True}
    whole = client.completions.create(**ask)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert [choice.text[:7] for choice in whole.choices] == ["The sea"] * 2 + ["The moo"] * 2
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(**ask, stream=True, logprobs=0):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in whole.choices]
    # A prompt in a batch gets the same answers as alone.
    alone = client.completions.create(**ask | {"prompt": "The sea", "best_of": 2})  # the best 2 of 2 are both
    assert [choice.text for choice in alone.choices] == streamed[:2]
    assert client.completions.create(model=MODEL, prompt="").usage.completion_tokens <= 16


def test_a_prompt_longer_than_the_context(client, tokenizer):
    long = "word " * 200
    for ask in (
        lambda: client.chat.completions.create(model=MODEL, messages=[user(long)]),
        lambda: client.completions.create(model=MODEL, prompt=long),
        lambda: client.completions.create(model=MODEL, prompt=[65] * CONTEXT),
        lambda: client.completions.create(model=MODEL, prompt=[65] * (CONTEXT + 1), max_tokens=0),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            ask()
        assert refused.value.code == "context_length_exceeded" and str(CONTEXT) in refused.value.message
    full = client.completions.create(model=MODEL, prompt=[65] * (CONTEXT - 3), max_tokens=100, stop=["never"])
    assert full.usage.total_tokens <= CONTEXT
    scored = client.completions.create(model=MODEL, prompt=[65] * CONTEXT, max_tokens=0, echo=True, logprobs=0)
    assert len(scored.choices[0].logprobs.tokens) == CONTEXT


def value_of(server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_metrics_tell_how_busy_and_how_fast(client, server):
    def values():
        names = ("prompt_tokens_total", "generated_tokens_total", "time_to_first_token_seconds_count", "answers_total")
        return np.array([value_of(server, f"nanochat_{name}") for name in names])

    before = values()
    answer = client.chat.completions.create(model=MODEL, messages=[user("hello")], max_tokens=9, n=2)
    used = answer.usage
    assert (values() - before).tolist() == [used.prompt_tokens, used.completion_tokens, 1, 1]
    assert value_of(server, "nanochat_slots") == 2 and value_of(server, "nanochat_requests_running") == 0
    assert 0 <= value_of(server, "nanochat_cache_use_ratio") <= 1
    assert value_of(server, "nanochat_time_per_token_seconds_sum") > 0


def test_many_at_once_and_a_client_that_cancels(server):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            ask = lambda i: client.chat.completions.create(  # noqa: E731
                model=MODEL, messages=[user(f"number {i % 3}")], seed=i % 3, max_tokens=20
            )
            answers = await asyncio.gather(*(ask(i) for i in range(12)))
            leaving = await client.completions.create(model=MODEL, prompt="The", max_tokens=100, n=50, stream=True)
            async for _ in leaving:
                break
            busy = await asyncio.to_thread(value_of, server, "nanochat_requests_waiting")
            await leaving.close()
            return [answer.choices[0].message.content for answer in answers], busy

    answers, busy = asyncio.run(run())
    assert answers == answers[:3] * 4 and busy > 0
    until(lambda: value_of(server, "nanochat_requests_running") == 0, seconds=5)
    assert value_of(server, "nanochat_requests_waiting") == 0


@pytest.mark.slow
def test_no_request_that_the_description_suggests_is_a_server_error(server, tmp_path):
    program = shutil.which("schemathesis", path=Path(sys.executable).parent)
    if not program:
        pytest.skip("no schemathesis: pip install '.[e2e]'")
    run = [
        program, "run", f"{server.url}/openapi.json", "--header", f"Authorization: Bearer {KEY}", "--no-color",
        "--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--max-examples", "100", "--seed", "1",
    ]  # fmt: skip
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "Tested: 8" in done.stdout and server.process.poll() is None


@pytest.mark.slow
def test_lm_eval_scores_through_completions(server, tokenizer, params, model_cfg, tmp_path):
    """LM_EVAL is the path of its program, which is best installed in an environment of its own."""
    program = os.environ.get("LM_EVAL") or shutil.which("lm_eval")
    if not program:
        pytest.skip("no lm_eval: LM_EVAL=/path/to/lm_eval")
    questions = [{"q": "Why is the sky", "c": [" blue", " red light", " sea"], "a": i} for i in (0, 1, 2)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "sky.yaml").write_text(
        "task: sky\ndataset_path: json\noutput_type: multiple_choice\ntest_split: train\n"
        f"dataset_kwargs:\n  data_files: {tmp_path}/data.jsonl\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\ndoc_to_target: "{{a}}"\ntarget_delimiter: ""\n'
    )
    tokenizer.save(tmp_path / "tokenizer")
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|assistant_end|>"}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(fast))
    where = f"model={MODEL},base_url={server.url}/v1/completions,num_concurrent=2,max_retries=1,tokenized_requests=True"
    run = [
        program, "run", "--model", "local-completions", "--tasks", "sky", "--include_path", tmp_path, "--log_samples",
        "--model_args", f"{where},tokenizer={tmp_path}/tokenizer,max_length={CONTEXT}", "--output_path", tmp_path,
    ]  # fmt: skip
    env = os.environ | {"OPENAI_API_KEY": KEY, "HF_HOME": str(tmp_path)}
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    [samples] = tmp_path.rglob("samples_sky*.jsonl")
    likelihood = jax.jit(lambda ids: jax.nn.log_softmax(gpt.forward(params, model_cfg, ids)[0]))
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        for choice, [[score, _]] in zip(questions[0]["c"], sample["resps"], strict=True):
            context, ids = tokenizer.encode(questions[0]["q"]), tokenizer.encode(questions[0]["q"] + choice)
            after = likelihood(np.array([ids]))
            expected = sum(after[i - 1, ids[i]] for i in range(len(context), len(ids)))
            assert math.isclose(float(score), float(expected), abs_tol=1e-3)
