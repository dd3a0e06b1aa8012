"""The HTTP response that sends an answer: a stream of server-sent events, or a single JSON object.

The answer's slots become free when the response completes, fails or times out, or when the client disconnects.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable

from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from nanochat_jax.serve.worker import Answer

READ_GRACE = 15  # for how many seconds after the answer's timeout the client may still read the response
HEARTBEAT_SECONDS = 15  # a stream that is silent for this long sends a heartbeat, so that proxies keep it open
HEARTBEAT = ": still here\n\n"  # a comment, which clients of event streams ignore
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies must not cache or buffer streams


class AnswerResponse(Response):
    """Sends `content` until it is complete or the client disconnects. Then closes `answer`.

    `content` is either a generator of server-sent events, or a function that waits for the answer and returns a
    response.
    """

    def __init__(self, answer: Answer, content: AsyncGenerator[str, None] | Callable[[], Awaitable[Response]]):
        self.background = None
        self._answer, self._content = answer, content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(scope, receive, send))
        disconnect = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            longest = self._answer.timeout + READ_GRACE if self._answer.timeout else None
            await asyncio.wait((sending, disconnect), timeout=longest, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._answer.close()
            finished, disconnected = sending.done(), disconnect.done()
            for task in (sending, disconnect):
                task.cancel()
            await asyncio.gather(sending, disconnect, return_exceptions=True)
        if finished and not disconnected:
            sending.result()  # raises the task's exception if the task failed

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        if isinstance(self._content, AsyncGenerator):
            stream = StreamingResponse(self._content, media_type="text/event-stream", headers=STREAM_HEADERS)
            async with contextlib.aclosing(self._content):
                await stream.stream_response(send)
        else:
            response = await self._content()
            await response(scope, receive, send)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def sse(value: dict | str) -> str:
    """Returns a server-sent event: {"done": True} -> 'data: {"done": true}' and an empty line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"data: {text}\n\n"
