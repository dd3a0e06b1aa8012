"""Runs an engine in its own thread, and connects this thread to the event loop with queues.

A step of the engine takes milliseconds. The event loop serves all clients, so it must not wait for a step. The HTTP
handlers therefore only put requests on a queue and await events. The thread adds requests to the engine between steps.
After each step, it passes all events of the step to the event loop in one call.
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
from nanochat_jax.serve.compiler import Compiler
from nanochat_jax.serve.metrics import Metrics

log = logging.getLogger("nanochat_jax.serve")

SHUTTING_DOWN = "the server is shutting down"
STOPPED_WORKING = "the model has stopped working; restart the server"
NOT_COMPILED = "the model cannot run this request: a program was not compiled; the server's log has the reason"


class Busy(Exception):
    """Raised if the server has no room for the requests' samples now."""


class TooMany(Exception):
    """Raised if even an idle server has no room for the requests' samples."""


class EngineFailure(Exception):
    """Raised if a request cannot be answered. The message may be shown to the client."""


class TimedOut(EngineFailure):
    """Raised if an answer takes longer than its timeout."""


class Answer:
    """The answer to one client's requests. `close` frees its slots.

    `events` yields the engine's events. In these events, `request` is an index into `requests`.
    """

    def __init__(self, worker: "EngineWorker", requests: Sequence[Request], queue_position: int):
        self.requests = requests
        self.queue_position = queue_position  # position in the queue when submitted; 0 if a slot was free
        self.samples = sum(request.n for request in requests)
        self.timeout = worker.timeout
        self.gpu = worker.gpu
        self.submitted = time.monotonic()
        # The worker's thread changes the attributes from here to `logged_ids`.
        self.indices: dict[int, int] = {}  # the engine's request id -> index in `requests`
        self.unfinished = {(i, s) for i, request in enumerate(requests) for s in range(request.n)}
        self.first_token_at: float | None = None  # time.monotonic() at the first token
        self.generated = 0  # the number of tokens so far, over all samples
        self.logged_ids: dict[tuple[int, int], list[int]] = {}  # (request, sample) -> tokens; empty without log_chats
        self._worker = worker
        self._events: asyncio.Queue[Event | Exception | None] = asyncio.Queue()

    async def events(self, heartbeat: float) -> AsyncIterator[Event | None]:
        """Yields each event when it arrives, and None after every `heartbeat` seconds without an event.

        Raises TimedOut if the answer takes longer than `timeout`. Raises EngineFailure if the engine fails or stops.
        """
        while True:
            left = self.submitted + self.timeout - time.monotonic() if self.timeout else heartbeat
            try:
                async with asyncio.timeout(max(0, min(heartbeat, left))):
                    event = await self._events.get()
            except TimeoutError:
                if left <= heartbeat and self.timeout:
                    self.close()
                    raise TimedOut(f"no complete answer within {self.timeout:g} seconds") from None
                yield None
                continue
            if event is None:
                return
            if isinstance(event, Exception):
                raise event
            yield event

    def cancel(self, request: int, sample: int) -> None:
        """Ends one sample, which the engine must already have started."""
        self._worker.cancel(self, request, sample)

    def close(self) -> None:
        """Cancels the unfinished samples, if any. May be called at any time."""
        self._worker.cancel(self)

    def put(self, event: Event | Exception | None) -> None:
        """Queues an item for `events`: an Event to yield, an exception to raise, or None to end the iteration.

        Must be called in the event loop.
        """
        self._events.put_nowait(event)

    def seconds_per_token(self) -> float | None:
        """Returns the mean time between successive tokens of a sample, in seconds. Returns None if there are too few
        tokens."""
        later = self.generated - self.samples  # the number of tokens, not counting the first token of each sample
        if self.first_token_at is None or later <= 0:
            return None
        return (time.monotonic() - self.first_token_at) * self.samples / later


