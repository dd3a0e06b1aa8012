"""What a request must pass on its way to the application: the key, and limits on the size and time of its body."""

import asyncio
import hmac

from nanochat_jax.serve import errors
from nanochat_jax.serve.errors import ApiError
from nanochat_jax.serve.metrics import Metrics
from nanochat_jax.serve.page import FILES

MAX_BODY = 1 << 20  # bytes; 32,000 characters, each escaped, are well below it
MAX_DISCARDED = 16 << 20  # so much of a larger body is read all the same, since who is still sending hears no answer
BODY_SECONDS = 30  # a client that sends its request by the drop holds a connection no longer than this
CLOSE = {"Connection": "close"}
OPEN = (*FILES, "/health")  # what needs no key: the page asks for it


class Guard:
    """ASGI middleware: 401 without the key, 413 and 408 for a body too large or too slow; counts what is refused."""

    def __init__(self, app, api_key: str, metrics: Metrics):
        self.app, self.api_key, self.metrics = app, api_key.encode(), metrics

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted(message):
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self.metrics.refused.labels(message["status"]).inc()
            await send(message)

        if self.api_key and scope["path"] not in OPEN and not self._has_key(scope):
            error = ApiError(
                401, "a key is needed: Authorization: Bearer KEY", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
            return await errors.response(scope["path"], error)(scope, receive, counted)
        await self.app(scope, self._limited(receive), counted)

    def _has_key(self, scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        # In constant time: how long a comparison takes would tell how much of the key was right.
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.api_key)

    @staticmethod
    def _limited(receive):
        """`receive`, which raises once the body is larger or slower than allowed; before it is held in memory."""
        size, more = 0, True
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS

        async def limited():
            if not more:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await next_part()
                    while size > MAX_BODY and more and size <= MAX_DISCARDED:
                        await next_part()
            except TimeoutError:
                raise ApiError(
                    408, f"the request did not arrive within {BODY_SECONDS} seconds", headers=CLOSE
                ) from None
            if size > MAX_BODY:
                raise ApiError(413, f"the request is larger than {MAX_BODY} bytes", headers=CLOSE)
            return message

        async def next_part():
            nonlocal size, more
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            return message

        return limited
