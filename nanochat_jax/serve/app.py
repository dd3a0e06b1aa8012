"""The web server: the stream of an answer, health and statistics; OpenAI's API is in openai_api.py, the page in page.py.

`POST /chat/completions` answers with server-sent events, one JSON object a `data:` line: {"token": text, "gpu": n},
{"python": expression} and {"output": result} for the calculator, {"waiting": place} for whom no slot is free yet,
{"dropped": n} if the oldest messages did not fit, {"cut": "length"} if the answer did not end by itself, {"error":
text}, and at the end {"done": true}. A conversation whose last message is the assistant's is continued there. Whatever
a client gets wrong is answered with 400 and {"detail": reason}. Nothing of a conversation is logged unless asked.
"""

import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import repeat
from typing import Literal

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, Field
from starlette.middleware.cors import CORSMiddleware

from nanochat_jax.config import ChatWeb, UserError
from nanochat_jax.conversation import PartReader, prompt
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import Request as EngineRequest
from nanochat_jax.serve import errors, openai_api, page
from nanochat_jax.serve.errors import ApiError
from nanochat_jax.serve.metrics import CONTENT_TYPE, Metrics
from nanochat_jax.serve.middleware import Guard
from nanochat_jax.serve.pool import Pool
from nanochat_jax.serve.responses import HEARTBEAT, PATIENCE, Reply, data
from nanochat_jax.serve.worker import Answer, Busy, EngineFailure, EngineWorker
from nanochat_jax.tokenizer import Tokenizer

ROLES = ("user", "assistant", "system")
MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8_000
MAX_CHARS = 32_000

EVENT_NAMES = {"python": "python", "python_output": "output"}


class Part(BaseModel):
    type: Literal["text", "python", "python_output"]
    text: str


class Message(BaseModel):
    role: str
    content: str | list[Part]

    @property
    def chars(self) -> int:
        return len(self.content) if isinstance(self.content, str) else sum(len(part.text) for part in self.content)


class ChatRequest(BaseModel):
    """The body of POST /chat/completions; what is left out takes the server's default. Unknown fields are ignored."""

    messages: list[Message]
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, le=200, description="0: all tokens")
    max_tokens: int | None = Field(None, ge=1, le=4096)
    seed: int | None = Field(None, ge=0, lt=2**31)


def create_app(
    engines: Sequence[Engine], settings: ChatWeb, name: str, device: str = "cpu", warming: Sequence[Iterator[int]] = ()
) -> FastAPI:
    """The application around `engines`, all of one model, which from now on belong to it. `name` is the model's, for
    the page; `warming` is what is left of each engine's warming up."""
    metrics, engine = Metrics(), engines[0]
    share = -(-settings.max_waiting // len(engines))
    worker = Pool(
        [
            EngineWorker(each, metrics, share, settings.timeout, settings.log_chats, rest, gpu)
            for gpu, (each, rest) in enumerate(zip(engines, warming or repeat(None), strict=False))
        ]
    )
    metrics.watch(worker)

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        worker.start()
        yield
        await run_in_threadpool(worker.stop)

    # The stock documentation pages load their scripts from elsewhere, so there are none; /openapi.json remains.
    app = FastAPI(
        title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None, exception_handlers=errors.handlers()
    )
    app.state.worker = worker
    app.add_middleware(Guard, api_key=settings.api_key, metrics=metrics)
    if settings.cors:  # outside of the guard, since browsers ask for permission without the key
        origins = [origin.strip() for origin in settings.cors.split(",")]
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"], expose_headers=["Retry-After"],
        )  # fmt: skip
    app.include_router(openai_api.routes(engine, worker, settings, name))
    app.include_router(page.routes())

    @app.get("/health")
    async def health():
        ready = worker.failure is None
        body = {
            "status": "ok" if ready else "failed",
            "ready": ready,
            "num_gpus": len(worker.alive),
            "available_workers": worker.slots - worker.running,
            "model": name,
            "context": engine.model_cfg.sequence_len,
            "defaults": {
                "temperature": settings.temperature,
                "top_k": settings.top_k,
                "max_tokens": min(settings.max_new_tokens, engine.model_cfg.sequence_len),
            },
        }
        return JSONResponse(body, status_code=200 if ready else 503)

    @app.get("/stats")
    async def stats():
        return {
            "total_workers": worker.slots,
            "available_workers": worker.slots - worker.running,
            "busy_workers": worker.running,
            "waiting": worker.waiting,
            "warming": worker.warming,
            "workers": [{"gpu_id": each.gpu, "device": device} for each in worker.alive for _ in range(each.slots)],
        }

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus():
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.post("/chat/completions")
    async def chat_completions(body: ChatRequest):
        check(body.messages)
        try:
            # Tokenizing takes its time too, and is no business of the event loop.
            request, dropped = await run_in_threadpool(to_request, body, engine, settings)
            answer = worker.submit(request)
        except UserError as error:
            raise ApiError(400, str(error)) from None
        except Busy:
            raise ApiError(429, "the server is busy; try again in a moment", headers=openai_api.RETRY) from None
        except EngineFailure as error:
            raise ApiError(503, str(error)) from None
        return Reply(answer, events(answer, engine.tokenizer, dropped))

    return app


