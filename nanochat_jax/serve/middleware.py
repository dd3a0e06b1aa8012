"""Checks each request before it reaches the application: the API key, the size of the body, and its upload time."""

import asyncio
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_jax.serve import errors
from nanochat_jax.serve.errors import ApiError
from nanochat_jax.serve.metrics import Metrics
from nanochat_jax.serve.page import FILES

MAX_BODY = 1 << 20  # bytes; enough for schema.MAX_CHARS characters, even if JSON escapes every character

# A client that is still sending its body may not read a 413 reply. So the server first reads an oversized body to its
# end, but reads at most this many bytes.
MAX_DRAINED = 16 << 20
BODY_SECONDS = 30  # the time limit for receiving a body, so that a slow client cannot hold a connection open
CLOSE = {"Connection": "close"}
PUBLIC = (*FILES, "/health")  # paths that need no key: the page must load before it can ask for the key


class Guard:
    """ASGI middleware. It answers 401 if the key is missing or wrong, 413 if the body is too large, and 408 if the body
    arrives too slowly. It also counts all error responses."""

    def __init__(self, app: ASGIApp, api_key: str, metrics: Metrics):
        self.app, self.api_key, self.metrics = app, api_key.encode(), metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self.metrics.refused.labels(message["status"]).inc()
            await send(message)

        if self.api_key and scope["path"] not in PUBLIC and not self._has_key(scope):
            error = ApiError(
                401,
                "a key is required: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            return await errors.error_response(scope["path"], error)(scope, receive, counting_send)
        await self.app(scope, self._limited(receive), counting_send)

    def _has_key(self, scope: Scope) -> bool:
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = header.partition(b" ")
        # compare_digest takes constant time. The duration of == would reveal how much of the key was right.
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.api_key)

    @staticmethod
    def _limited(receive: Receive) -> Receive:
        """Wraps `receive` so that it raises ApiError if the body is too large or arrives too slowly. The wrapper
        never holds a whole oversized body in memory."""
        size, more = 0, True
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS

        async def limited() -> Message:
            if not more:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await next_part()
                    while size > MAX_BODY and more and size <= MAX_DRAINED:
                        await next_part()
            except TimeoutError:
                reason = f"the request did not arrive within {BODY_SECONDS} seconds"
                raise ApiError(408, reason, headers=CLOSE) from None
            if size > MAX_BODY:
                raise ApiError(413, f"the request is larger than {MAX_BODY} bytes", headers=CLOSE)
            return message

        async def next_part() -> Message:
            nonlocal size, more
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            return message

        return limited
