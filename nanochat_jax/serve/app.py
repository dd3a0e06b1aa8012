"""The web server: the page, the stream of an answer, health and statistics.

`POST /chat/completions` answers with server-sent events, one JSON object a `data:` line: {"token": text, "gpu": 0},
{"python": expression} and {"output": result} for the calculator, {"dropped": n} if the oldest messages did not fit,
{"cut": "length"} if the answer did not end by itself, {"error": text}, and at the end {"done": true}. Whatever a
client gets wrong is answered with 400 and {"detail": reason}. Nothing of a conversation is logged.
"""

import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from nanochat_jax.config import ChatWeb, UserError
from nanochat_jax.conversation import PartReader, prompt
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.engine import Request as EngineRequest
from nanochat_jax.serve.worker import Answer, Busy, EngineFailure, EngineWorker
from nanochat_jax.tokenizer import Tokenizer

UI = Path(__file__).parent / "ui"
ROLES = ("user", "assistant", "system")
MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8_000
MAX_CHARS = 32_000
MAX_BODY = 1 << 20  # bytes; 32,000 characters, each escaped, are well below it

# The page runs its own inline script and talks to its own server, nothing else.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
EVENT_NAMES = {"text": "token", "python": "python", "python_output": "output"}


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


def create_app(engine: Engine, settings: ChatWeb, name: str, device: str = "cpu") -> FastAPI:
    """The application around one engine, which from now on belongs to it. `name` is the model's, for the page."""
    worker = EngineWorker(engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        worker.start()
        yield
        await run_in_threadpool(worker.stop)

    # The stock documentation pages load their scripts from elsewhere, so there are none; /openapi.json remains.
    app = FastAPI(title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit)
    app.add_exception_handler(RequestValidationError, _invalid)

    @app.get("/", include_in_schema=False)
    async def page():
        return FileResponse(UI / "index.html", headers=PAGE_HEADERS)

    @app.get("/logo.svg", include_in_schema=False)
    async def logo():
        return FileResponse(UI / "logo.svg", media_type="image/svg+xml")

    @app.get("/health")
    async def health():
        ready = worker.failure is None
        body = {
            "status": "ok" if ready else "failed",
            "ready": ready,
            "num_gpus": 1,
            "available_workers": worker.slots - worker.running,
            "model": name,
            "context": engine.cfg.sequence_len,
            "defaults": {
                "temperature": settings.temperature,
                "top_k": settings.top_k,
                "max_tokens": settings.max_new_tokens,
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
            "workers": [{"gpu_id": 0, "device": device}] * worker.slots,
        }

    @app.post("/chat/completions")
    async def chat_completions(body: ChatRequest):
        check(body.messages)
        try:
            # Tokenizing takes its time too, and is no business of the event loop.
            request, dropped = await run_in_threadpool(to_request, body, engine, settings)
            answer = worker.submit(request)
        except UserError as error:
            raise HTTPException(400, str(error)) from None
        except Busy:
            raise HTTPException(429, "the server is busy; try again in a moment", {"Retry-After": "2"}) from None
        except EngineFailure as error:
            raise HTTPException(503, str(error)) from None
        return AnswerResponse(answer, events(answer, engine.tokenizer, dropped))

    return app


def check(messages: list[Message]) -> None:
    """HTTP 400, naming the reason, for a conversation that cannot be answered."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise HTTPException(400, f"messages: got {len(messages)}, allowed are 1 to {MAX_MESSAGES}")
    for i, message in enumerate(messages):
        if message.role not in ROLES:
            raise HTTPException(400, f"messages[{i}].role: got {message.role[:40]!r}, allowed are {', '.join(ROLES)}")
        # What the model itself has said must be welcome again, however long it was (the specification refuses it).
        longest = MAX_CHARS if message.role == "assistant" else MAX_MESSAGE_CHARS
        if not 1 <= message.chars <= longest:
            reason = f"has {message.chars} characters, allowed are 1 to {longest}"
            raise HTTPException(400, f"messages[{i}].content: {reason}")
        if not isinstance(message.content, str) and message.role != "assistant":
            raise HTTPException(400, f"messages[{i}].content: only an assistant's content may be a list of parts")
    if (total := sum(message.chars for message in messages)) > MAX_CHARS:
        raise HTTPException(400, f"messages: {total} characters in all, allowed are {MAX_CHARS}")

    if messages[-1].role != "user":
        raise HTTPException(400, f"messages[{len(messages) - 1}].role: got {messages[-1].role}, the last must be user")


def to_request(body: ChatRequest, engine: Engine, settings: ChatWeb) -> tuple[EngineRequest, int]:
    """The engine's request, and how many of the oldest messages were dropped. UserError if it cannot fit."""
    context = engine.cfg.sequence_len
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
        yield line(dropped=dropped)
    reader = PartReader(tokenizer)
    try:
        async for event in answer:
            for kind, text in reader.read(event.ids, end=event.finish_reason is not None):
                yield line(token=text, gpu=0) if kind == "text" else line(**{EVENT_NAMES[kind]: text})
            if event.finish_reason not in (None, "stop"):
                yield line(cut=event.finish_reason)
    except EngineFailure as error:
        yield line(error=str(error))
    yield line(done=True)


def line(**fields) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"


class AnswerResponse(StreamingResponse):
    """Streams an answer, and gives its slot back however the stream ends: done, failed, or the client gone."""

    def __init__(self, answer: Answer, lines: AsyncIterator[str]):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies must not collect the tokens
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


class BodyLimit:
    """ASGI middleware: 413 for a request body over MAX_BODY, before it is held in memory."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        size = 0

        async def limited():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413, f"the request is larger than {MAX_BODY} bytes")
            return message

        await self.app(scope, limited, send)


async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """FastAPI's 422 with its list of objects becomes 400 with one line: the field and what is wrong with it."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body")
    return JSONResponse({"detail": f"{field or 'body'}: {first['msg']}"}, status_code=400)