def check(messages: list[Message]) -> None:
    """HTTP 400, naming the reason, for a conversation that cannot be answered."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise ApiError(400, f"messages: got {len(messages)}, allowed are 1 to {MAX_MESSAGES}")
    for i, message in enumerate(messages):
        if message.role not in ROLES:
            raise ApiError(400, f"messages[{i}].role: got {message.role[:40]!r}, allowed are {', '.join(ROLES)}")
        # What the model itself has said must be welcome again, however long it was (the specification refuses it).
        longest = MAX_CHARS if message.role == "assistant" else MAX_MESSAGE_CHARS
        if not 1 <= message.chars <= longest:
            reason = f"has {message.chars} characters, allowed are 1 to {longest}"
            raise ApiError(400, f"messages[{i}].content: {reason}")
        if not isinstance(message.content, str) and message.role != "assistant":
            raise ApiError(400, f"messages[{i}].content: only an assistant's content may be a list of parts")
    if (total := sum(message.chars for message in messages)) > MAX_CHARS:
        raise ApiError(400, f"messages: {total} characters in all, allowed are {MAX_CHARS}")
    if messages[-1].role == "system":
        raise ApiError(400, f"messages[{len(messages) - 1}].role: got system, the last must be user or assistant")


def to_request(body: ChatRequest, engine: Engine, settings: ChatWeb) -> tuple[EngineRequest, int]:
    """The engine's request, and how many of the oldest messages were dropped. UserError if it cannot fit."""
    context = engine.model_cfg.sequence_len
    max_tokens = min(body.max_tokens or settings.max_new_tokens, settings.max_new_tokens)
    messages = [message.model_dump() for message in body.messages]
    ids, dropped = prompt(engine.tokenizer, messages, context, max_tokens)
    request = EngineRequest(
        ids=ids,
        max_tokens=min(max_tokens, context - len(ids)),
        temperature=settings.temperature if body.temperature is None else body.temperature,
        top_k=settings.top_k if body.top_k is None else body.top_k,
        seed=secrets.randbits(31) if body.seed is None else body.seed,
    )
    return request, dropped


async def events(answer: Answer, tokenizer: Tokenizer, dropped: int) -> AsyncIterator[str]:
    """The lines of the event stream."""
    if dropped:
        yield data({"dropped": dropped})
    if answer.place:
        yield data({"waiting": answer.place})
    reader = PartReader(tokenizer)
    try:
        async for event in answer.events(PATIENCE):
            if event is None:
                yield HEARTBEAT
                continue
            for kind, text in reader.read(event.ids, end=event.finish_reason is not None):
                yield data({"token": text, "gpu": answer.gpu} if kind == "text" else {EVENT_NAMES[kind]: text})
            if event.finish_reason not in (None, "stop"):
                yield data({"cut": event.finish_reason})
    except EngineFailure as error:
        yield data({"error": str(error)})
    yield data({"done": True})
