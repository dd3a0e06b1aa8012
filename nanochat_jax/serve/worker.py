"""The one thread that owns the engine, and the way from the event loop to it and back.

The model computes for milliseconds at a time, and the event loop that talks to the clients must not wait for it. So
handlers only put requests on a queue and await events; the thread adds requests to the engine between two steps, and
hands the events of a step back to the loop, all of them at once.
"""

import asyncio
import dataclasses
import json
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence

from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import Event, Request
from nanochat_jax.serve.metrics import Metrics

log = logging.getLogger("nanochat_jax.serve")


class Busy(Exception):
    """Too many requests are waiting already."""


class EngineFailure(Exception):
    """The request cannot be answered; the text says why, in words a client may see."""


class TimedOut(EngineFailure):
    """The answer took longer than it may."""


class Answer:
    """The answer to some requests of one client: an async iterator of the engine's events.

    `request` of an event is an index into `requests`. None among the events: nothing has happened for a while. Close
    the answer to give up its slots.
    """

    def __init__(self, worker: "EngineWorker", requests: Sequence[Request], place: int):
        self.requests = requests
        self.place = place  # in the queue for a slot, when they came; 0: there was a free one
        self.samples = sum(request.n for request in requests)
        self.seconds = worker.seconds
        self.gpu = worker.gpu
        self.ids = {}  # the engine's names for the requests -> index; this and the next are the thread's
        self.unfinished = {(i, s) for i, request in enumerate(requests) for s in range(request.n)}
        self.timing = Timing(time.monotonic())
        self.said: dict[tuple[int, int], list[int]] = {}  # tokens by request and sample, if they are logged
        self._worker = worker
        self._events = asyncio.Queue()

    async def events(self, patience: float) -> AsyncIterator[Event | None]:
        """The events as they come; None after every `patience` seconds without one.

        EngineFailure if they end early, TimedOut if that is for the time they take.
        """
        while True:
            left = self.timing.submitted + self.seconds - time.monotonic() if self.seconds else patience
            try:
                async with asyncio.timeout(max(0, min(patience, left))):
                    event = await self._events.get()
            except TimeoutError:
                if left <= patience and self.seconds:
                    self.close()
                    raise TimedOut(f"no complete answer within {self.seconds:g} seconds") from None
                yield None
                continue
            if event is None:
                return
            if isinstance(event, Exception):
                raise event
            yield event

    def cancel(self, request: int, sample: int) -> None:
        """Ends one sample that has begun."""
        self._worker.cancel(self, request, sample)

    def close(self) -> None:
        """Cancels what is left of the answer. Does nothing after its end, so it can always be called."""
        self._worker.cancel(self)

    def put(self, event: Event | Exception | None) -> None:
        """Called in the event loop with an event, and at the end with None or the exception to raise."""
        self._events.put_nowait(event)


@dataclasses.dataclass
class Timing:
    """When things happened to an answer (time.monotonic)."""

    submitted: float
    first: float | None = None  # token
    tokens: int = 0


