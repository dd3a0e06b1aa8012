"""OpenAI's API for this model: POST /v1/chat/completions and /v1/completions, GET /v1/models.

schema.py defines the request bodies. If an answer reaches the end of the context, its finish_reason is "length". A
prompt that leaves no room for an answer is refused.
"""

import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from nanochat_jax.config import ChatWeb
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import Event, Request
from nanochat_jax.serve import errors, schema
from nanochat_jax.serve.errors import ApiError
from nanochat_jax.serve.openai_choice import Choice, Token, chat_logprobs, completion_logprobs, prompt_tokens
from nanochat_jax.serve.pool import Pool
from nanochat_jax.serve.responses import HEARTBEAT, HEARTBEAT_SECONDS, AnswerResponse, sse
from nanochat_jax.serve.schema import ChatCompletionBody, CompletionBody, GenerationBody
from nanochat_jax.serve.worker import Answer, EngineFailure
from nanochat_jax.tokenizer import Tokenizer


@dataclass
class Job:
    """The engine requests of one HTTP request, and the form of its response."""

    requests: list[Request]
    body: GenerationBody
    kind: str  # the field `object` of the response: "chat.completion" or "text_completion"
    model: str
    id: str
    logprobs: bool  # whether the client wants log-probabilities
    echoes: list[str]  # for each prompt, its text if the client wants it echoed, otherwise ""
    hidden: list[int]  # for each prompt, how many leading tokens the echo omits
    scored: bool = False  # whether each choice includes the log-probabilities of its prompt
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def chat(self) -> bool:
        return self.kind == "chat.completion"


def routes(engine: Engine, pool: Pool, cfg: ChatWeb, name: str) -> APIRouter:
    """Returns a router with the endpoints under /v1. `name` is the model's id."""
    router = APIRouter(prefix="/v1")
    started = int(time.time())
    context = engine.model_cfg.sequence_len
    model = {"id": name, "object": "model", "created": started, "owned_by": "nanochat", "max_model_len": context}

    @router.get("/models")
    async def models():
        return {"object": "list", "data": [model]}

    @router.get("/models/{id}")
    async def model_by_id(id: str):
        check_model(id)
        return model

    @router.post("/chat/completions")
    async def chat_completions(body: ChatCompletionBody):
        return await respond(body, lambda: chat_job(body, engine, cfg, name))

    @router.post("/completions")
    async def completions(body: CompletionBody):
        return await respond(body, lambda: completion_job(body, engine, cfg, name))

    def check_model(id: str | None) -> None:
        if id is not None and id != name:
            raise ApiError(404, f"model: there is no {id[:80]!r} here, only {name!r}", "model", "model_not_found")

    async def respond(body: GenerationBody, make_job: Callable[[], Job]) -> AnswerResponse:
        check_model(body.model)
        schema.check_unsupported(body)
        job = await run_in_threadpool(make_job)  # tokenizing would block the event loop
        answer = schema.submit(pool, *job.requests)
        if body.stream:
            return AnswerResponse(answer, stream(answer, job, engine.tokenizer))
        return AnswerResponse(answer, lambda: whole(answer, job, engine.tokenizer))

    return router


def chat_job(body: ChatCompletionBody, engine: Engine, cfg: ChatWeb, name: str) -> Job:
    """Returns the job of a chat completion. Raises ApiError 400 if the request is invalid or the prompt is too long."""
    return Job(
        requests=[schema.chat_completion_request(body, engine, cfg)],
        body=body,
        kind="chat.completion",
        model=name,
        id=f"chatcmpl-{secrets.token_hex(12)}",
        logprobs=bool(body.logprobs),
        echoes=[""],
        hidden=[0],
    )


def completion_job(body: CompletionBody, engine: Engine, cfg: ChatWeb, name: str) -> Job:
    """Returns the job of a completion. Raises ApiError 400 if the request is invalid or a prompt is too long."""
    requests = schema.completion_requests(body, engine, cfg)
    # The server puts a <|bos|> before each text prompt. The echo omits this token.
    hidden = [int(isinstance(prompt, str)) for prompt in body.prompts]
    decode = engine.tokenizer.decode
    return Job(
        requests=requests,
        body=body,
        kind="text_completion",
        model=name,
        id=f"cmpl-{secrets.token_hex(12)}",
        logprobs=body.logprobs is not None,
        echoes=[decode(r.ids[n:]) if body.echo else "" for r, n in zip(requests, hidden, strict=True)],
        hidden=hidden,
        scored=bool(body.echo) and body.logprobs is not None,
    )


# -----------------------------------------------------------------------------
# Conversion of engine events to OpenAI's objects


