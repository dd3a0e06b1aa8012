"""The one thread that owns the engine, and the way from the event loop to it and back.

The model computes for milliseconds at a time, and the event loop that talks to the clients must not wait for it. So
handlers only put a request on a queue and await events; the thread adds requests to the engine between two steps,
and hands every event back to the loop it came from.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator

from nanochat_jax.engine.engine import Engine, Event, Request

MAX_WAITING = 64  # requests that may wait for a slot; the next one is better off asking again later

log = logging.getLogger("nanochat_jax.serve")


class Busy(Exception):
    """Too many requests are waiting already."""


class EngineFailure(Exception):
    """The request cannot be answered; the text says why, in words a client may see."""


class Answer:
    """The answer to one request: an async iterator of the engine's events. Close it to give up its slot."""

    def __init__(self, worker: "EngineWorker", request: Request):
        self.request = request
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._events = asyncio.Queue()
        self.id: int | None = None  # the engine's name for the request; this and the next are the thread's
        self.unfinished = request.n  # samples still being generated

    async def __aiter__(self) -> AsyncIterator[Event]:
        while (event := await self._events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event

    def close(self) -> None:
        """Cancels what is left of the answer. Does nothing after its end, so it can always be called."""
        self._worker.cancel(self)

    def deliver(self, event: Event | Exception | None) -> None:
        """Called by the worker's thread with an event, and at the end with None or the exception to raise."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: the server has shut down, nobody listens
            log.debug("an event came after the end of the event loop")


class EngineWorker:
    """Runs `engine` in a background thread for any number of clients.

    The engine generates as many answers at once as it has slots; at most MAX_WAITING more requests wait for one.
    """

    def __init__(self, engine: Engine):
        self.slots = engine.slots
        self.failure: Exception | None = None
        self._engine = engine
        self._lock = threading.Lock()
        self._live: set[Answer] = set()  # submitted and not over; guarded by the lock, the rest is the thread's
        self._answers: dict[int, Answer] = {}  # what the engine is working on, by its ids
        self._inbox = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Ends the thread after the step it is in, and every answer that is not complete."""
        self._inbox.put(("stop", None))
        self._thread.join(timeout)

    @property
    def running(self) -> int:
        """Answers being generated."""
        return min(len(self._live), self.slots)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._live) - self.running

    def submit(self, request: Request) -> Answer:
        """Queues `request` and returns its answer at once. Busy if too many wait; EngineFailure if the engine died."""
        answer = Answer(self, request)
        with self._lock:
            if self.failure:
                raise EngineFailure("the model has stopped working; restart the server")
            if len(self._live) >= self.slots + MAX_WAITING:
                raise Busy
            self._live.add(answer)
        self._inbox.put(("add", answer))
        return answer

    def cancel(self, answer: Answer) -> None:
        with self._lock:
            live = answer in self._live
        if live:
            self._inbox.put(("cancel", answer))

    def _run(self) -> None:
        """Messages first, then one step; sleeps on the inbox when there is nothing to generate."""
        try:
            while self._read_inbox():
                for event in self._engine.step() if self._answers else ():
                    self._deliver(event)
            self._end_all(EngineFailure("the server is shutting down"))
        except Exception as error:  # an out-of-memory device, a bug: the engine's state is lost with it
            log.exception("the engine failed")
            self._end_all(EngineFailure("the model has stopped working; restart the server"), failure=error)

    def _read_inbox(self) -> bool:
        """Handles every message there is, waiting for one if the engine is idle. False: stop."""
        while not self._answers or not self._inbox.empty():
            kind, answer = self._inbox.get()
            if kind == "stop":
                return False
            if kind == "add":
                self._add(answer)
            else:
                self._cancel(answer)
        return True

    def _add(self, answer: Answer) -> None:
        try:
            answer.id = self._engine.add(answer.request)
            self._answers[answer.id] = answer
        except ValueError as error:  # the engine refuses this request and is well otherwise
            self._end(answer, EngineFailure(str(error)))

    def _cancel(self, answer: Answer) -> None:
        if answer.id in self._answers:  # otherwise it was over before the message arrived
            self._engine.cancel(answer.id)
            self._end(answer)

    def _deliver(self, event: Event) -> None:
        answer = self._answers[event.request]
        answer.deliver(event)
        answer.unfinished -= event.finish_reason is not None
        if not answer.unfinished:
            self._end(answer)

    def _end(self, answer: Answer, error: EngineFailure | None = None) -> None:
        self._answers.pop(answer.id, None)
        with self._lock:
            self._live.discard(answer)
        answer.deliver(error)

    def _end_all(self, error: EngineFailure, failure: Exception | None = None) -> None:
        with self._lock:
            self.failure = failure or error
            live, self._live = self._live, set()
        for answer in live:
            answer.deliver(error)