class EngineWorker:
    """Runs `engine` in a background thread for any number of clients.

    The engine generates as many samples at once as it has slots; while `max_waiting` more wait for one, nobody else
    is let in. An answer may take `seconds` (0: as long as it takes). With `log_chats` prompts and answers are logged.
    While there is nothing to do, `warming` is asked to compile some more of what will be needed. `gpu` is its number
    among its like.
    """

    def __init__(
        self, engine: Engine, metrics: Metrics, max_waiting: int, seconds: float, log_chats: bool = False,
        warming: Iterator[int] | None = None, gpu: int = 0,
    ):  # fmt: skip
        self.slots, self.metrics, self.max_waiting, self.seconds = engine.slots, metrics, max_waiting, seconds
        self.log_chats, self.gpu = log_chats, gpu
        self._warming = warming or iter(())
        self.warming = warming is not None  # whether there is something left to compile
        self.failure: Exception | None = None
        self._engine = engine
        self._lock = threading.Lock()
        self._live: set[Answer] = set()  # submitted and not over; guarded by the lock, the rest is the thread's
        self._answers: dict[int, Answer] = {}  # what the engine is working on, by its ids
        self._inbox = queue.SimpleQueue()
        self._outbox: list[tuple[Answer, Event | Exception | None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Called in the event loop that will await the answers."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Lets the thread end after the step it is in, and with it every answer that is not complete."""
        self._inbox.put(("stop", None))

    def stop(self, timeout: float = 5.0) -> None:
        """The same, and waits for it."""
        self.ask_to_stop()
        self._thread.join(timeout)

    def stop_after(self, seconds: float) -> None:
        """Ends what is not complete after `seconds`. Whoever calls this lets nobody new in."""
        timer = threading.Timer(seconds, self._inbox.put, [("stop", None)])
        timer.daemon = True
        timer.start()

    @property
    def room(self) -> int:
        """Slots for which there is no sample yet; negative where samples wait."""
        return self.slots - self._samples()

    @property
    def running(self) -> int:
        """Samples being generated."""
        return min(self._samples(), self.slots)

    @property
    def waiting(self) -> int:
        """Samples that wait for a slot."""
        return max(0, self._samples() - self.slots)

    @property
    def cache_use(self) -> float:
        """Share of the cache that holds tokens."""
        return self._engine.cached / (self.slots * self._engine.model_cfg.sequence_len)

    def _samples(self) -> int:
        with self._lock:
            return sum(len(answer.unfinished) for answer in self._live)

    def submit(self, *requests: Request) -> Answer:
        """Queues `requests` and returns their answer at once. Busy if too many wait; EngineFailure if the engine died;
        UserError for what the engine cannot do, which in its own thread would end the service for all."""
        for request in requests:
            self._engine.check(request)
        with self._lock:
            if self.failure:
                raise EngineFailure("the model has stopped working; restart the server")
            live = sum(len(answer.unfinished) for answer in self._live)
            if live >= self.slots + self.max_waiting:
                raise Busy
            answer = Answer(self, requests, max(0, live - self.slots + 1))
            self._live.add(answer)
        self._inbox.put(("add", answer))
        return answer

    def cancel(self, answer: Answer, *which: int) -> None:
        """Ends `answer`, or of it only the sample (request, sample)."""
        with self._lock:
            live = answer in self._live
        if live:
            self._inbox.put(("cancel", answer, *which))

    # -----------------------------------------------------------------------------
    # In the thread

    def _run(self) -> None:
        """Messages first, then one step; sleeps on the inbox when there is nothing to generate."""
        try:
            while self._read_inbox():
                for event in self._engine.step() if self._answers else ():
                    self._take(event)
                self._send_outbox()
            self._end_all(EngineFailure("the server is shutting down"))
        except Exception as error:  # an out-of-memory device, a bug: the engine's state is lost with it
            log.exception("the engine failed")
            self._end_all(EngineFailure("the model has stopped working; restart the server"), failure=error)

    def _read_inbox(self) -> bool:
        """Handles every message there is, warming the engine or waiting for one if it is idle. False: stop."""
        while not self._answers or not self._inbox.empty():
            if self._inbox.empty() and self.warming:
                self._warm()
                continue
            kind, *message = self._inbox.get()
            if kind == "stop":
                return False
            if kind == "add":
                self._add(*message)
            else:
                self._cancel(*message)
            self._send_outbox()
        return True

    def _warm(self) -> None:
        """Compiles some more. What fails there (a program too large for the memory) nobody may ever ask for: whoever
        does will see it fail."""
        try:
            self.warming = next(self._warming, None) is not None
        except Exception as error:
            self.warming = False
            log.warning("compiling ahead has ended: %s", (str(error).splitlines() or [type(error).__name__])[0])

    def _add(self, answer: Answer) -> None:
        for i, request in enumerate(answer.requests):
            id = self._engine.add(request)
            answer.ids[id] = i
            self._answers[id] = answer

    def _cancel(self, answer: Answer, request: int | None = None, sample: int | None = None) -> None:
        for id, i in answer.ids.items():
            if request in (None, i) and self._answers.get(id) is answer:  # otherwise it was over before the message
                self._engine.cancel(id, sample)
        left = {(i, s) for i, s in answer.unfinished if (i, s) != (request, sample)} if request is not None else set()
        with self._lock:
            answer.unfinished = left
        if not left:
            self._end(answer, "cancelled" if request is None else "stop")

    def _take(self, event: Event) -> None:
        answer, now = self._answers[event.request], time.monotonic()
        index, timing = answer.ids[event.request], answer.timing
        if (index, event.sample) not in answer.unfinished:
            return
        if timing.first is None:
            timing.first = now
            self.metrics.first_token.observe(now - timing.submitted)
            self.metrics.prompt_tokens.inc(sum(len(request.ids) for request in answer.requests))
        self.metrics.reused_tokens.inc(event.cached_tokens)
        timing.tokens += len(event.ids)
        self.metrics.generated_tokens.inc(len(event.ids))
        if self.log_chats:
            answer.said.setdefault((index, event.sample), []).extend(event.ids)
        self._outbox.append((answer, dataclasses.replace(event, request=index)))
        if event.finish_reason is not None:
            with self._lock:
                answer.unfinished.discard((index, event.sample))
            if not answer.unfinished:
                self._end(answer, event.finish_reason)

    def _end(self, answer: Answer, reason: str, error: EngineFailure | None = None) -> None:
        for id in answer.ids:
            self._answers.pop(id, None)
        with self._lock:
            if answer not in self._live:
                return
            self._live.discard(answer)
        self.metrics.ended(answer, reason)
        if self.log_chats:
            decode = self._engine.tokenizer.decode
            for i, request in enumerate(answer.requests):
                answers = [decode(ids) for (j, _), ids in sorted(answer.said.items()) if i == j]
                log.warning(json.dumps({"prompt": decode(request.ids), "answers": answers, "end": reason}))
        self._outbox.append((answer, error))

    def _end_all(self, error: EngineFailure, failure: Exception | None = None) -> None:
        with self._lock:
            self.failure = failure or error
            live = list(self._live)
        for answer in live:
            self._end(answer, "failed", error)
        self._send_outbox()

    def _send_outbox(self) -> None:
        """Wakes the event loop once for everything there is: waking it for each event would take it longer."""
        sent, self._outbox = self._outbox, []

        def put_all() -> None:
            for answer, event in sent:
                answer.put(event)

        if sent:
            try:
                self._loop.call_soon_threadsafe(put_all)
            except RuntimeError:  # the loop is closed: the server has shut down, nobody listens
                log.debug("events came after the end of the event loop")
