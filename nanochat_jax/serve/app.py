"""The web server's endpoints for the page, health and statistics. OpenAI's API is in openai_api.py.

The response to `POST /chat/completions` is a stream of server-sent events. Each event is one of these JSON objects:

    {"dropped": n}                               the oldest n messages did not fit into the context
    {"waiting": position}                        no slot is free yet; `position` is the request's place in the queue
    {"token": text, "gpu": n}                    more text of the answer, generated on GPU n
    {"python": expression}, {"output": result}   a call to the calculator, and its result
    {"cut": "length"}                            the answer ended at its maximum length
    {"error": text}                              the answer failed
    {"done": true}                               the last event of every stream

If the last message of a conversation has the role "assistant", the answer continues that message. An invalid request
gets status 400 and the body {"detail": reason}. Conversations are logged only if --log_chats is set.
"""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import repeat

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.middleware.cors import CORSMiddleware

from nanochat_jax.config import ChatWeb
from nanochat_jax.conversation import PartReader
from nanochat_jax.engine.engine import Engine
from nanochat_jax.serve import errors, openai_api, page, schema
from nanochat_jax.serve.metrics import CONTENT_TYPE, Metrics
from nanochat_jax.serve.middleware import Guard, accepted_hosts
from nanochat_jax.serve.pool import Pool
from nanochat_jax.serve.responses import HEARTBEAT, HEARTBEAT_SECONDS, AnswerResponse, sse
from nanochat_jax.serve.schema import ChatBody
from nanochat_jax.serve.worker import Answer, EngineFailure, EngineWorker
from nanochat_jax.tokenizer import Tokenizer

EVENT_NAMES = {"python": "python", "python_output": "output"}


def create_app(
    engines: Sequence[Engine],
    cfg: ChatWeb,
    name: str,
    device: str = "cpu",
    warmups: Sequence[Iterator[int]] = (),
    suggestions: Sequence[str] = (),
) -> FastAPI:
    """Returns the application that serves `engines`, which are replicas of one model. Nothing else may use the engines
    after this call.

    `name` is the model name that clients see. `device` is the kind of device that /health and /stats show.
    `warmups` holds one `Engine.warmup` iterator per engine. The iterators may already be partly consumed. While an
    engine is idle, the server advances the engine's iterator in a separate thread. `suggestions` are questions that the
    page suggests.
    """
    metrics, engine = Metrics(), engines[0]
    max_waiting = -(-cfg.max_waiting // len(engines))
    pool = Pool(
        [
            EngineWorker(each, metrics, max_waiting, cfg.timeout, cfg.log_chats, warmup, gpu)
            for gpu, (each, warmup) in enumerate(zip(engines, warmups or repeat(None), strict=False))
        ]
    )
    pool.publish(metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        pool.start()
        yield
        await run_in_threadpool(pool.stop)

    # FastAPI's documentation pages are off, because they load scripts from other servers. /openapi.json stays on.
    app = FastAPI(
        title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None, exception_handlers=errors.handlers()
    )
    app.state.pool = pool
    hosts = accepted_hosts(cfg.host, cfg.allowed_hosts, cfg.api_key)
    app.add_middleware(Guard, api_key=cfg.api_key, hosts=hosts, metrics=metrics)
    # The middleware added last runs first. CORSMiddleware must run before Guard, because Guard would refuse preflight
    # requests: they carry no key. All headers are allowed, because OpenAI's JavaScript client sends a dozen headers of
    # its own (x-stainless-*). The list of origins is protection enough. Cookies are not allowed, because the server
    # uses none.
    if cfg.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[origin.strip().rstrip("/") for origin in cfg.cors.split(",")],
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            allow_private_network=True,  # lets a page from the internet use a server in a local network
            expose_headers=["Retry-After"],
        )
    app.include_router(openai_api.routes(engine, pool, cfg, name))
    app.include_router(page.routes())

    @app.get("/health")
    async def health():
        ready = pool.failure is None
        body = {
            "status": "ok" if ready else "failed",
            "ready": ready,
            "num_gpus": 0 if device == "cpu" else len(pool.alive),
            "devices": f"{len(pool.alive)} {device}",
            "available_workers": pool.slots - pool.running,
            "model": name,
            "context": engine.model_cfg.sequence_len,
            "defaults": {
                "temperature": cfg.temperature,
                "top_k": cfg.top_k,
                "max_tokens": min(cfg.max_new_tokens, engine.model_cfg.sequence_len),
            },
            "suggestions": list(suggestions),
        }
        return JSONResponse(body, status_code=200 if ready else 503)

    @app.get("/stats")
    async def stats():
        return {
            "total_workers": pool.slots,
            "available_workers": pool.slots - pool.running,
            "busy_workers": pool.running,
            "waiting": pool.waiting,
            "warming": pool.warming,
            "workers": [{"gpu_id": worker.gpu, "device": device} for worker in pool.alive for _ in range(worker.slots)],
        }

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus():
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.post("/chat/completions")
    async def chat_completions(body: ChatBody):
        # Tokenizing would block the event loop, so it runs in another thread.
        request, dropped = await run_in_threadpool(schema.chat_request, body, engine, cfg)
        answer = schema.submit(pool, request)
        return AnswerResponse(answer, events(answer, engine.tokenizer, dropped))

    return app


async def events(answer: Answer, tokenizer: Tokenizer, dropped: int) -> AsyncGenerator[str, None]:
    """Yields the server-sent events of POST /chat/completions."""
    if dropped:
        yield sse({"dropped": dropped})
    if answer.queue_position:
        yield sse({"waiting": answer.queue_position})
    reader = PartReader(tokenizer)
    try:
        async for event in answer.events(HEARTBEAT_SECONDS):
            if event is None:
                yield HEARTBEAT
                continue
            for kind, text in reader.read(event.ids, end=event.finish_reason is not None):
                yield sse({"token": text, "gpu": answer.gpu} if kind == "text" else {EVENT_NAMES[kind]: text})
            if event.finish_reason not in (None, "stop"):
                yield sse({"cut": event.finish_reason})
    except EngineFailure as error:
        yield sse({"error": str(error)})
    yield sse({"done": True})
