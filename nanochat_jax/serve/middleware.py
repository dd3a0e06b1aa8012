"""Checks each request before it reaches the application: the Host header, the API key, and the size and upload time of
the body."""

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

# A client that is still sending its body might miss a 413 reply. So the server first reads an oversized body to its
# end, unless the body is larger than MAX_DRAINED.
MAX_DRAINED = 16 << 20  # bytes
BODY_SECONDS = 20  # the time limit for receiving a body, so that a slow client cannot hold a connection open
CLOSE = {"Connection": "close"}
PUBLIC = (*FILES, "/health")  # paths that need no key: the page must load before it can ask for the key


class Guard:
    """ASGI middleware. It answers 403 if the Host header is not allowed, 401 if the key is missing or wrong, 413 if the
    body is too large, and 408 if the body arrives too slowly. It also counts all error responses.

    `is_allowed` compares the Host header with `hosts`. If `hosts` is None, any Host header is accepted. A HEAD request
    is passed on as a GET request, and uvicorn leaves out the body of the response.
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
            scope = {**scope, "method": "GET"}  # a copy, because uvicorn must still see HEAD in the original
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
# The Host header, which reveals DNS rebinding. The owner of evil.example can let this name point to 127.0.0.1. The
# browser then takes this server for a part of evil.example, and lets a page from there read all answers. But the
# browser still sends the name evil.example in the Host header, so the server can refuse the request.


def accepted_hosts(host: str, allowed: str, api_key: str) -> list[str] | None:
    """Returns the names that a Host header may hold besides loopback addresses, or None if it may hold any name.

    `host` is the address to listen on. `allowed` is the value of --allowed_hosts. By default, the names are limited
    only if the server needs no key and can be reached only from this machine. If it needs a key, a page of another
    site cannot use it anyway. If other machines can reach it, they may know it by any name.
    """
    names = [name.strip().lower() for name in allowed.split(",") if name.strip()]
    if "*" in names or not (names or (not api_key and is_loopback(host))):
        return None
    return [*names, host.lower(), "localhost"]


def is_allowed(header: str, hosts: Sequence[str]) -> bool:
    """Whether a Host header, such as "localhost:8000", holds a name in `hosts` or a loopback address.

    A request without the header is allowed, because it is not from a browser: browsers always send the header.
    """
    name = header.strip().lower()
    if not name.endswith("]"):  # "[::1]" has no port
        name = name.rpartition(":")[0] or name
    name = name.strip("[]").removesuffix(".")
    return not name or name in hosts or is_loopback_address(name)


def is_loopback(host: str) -> bool:
    """Whether all addresses of `host`, which is a name or an address, are loopback addresses."""
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