class Choices:
    """The choices of a job, ordered by prompt and then by sample. "Choice" is OpenAI's name for a sample."""

    def __init__(self, answer: Answer, job: Job, tokenizer: Tokenizer):
        self._answer, self._job, self._tokenizer = answer, job, tokenizer
        self._choices = {
            (i, s): Choice(tokenizer, job.body.stop_strings, offset=len(job.echoes[i]))
            for i, request in enumerate(job.requests)
            for s in range(request.n)
        }
        self._begun: set[tuple[int, int]] = set()
        self._cached_tokens = 0  # how many prompt tokens were already in the cache

    def read(self, event: Event) -> tuple[int, str, list[Token], str | None]:
        """Returns the index of the event's choice, and the choice's new text, new tokens and finish_reason. The
        finish_reason is None unless the choice ends with this event.

        If the client wants an echo, the first text of a choice begins with the prompt. If a choice reaches a stop
        string, its sample is cancelled to free the slot.
        """
        self._cached_tokens += event.cached_tokens
        key = event.request, event.sample
        choice = self._choices[key]
        had_ended = choice.finish_reason is not None
        text, tokens = choice.read(event)
        if key not in self._begun:
            self._begun.add(key)
            text, tokens = self._echo(event, text, tokens)
        if choice.finish_reason and not event.finish_reason and not had_ended:
            self._answer.cancel(*key)
        index = sum(request.n for request in self._job.requests[: event.request]) + event.sample
        return index, text, tokens, None if had_ended else choice.finish_reason

    def _echo(self, event: Event, text: str, tokens: list[Token]) -> tuple[str, list[Token]]:
        job, i = self._job, event.request
        if job.scored:
            assert event.scores is not None, f"no scores with the first event of request {i}"
            tokens = prompt_tokens(self._tokenizer, job.requests[i].ids, event.scores, job.hidden[i]) + tokens
        return job.echoes[i] + text, tokens

    def logprobs(self, tokens: list[Token]) -> dict | None:
        if not self._job.logprobs:
            return None
        return (chat_logprobs if self._job.chat else completion_logprobs)(self._tokenizer, tokens)

    @property
    def usage(self) -> dict:
        prompt = sum(len(request.ids) for request in self._job.requests)
        generated = sum(choice.generated for choice in self._choices.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


async def whole(answer: Answer, job: Job, tokenizer: Tokenizer) -> JSONResponse:
    """Returns the answer as one JSON object."""
    choices = Choices(answer, job, tokenizer)
    texts = [""] * answer.samples
    tokens: list[list[Token]] = [[] for _ in texts]
    reasons: list[str | None] = [None] * answer.samples
    try:
        async for event in answer.events(HEARTBEAT_SECONDS):
            if event:
                index, new_text, new_tokens, reason = choices.read(event)
                texts[index] += new_text
                tokens[index] += new_tokens
                reasons[index] = reason or reasons[index]
    except EngineFailure as error:
        return errors.error_response("/v1/", errors.from_engine_failure(error))

    def build() -> JSONResponse:
        objects = []
        for index, text in enumerate(texts):
            content = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if job.chat else {"text": text}
            )
            end = {"logprobs": choices.logprobs(tokens[index]), "finish_reason": reasons[index]}
            objects.append({"index": index} | content | end)
        head = {"id": job.id, "object": job.kind, "created": job.created, "model": job.model}
        return JSONResponse(head | {"choices": objects, "usage": choices.usage})

    return await run_in_threadpool(build)  # slow if there are many log-probabilities


async def stream(answer: Answer, job: Job, tokenizer: Tokenizer) -> AsyncGenerator[str, None]:
    """Yields the answer as server-sent events."""
    choices = Choices(answer, job, tokenizer)
    kind = f"{job.kind}.chunk" if job.chat else job.kind
    head: dict = {"id": job.id, "object": kind, "created": job.created, "model": job.model}
    if job.body.include_usage:
        head["usage"] = None

    def chunk(index: int, content: dict, tokens: list[Token], reason: str | None) -> str:
        logprobs = choices.logprobs(tokens) if tokens else None
        choice = {"index": index} | content | {"logprobs": logprobs, "finish_reason": reason}
        return sse(head | {"choices": [choice]})

    if job.chat:
        for index in range(answer.samples):
            yield chunk(index, {"delta": {"role": "assistant", "content": ""}}, [], None)
    try:
        async for event in answer.events(HEARTBEAT_SECONDS):
            if event is None:
                yield HEARTBEAT
                continue
            index, text, tokens, reason = choices.read(event)
            if job.chat and (text or tokens):
                yield chunk(index, {"delta": {"content": text}}, tokens, None)
                text, tokens = "", []
            if text or tokens or reason:
                yield chunk(index, {"delta": {}} if job.chat else {"text": text}, tokens, reason)
    except EngineFailure as error:
        yield sse({"error": errors.openai_error(errors.from_engine_failure(error))})
        return
    if job.body.include_usage:
        yield sse(head | {"choices": [], "usage": choices.usage})
    yield sse("[DONE]")
