"""What a client gets for an answer: a stream of events, or one JSON object at its end.

However a reply ends (complete, failed, too late, the client gone), the slots of its answer are given back.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi.responses import Response, StreamingResponse

from nanochat_jax.serve.worker import Answer

GRACE = 15  # seconds a client gets to read the end of an answer that has run out of time
PATIENCE = 15  # seconds of silence after which a stream shows that it is alive, so that no proxy gives up on it
HEARTBEAT = ": still here\n\n"  # a comment, which readers of event streams skip
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies must not collect the tokens


class Reply(Response):
    """Sends `content`, a stream's lines or the way to a whole response, as long as the client is there."""

    def __init__(self, answer: Answer, content: AsyncIterator[str] | Callable[[], Awaitable[Response]]):
        self.background = None
        self._answer, self._content = answer, content

    async def __call__(self, scope, receive, send) -> None:
        work = asyncio.ensure_future(self._respond(scope, receive, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            longest = self._answer.seconds + GRACE if self._answer.seconds else None
            await asyncio.wait((work, gone), timeout=longest, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._answer.close()
            finished, left = work.done(), gone.done()
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if finished and not left:
            work.result()  # raises what went wrong

    async def _respond(self, scope, receive, send) -> None:
        if isinstance(self._content, AsyncIterator):
            stream = StreamingResponse(self._content, media_type="text/event-stream", headers=STREAM_HEADERS)
            async with contextlib.aclosing(self._content):
                await stream.stream_response(send)
        else:
            response = await self._content()
            await response(scope, receive, send)


async def _gone(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def data(value: dict | str) -> str:
    """An event of a stream."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"data: {text}\n\n"
