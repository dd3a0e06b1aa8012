"""OpenAI's API for this model: POST /v1/chat/completions and /v1/completions, GET /v1/models.

Fields this server does not know are ignored, as OpenAI's clients expect; those that would change the answer and cannot
be honoured are refused. A conversation whose last message is the assistant's is continued there. An answer ends with
finish_reason "length" where the context does; a prompt that leaves no room for any is refused.
"""

import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from nanochat_jax.config import ChatWeb, UserError
from nanochat_jax.conversation import render
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import TOP_LOGPROBS, Event, Request
from nanochat_jax.serve import errors
from nanochat_jax.serve.errors import ApiError
from nanochat_jax.serve.openai_choice import Choice, Token, chat_logprobs, completion_logprobs, prompt_tokens
from nanochat_jax.serve.pool import Pool
from nanochat_jax.serve.responses import HEARTBEAT, PATIENCE, Reply, data
from nanochat_jax.serve.worker import Answer, Busy, EngineFailure, TimedOut
from nanochat_jax.tokenizer import Tokenizer

MAX_CHOICES = 128  # samples of one request, over all its prompts
COMPLETION_TOKENS = 16  # OpenAI's default for completions, where nothing tells a model to stop
ROLES = ("system", "developer", "user", "assistant")
RETRY = {"Retry-After": "2"}  # seconds, for whom the server is too busy

