"""Limits the number of connections, and the time that a request may take to arrive.

uvicorn itself has no such limits. Without them, a few hundred clients that send nothing, or one byte a minute, could
take up all the connections that the process can hold. Then nobody else could connect. After a request has arrived,
this module sets no time limit, so a stream lasts as long as its answer.
"""

import asyncio
import contextlib
import functools
from typing import Any, cast

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat_jax.serve.middleware import BODY_SECONDS

HEAD_SECONDS = 10.0  # the time limit for receiving a request's first line and headers
GRACE_SECONDS = 2.0
SPARE_CONNECTIONS = 512  # connections for anything but answers: idle ones, and requests for the page or statistics
OTHER_FILES = 128  # open files that are not connections
MIN_CONNECTIONS = 8

TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
FULL = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 2\r\nContent-Length: 0\r\n\r\n"


class Connection(H11Protocol):
    """uvicorn's protocol, with limits.

    A connection is closed if the head of a request takes longer than HEAD_SECONDS to arrive. This also holds for a new
    connection that sends nothing. `Guard` limits the time for bodies that the application reads, and this class limits
    the time for all other bodies. A connection that waits for its next request is closed after `keep_alive` seconds
    (see `server_config`).

    At most `limit` connections are open at a time. If there are already that many, a new connection replaces the one
    that has waited longest for its client to send something. If all connections are busy with answers, the new one gets
    status 503.
    """

    def __init__(self, *args: Any, limit: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.limit = limit
        self.waits_for: str | None = None  # "head" or "body" of a request; "idle": between requests; None: busy
        self.waits_since = 0.0  # the event loop's time when `waits_for` last changed
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        others = cast("set[Connection]", self.connections)
        if len(others) >= self.limit:
            waiting = [other for other in others if other.waits_for]
            if not waiting:
                transport.write(FULL)
                transport.close()
                return
            longest = min(waiting, key=lambda other: other.waits_since)
            others.discard(longest)
            longest.transport.abort()
        super().connection_made(transport)
        self._wait_for("head")

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_for(None)
        if self.transport is not None:  # None if the connection was refused
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # starts the next request if the client has already sent it
        self._follow()

    def _follow(self) -> None:
        """Finds out what the client must send next, and starts the timer for it."""
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            self._wait_for("body")
        elif state is not h11.IDLE:
            self._wait_for(None)
        elif self.conn.trailing_data[0] or self.cycle is None:
            self._wait_for("head")
        else:
            self._wait_for("idle")

    def _wait_for(self, what: str | None) -> None:
        """Starts the timer for `what`, or stops the timer if `what` is None.

        A timer that already runs for `what` is not restarted. Otherwise, a client could keep the connection open by
        sending a byte now and then.
        """
        if what == self.waits_for:
            return
        if self._timer:
            self._timer.cancel()
        self.waits_for, self.waits_since, self._timer = what, self.loop.time(), None
        if what:
            # The GRACE_SECONDS give Guard time to answer 408 before the connection is closed.
            seconds = {"head": HEAD_SECONDS, "body": BODY_SECONDS + GRACE_SECONDS, "idle": self.timeout_keep_alive}
            self._timer = self.loop.call_later(seconds[what], self._too_slow)

    def _too_slow(self) -> None:
        if self.waits_for == "head" and self.conn.trailing_data[0]:
            self.transport.write(TOO_SLOW)
        self.transport.close()


def server_config(app: ASGIApp, keep_alive: float, answers: int) -> uvicorn.Config:
    """Returns uvicorn's settings for `app`, which runs or queues at most `answers` answers at a time.

    Only warnings are logged, because an access log would record who uses the server. WebSockets are off, because their
    connections would escape the limits.
    """
    limit = max(MIN_CONNECTIONS, file_limit(answers + SPARE_CONNECTIONS + OTHER_FILES) - OTHER_FILES)
    return uvicorn.Config(
        app,
        http=cast("type[asyncio.Protocol]", functools.partial(Connection, limit=limit)),
        ws="none",
        log_level="warning",
        timeout_keep_alive=cast(int, keep_alive),  # uvicorn passes it to `call_later`, which accepts a float
        headers=[("Keep-Alive", f"timeout={keep_alive:.0f}")],  # tells clients when an idle connection is closed
    )


def file_limit(wanted: int) -> int:
    """Raises the process's limit on open files to `wanted`, or as far as the system allows. Never lowers the limit.

    Returns the number of files that may now be open, at most `wanted`.
    """
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        return raised
    return soft