class EngineWorker:
    """Runs `engine` in a background thread for any number of clients.

    The engine generates at most one sample per slot at a time, and at most `max_waiting` more samples wait for a slot.
    Requests for more samples are refused. An answer may take at most `timeout` seconds (0: no limit). With
    `log_chats`, prompts and answers are logged. `gpu` is the worker's number in its pool.

    A second thread compiles programs (see compiler.py). A request whose programs are not yet compiled waits outside the
    engine, and does not hold up other answers. While the engine is idle, the second thread advances `warmup`, which
    compiles programs that no request has asked for yet.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        max_waiting: int,
        timeout: float,
        log_chats: bool = False,
        warmup: Iterator[int] | None = None,
        gpu: int = 0,
    ):
        self.slots, self.metrics, self.max_waiting, self.timeout = engine.slots, metrics, max_waiting, timeout
        self.log_chats, self.gpu = log_chats, gpu
        self.failure: Exception | None = None
        self._engine = engine
        self._lock = threading.Lock()
        # `_lock` guards `_open_answers`. Only the engine's thread changes `_answers` and `_outbox`.
        self._open_answers: set[Answer] = set()  # the answers that have not ended
        self._answers: dict[int, Answer] = {}  # the engine's request id -> the answer in progress
        self._inbox: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        self._outbox: list[tuple[Answer, Event | Exception | None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._compiler = Compiler(engine, warmup, is_idle=lambda: not self._answers)

    def start(self) -> None:
        """Starts the threads. Must be called in the event loop that awaits the answers."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._compiler.start()

    def ask_to_stop(self) -> None:
        """Makes the threads end after their current work. Unfinished answers then fail."""
        self._inbox.put(("stop",))
        self._compiler.ask_to_stop()

    def stop(self, timeout: float = 5.0) -> None:
        """Asks the threads to stop, and waits at most `timeout` seconds for them to end."""
        deadline = time.monotonic() + timeout
        self.ask_to_stop()
        self._thread.join(timeout)
        self._compiler.join(max(0.0, deadline - time.monotonic()))

    def stop_after(self, seconds: float) -> None:
        """Starts a timer that stops the threads after `seconds`. The caller must accept no new requests from now on."""
        timer = threading.Timer(seconds, self.ask_to_stop)
        timer.daemon = True
        timer.start()

    @property
    def warming(self) -> bool:
        """Whether there are programs left to compile in advance."""
        return self._compiler.warming

    @property
    def free_slots(self) -> int:
        """The number of slots minus the number of unfinished samples. This is negative if samples are waiting."""
        return self.slots - self._unfinished()

    @property
    def running(self) -> int:
        """The number of samples that are being generated."""
        return min(self._unfinished(), self.slots)

    @property
    def waiting(self) -> int:
        """The number of samples that are waiting for a slot."""
        return max(0, self._unfinished() - self.slots)

    @property
    def cache_use(self) -> float:
        """The share of the cache that holds tokens, from 0 to 1."""
        return self._engine.cached / (self.slots * self._engine.model_cfg.sequence_len)

    def _unfinished(self) -> int:
        """Returns the number of unfinished samples, running or waiting."""
        with self._lock:
            return sum(len(answer.unfinished) for answer in self._open_answers)

    def submit(self, *requests: Request) -> Answer:
        """Queues `requests` and returns their Answer at once.

        Raises Busy if there is no room for the samples now, TooMany if even an idle server has no room for them,
        EngineFailure if the engine has failed, and UserError if the engine cannot serve a request. Requests are checked
        here because an error in the engine's thread would stop the service for all clients.
        """
        for request in requests:
            self._engine.check(request)
        samples, room = sum(request.n for request in requests), self.slots + self.max_waiting
        if samples > room:
            raise TooMany(f"{samples} answers in one request, but one GPU of this server takes at most {room} at once")
        with self._lock:
            if self.failure:
                raise EngineFailure(STOPPED_WORKING)
            unfinished = sum(len(answer.unfinished) for answer in self._open_answers)
            if unfinished + samples > room:
                raise Busy
            answer = Answer(self, requests, max(0, unfinished - self.slots + 1))
            self._open_answers.add(answer)
        self._inbox.put(("add", answer))
        return answer

    def cancel(self, answer: Answer, *which: int) -> None:
        """Ends `answer`. If `which` is (request index, sample number), ends only this sample."""
        with self._lock:
            is_open = answer in self._open_answers
        if is_open:
            self._inbox.put(("cancel", answer, *which))

    # -----------------------------------------------------------------------------
    # Methods that run in the thread

    def _run(self) -> None:
        """Handles messages between steps. Waits for a message if there is nothing to generate."""
        try:
            while self._read_inbox():
                for event in self._engine.step() if self._answers else ():
                    self._handle(event)
                self._send_outbox()
            self._end_all(EngineFailure(SHUTTING_DOWN))
        except Exception as error:  # out of device memory, or a bug; the engine's state is lost
            log.exception("the engine failed")
            self._end_all(EngineFailure(STOPPED_WORKING), failure=error)

    def _read_inbox(self) -> bool:
        """Handles all messages in the inbox. Returns False after the message "stop", otherwise True.

        If the engine is idle and the inbox is empty, waits for a message.
        """
        while not self._answers or not self._inbox.empty():
            kind, *arguments = self._inbox.get()
            if kind == "stop":
                return False
            if kind == "add":
                self._add(*arguments)
            else:
                self._cancel(*arguments)
            self._send_outbox()
        return True

    def _add(self, answer: Answer, compile: bool = True) -> None:
        """Adds the answer's requests to the engine.

        If programs are missing, they are compiled first. If `compile` is False, the answer fails instead, because
        compiling has failed before.
        """
        with self._lock:
            if answer not in self._open_answers:  # ended while its programs were being compiled
                return
        if missing := self._engine.missing(list(answer.requests)):
            if not compile:  # a step without the program would raise an error, which would end all answers
                self._end(answer, "failed", EngineFailure(NOT_COMPILED))
                return
            # Requests that are added in the meantime may change which programs are needed, so the next `_add` checks
            # again.
            self._compiler.compile(missing, then=lambda done: self._inbox.put(("add", answer, done)))
            return
        for i, request in enumerate(answer.requests):
            id = self._engine.add(request)
            answer.indices[id] = i
            self._answers[id] = answer

    def _cancel(self, answer: Answer, request: int | None = None, sample: int | None = None) -> None:
        for id, i in answer.indices.items():
            if request in (None, i) and self._answers.get(id) is answer:  # skips requests that have ended
                self._engine.cancel(id, sample)
        left = {(i, s) for i, s in answer.unfinished if (i, s) != (request, sample)} if request is not None else set()
        with self._lock:
            answer.unfinished = left
        if not left:
            self._end(answer, "cancelled" if request is None else "stop")

    def _handle(self, event: Event) -> None:
        """Counts an event in the metrics and adds it to the outbox. Ends the answer after its last event."""
        answer = self._answers[event.request]
        index = answer.indices[event.request]
        if (index, event.sample) not in answer.unfinished:
            return
        if answer.first_token_at is None:
            answer.first_token_at = time.monotonic()
            self.metrics.first_token.observe(answer.first_token_at - answer.submitted)
            self.metrics.prompt_tokens.inc(sum(len(request.ids) for request in answer.requests))
        self.metrics.cached_tokens.inc(event.cached_tokens)
        answer.generated += len(event.ids)
        self.metrics.generated_tokens.inc(len(event.ids))
        if self.log_chats:
            answer.logged_ids.setdefault((index, event.sample), []).extend(event.ids)
        self._outbox.append((answer, dataclasses.replace(event, request=index)))
        if event.finish_reason is not None:
            with self._lock:
                answer.unfinished.discard((index, event.sample))
            if not answer.unfinished:
                self._end(answer, event.finish_reason)

    def _end(self, answer: Answer, reason: str, error: EngineFailure | None = None) -> None:
        for id in answer.indices:
            self._answers.pop(id, None)
        with self._lock:
            if answer not in self._open_answers:
                return
            self._open_answers.discard(answer)
        self.metrics.answers.labels(reason).inc()
        if (seconds := answer.seconds_per_token()) is not None:
            self.metrics.per_token.observe(seconds)
        if self.log_chats:
            self._log(answer, reason)
        self._outbox.append((answer, error))

    def _log(self, answer: Answer, reason: str) -> None:
        """Logs one JSON object per request: the prompt, the samples, and why the answer ended."""
        decode = self._engine.tokenizer.decode
        for i, request in enumerate(answer.requests):
            samples = [decode(ids) for (j, _), ids in sorted(answer.logged_ids.items()) if i == j]
            log.warning(json.dumps({"prompt": decode(request.ids), "answers": samples, "end": reason}))

    def _end_all(self, error: EngineFailure, failure: Exception | None = None) -> None:
        with self._lock:
            self.failure = failure or error
            unfinished = list(self._open_answers)
        for answer in unfinished:
            self._end(answer, "failed", error)
        self._send_outbox()

    def _send_outbox(self) -> None:
        """Passes the whole outbox to the event loop in one call, because one call per event would take longer."""
        outbox, self._outbox = self._outbox, []

        def put_all() -> None:
            for answer, event in outbox:
                answer.put(event)

        if outbox:
            assert self._loop is not None, "start() must set the event loop before the thread runs"
            try:
                self._loop.call_soon_threadsafe(put_all)
            except RuntimeError:  # the server has shut down and closed the event loop
                log.debug("events came after the end of the event loop")