# Fields that would change the answer, and the values that mean what happens without them.
NEUTRAL = {
    "audio": [], "best_of": [1], "frequency_penalty": [0], "function_call": ["none", "auto"], "functions": [[]],
    "logit_bias": [{}], "modalities": [["text"]], "presence_penalty": [0], "response_format": [{"type": "text"}],
    "suffix": [""], "tool_choice": ["none", "auto"], "tools": [[]],
}  # fmt: skip

Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class Generation(BaseModel):
    """What both kinds of requests may say about the answer. What is left out or null takes the server's default."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="the id that /v1/models gives")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="0: greedy")
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1, description="0: all tokens")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ContentPart(BaseModel):
    type: Literal["text", "python", "python_output"]
    text: str


class ChatMessage(BaseModel):
    role: str
    content: str | list[ContentPart]


class ChatCompletion(Generation):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=2000)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)


Ids = Annotated[list[StrictInt], Field(min_length=1)]


class Completion(Generation):
    """The body of POST /v1/completions. A text gets <|bos|> before it, token ids are taken as they are."""

    prompt: str | Ids | Annotated[list[str | Ids], Field(min_length=1, max_length=MAX_CHOICES)] = ""
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    echo: bool | None = None


@dataclass
class Job:
    """A request on its way: what the engine shall do, what the client asked for, and how it will look."""

    requests: list[Request]
    body: Generation
    kind: str  # of its objects: "chat.completion" or "text_completion"
    model: str
    echoes: list[str]  # the text of each prompt, if it goes before its choices
    hidden: list[int]  # tokens at the beginning of each prompt that are not in that text
    id: str
    created: int

    @property
    def chat(self) -> bool:
        return self.kind == "chat.completion"

    @property
    def logprobs(self) -> bool:
        return bool(self.body.logprobs) if self.chat else self.body.logprobs is not None


def routes(engine: Engine, worker: Pool, settings: ChatWeb, name: str) -> APIRouter:
    """The endpoints, for the application to include."""
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
    async def chat_completions(body: ChatCompletion):
        return await answer(body, chat_job)

    @router.post("/completions")
    async def completions(body: Completion):
        return await answer(body, completion_job)

    def check_model(id: str | None) -> None:
        if id not in (None, name):
            raise ApiError(404, f"model: there is no {id[:80]!r} here, only {name!r}", "model", "model_not_found")

    async def answer(body: Generation, make: Callable[..., Job]) -> Reply:
        check_model(body.model)
        for field, neutral in NEUTRAL.items():
            value = (body.model_extra or {}).get(field)
            if value is not None and value not in neutral:
                raise ApiError(400, f"{field}: not supported by this server", field, "unsupported_parameter")
        # Tokenizing takes its time too, and is no business of the event loop.
        job = await run_in_threadpool(make, body, engine, settings, name)
        try:
            answer = worker.submit(*job.requests)
        except Busy:
            raise ApiError(429, "the server is busy; try again in a moment", None, "server_busy", RETRY) from None
        except EngineFailure as error:
            raise ApiError(503, str(error), None, "server_unavailable") from None
        if body.stream:
            return Reply(answer, stream(answer, job, engine.tokenizer))
        return Reply(answer, lambda: whole(answer, job, engine.tokenizer))

    return router


# -----------------------------------------------------------------------------
# From a body to what the engine shall do


def chat_job(body: ChatCompletion, engine: Engine, settings: ChatWeb, name: str) -> Job:
    """ApiError for a conversation that cannot be answered."""
    ids = chat_prompt(engine.tokenizer, body.messages)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs: wants logprobs to be true", "top_logprobs")
    most = body.max_completion_tokens or body.max_tokens or settings.max_new_tokens
    top = body.top_logprobs or 0
    request = to_request(body, engine, settings, ids, most, "messages", top_logprobs=top)
    return Job([request], body, "chat.completion", name, [""], [0], f"chatcmpl-{secrets.token_hex(12)}", now())


def chat_prompt(tokenizer: Tokenizer, messages: list[ChatMessage]) -> list[int]:
    plain = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if message.role not in ROLES:
            allowed = ", ".join(ROLES)
            raise ApiError(400, f"{where}.role: got {message.role[:40]!r}, allowed are {allowed}", f"{where}.role")
        role = "system" if message.role == "developer" else message.role
        content = message.content
        if not isinstance(content, str):
            if role == "assistant":
                content = [part.model_dump() for part in content]
            elif any(part.type != "text" for part in content):
                raise ApiError(400, f"{where}.content: only an assistant calls the calculator", f"{where}.content")
            else:
                content = "".join(part.text for part in content)
        plain.append({"role": role, "content": content})
    try:
        return render(tokenizer, plain)
    except UserError as error:
        raise ApiError(400, str(error), "messages") from None


def completion_job(body: Completion, engine: Engine, settings: ChatWeb, name: str) -> Job:
    """ApiError for prompts that cannot be continued."""
    tokenizer = engine.tokenizer
    several = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
    prompts = body.prompt if several else [body.prompt]
    if len(prompts) * (body.n or 1) > MAX_CHOICES:
        raise ApiError(400, f"n: {len(prompts)} prompts x {body.n}: at most {MAX_CHOICES} choices", "n")
    most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    score = most == 0 or bool(body.echo and body.logprobs is not None)
    more = {"top_logprobs": body.logprobs or 0, "score": score}
    ids = [tokenizer.encode(prompt, "<|bos|>") if isinstance(prompt, str) else prompt for prompt in prompts]
    requests = [to_request(body, engine, settings, prompt, most, "prompt", **more) for prompt in ids]
    hidden = [int(isinstance(prompt, str)) for prompt in prompts]  # the <|bos|> that is ours
    echoes = [tokenizer.decode(r.ids[h:]) if body.echo else "" for r, h in zip(requests, hidden, strict=True)]
    return Job(requests, body, "text_completion", name, echoes, hidden, f"cmpl-{secrets.token_hex(12)}", now())


def to_request(
    body: Generation, engine: Engine, settings: ChatWeb, ids: list[int], most: int, param: str, **more
) -> Request:
    """ApiError if the prompt leaves no room for an answer, or the engine cannot do it."""
    context = engine.model_cfg.sequence_len
    most = min(most, settings.max_new_tokens)
    if len(ids) + min(most, 1) > context:
        reason = f"{param}: {len(ids)} tokens, and the model's context holds {context}, the answer included"
        raise ApiError(400, reason, param, "context_length_exceeded")
    request = Request(
        ids=ids,
        max_tokens=min(most, context - len(ids)),
        temperature=settings.temperature if body.temperature is None else body.temperature,
        top_k=settings.top_k if body.top_k is None else body.top_k,
        top_p=1.0 if body.top_p is None else max(body.top_p, 1e-6),  # 0 leaves the likeliest token
        seed=secrets.randbits(31) if body.seed is None else body.seed,
        n=body.n or 1,
        **more,
    )
    try:
        engine.check(request)
    except UserError as error:
        raise ApiError(400, f"{param}: {error}", param) from None
    return request


def now() -> int:
    return int(time.time())


# -----------------------------------------------------------------------------
# From the engine's events to objects


class Choices:
    """All choices of a job, in the order of prompts and samples."""

    def __init__(self, answer: Answer, job: Job, tokenizer: Tokenizer):
        stop = job.body.stop or ()
        stops = [stop] if isinstance(stop, str) else stop
        self._answer, self._job, self._tokenizer = answer, job, tokenizer
        self._choices = {
            (i, s): Choice(tokenizer, stops, offset=len(job.echoes[i]))
            for i, request in enumerate(job.requests)
            for s in range(request.n)
        }
        self._begun = set()
        self._cached_tokens = 0  # tokens of the prompts that were in the cache

    def read(self, event: Event) -> tuple[int, str, list[Token], str | None]:
        """Index of the choice, its new text, with its tokens, and why it ended if it did just now.

        A choice begins with the echo of its prompt. One that has met a stop string gives up its slot.
        """
        self._cached_tokens += event.cached_tokens
        key = event.request, event.sample
        choice, ended = self._choices[key], self._choices[key].finish_reason
        text, tokens = choice.read(event)
        if key not in self._begun:
            self._begun.add(key)
            text, tokens = self._echo(event, text, tokens)
        if choice.finish_reason and not event.finish_reason and not ended:
            self._answer.cancel(*key)
        index = sum(request.n for request in self._job.requests[: event.request]) + event.sample
        return index, text, tokens, None if ended else choice.finish_reason

    def _echo(self, event: Event, text: str, tokens: list[Token]) -> tuple[str, list[Token]]:
        job, i = self._job, event.request
        if getattr(job.body, "echo", False) and job.logprobs:
            tokens = prompt_tokens(self._tokenizer, job.requests[i].ids, event.scores, job.hidden[i]) + tokens
        return job.echoes[i] + text, tokens

    def logprobs(self, tokens: list[Token]) -> dict | None:
        if not self._job.logprobs:
            return None
        return (chat_logprobs if self._job.chat else completion_logprobs)(self._tokenizer, tokens)

    @property
    def usage(self) -> dict:
        asked = sum(len(request.ids) for request in self._job.requests)
        generated = sum(choice.generated for choice in self._choices.values())
        return {
            "prompt_tokens": asked,
            "completion_tokens": generated,
            "total_tokens": asked + generated,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


async def whole(answer: Answer, job: Job, tokenizer: Tokenizer) -> JSONResponse:
    """The answer as one object."""
    choices = Choices(answer, job, tokenizer)
    found = [["", [], None] for _ in range(answer.samples)]
    try:
        async for event in answer.events(PATIENCE):
            if event:
                index, text, tokens, reason = choices.read(event)
                found[index][0] += text
                found[index][1] += tokens
                found[index][2] = reason or found[index][2]
    except EngineFailure as error:
        return errors.response("/v1/", failure(error))

    def build() -> JSONResponse:
        listed = []
        for index, (text, tokens, reason) in enumerate(found):
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if job.chat else {"text": text}
            listed.append({"index": index} | said | {"logprobs": choices.logprobs(tokens), "finish_reason": reason})
        head = {"id": job.id, "object": job.kind, "created": job.created, "model": job.model}
        return JSONResponse(head | {"choices": listed, "usage": choices.usage})

    return await run_in_threadpool(build)  # with many log-probabilities it takes a while


async def stream(answer: Answer, job: Job, tokenizer: Tokenizer) -> AsyncIterator[str]:
    """The lines of the answer's event stream."""
    choices = Choices(answer, job, tokenizer)
    kind = f"{job.kind}.chunk" if job.chat else job.kind
    head = {"id": job.id, "object": kind, "created": job.created, "model": job.model}
    with_usage = bool(job.body.stream_options and job.body.stream_options.include_usage)
    if with_usage:
        head["usage"] = None

    def chunk(index: int, said: dict, tokens: list[Token], reason: str | None) -> str:
        logprobs = choices.logprobs(tokens) if tokens else None
        choice = {"index": index} | said | {"logprobs": logprobs, "finish_reason": reason}
        return data(head | {"choices": [choice]})

    if job.chat:
        for index in range(answer.samples):
            yield chunk(index, {"delta": {"role": "assistant", "content": ""}}, [], None)
    try:
        async for event in answer.events(PATIENCE):
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
        yield data({"error": errors.describe(failure(error))})
        return
    if with_usage:
        yield data(head | {"choices": [], "usage": choices.usage})
    yield data("[DONE]")


def failure(error: EngineFailure) -> ApiError:
    """How an answer that broke off is reported."""
    if isinstance(error, TimedOut):
        return ApiError(504, str(error), None, "timeout")
    return ApiError(503, str(error), None, "server_unavailable")
