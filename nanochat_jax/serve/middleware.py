"""Checks each request before it reaches the application: the Host header, the API key, the size of the body, and its
upload time."""

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_jax.serve import errors
from nanochat_jax.serve.errors import ApiError
from nanochat_jax.serve.metrics import Metrics
from nanochat_jax.serve.page import FILES

MAX_BODY = 1 << 20  # bytes; enough for schema.MAX_CHARS characters, even if JSON escapes every character

# A client that is still sending its body may not read a 413 reply. So the server first reads an oversized body to its
# end, but reads at most this many bytes.
MAX_DRAINED = 16 << 20
BODY_SECONDS = 20  # the time limit for receiving a body, so that a slow client cannot hold a connection open
CLOSE = {"Connection": "close"}
PUBLIC = (*FILES, "/health")  # paths that need no key: the page must load before it can ask for the key


class Guard:
    """ASGI middleware. It answers 403 if the Host header is none of `hosts`, 401 if the key is missing or wrong, 413 if
    the body is too large, and 408 if the body arrives too slowly. It also counts all error responses.

    A HEAD request is treated like GET. uvicorn then leaves out the body.

    If `hosts` is None, any Host header is accepted.
    """

    def __init__(self, app: ASGIApp, api_key: str, hosts: Sequence[str] | None, metrics: Metrics):
        self.app, self.api_key, self.hosts, self.metrics = app, api_key.encode(), hosts, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self.metrics.refused.labels(message["status"]).inc()
            await send(message)

        headers = dict(scope["headers"])
        if self.hosts is not None and not is_allowed(headers.get(b"host", b"").decode("latin-1"), self.hosts):
            return await errors.error_response(scope["path"], _wrong_host(headers))(scope, receive, counting_send)
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # a copy; uvicorn looks at the original
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


# -----------------------------------------------------------------------------
# The Host header. A page of evil.example can let its name point to 127.0.0.1 (DNS rebinding). The browser then takes
# this server for a part of evil.example, and the page may read all answers. But the browser still sends the name.


def accepted_hosts(host: str, allowed: str, api_key: str) -> list[str] | None:
    """Returns the names that a Host header may hold, besides addresses. Returns None if it may hold any name.

    `host` is the address to listen on. `allowed` is the value of --allowed_hosts. By default, the names are limited
    only if the server can be reached from this machine alone and needs no key. A page of another site has no key, and
    other machines may know the server by any name.
    """
    names = [name.strip().lower() for name in allowed.split(",") if name.strip()]
    if "*" in names or not (names or (not api_key and is_loopback(host))):
        return None
    return [*names, host.lower(), "localhost"]


def is_allowed(header: str, hosts: Sequence[str]) -> bool:
    """Whether a Host header, such as "localhost:8000", holds one of the names `hosts` or a loopback address.

    A request without the header is allowed, because browsers always send it.
    """
    name = header.strip().lower()
    if not name.endswith("]"):  # "[::1]" has no port
        name = name.rpartition(":")[0] or name
    name = name.strip("[]").removesuffix(".")
    return not name or name in hosts or is_loopback_address(name)


def is_loopback(host: str) -> bool:
    """Whether all addresses of `host`, an address or a name, are loopback addresses."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(is_loopback_address(str(address[0])) for *_, address in found)


def is_loopback_address(text: str) -> bool:
    """Whether `text` is a loopback address. False for names."""
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False


def _wrong_host(headers: dict[bytes, bytes]) -> ApiError:
    name = headers.get(b"host", b"").decode("latin-1")[:80]
    fix = "start it with --allowed_hosts=NAME to serve it under another name"
    return ApiError(403, f"this server does not serve the host {name!r}: {fix}", code="host_not_allowed", headers=CLOSE)
