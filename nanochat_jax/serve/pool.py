"""Distributes requests over several engines. Each engine has its own weights and cache on its own GPU."""

import time
from collections.abc import Sequence

from nanochat_jax.engine.request import Request
from nanochat_jax.serve.metrics import Metrics
from nanochat_jax.serve.worker import Answer, EngineWorker


class Pool:
    """Sends each request to the worker with the most free slots.

    If several workers have the most free slots, the first of them gets the request. So as long as there is only one
    chat, all its turns go to the same worker, whose cache holds the earlier turns. A failed worker gets no more
    requests, but the other workers continue.
    """

    def __init__(self, workers: Sequence[EngineWorker]):
        self.workers = workers

    def start(self) -> None:
        """Starts the workers. Must be called in the event loop that awaits the answers."""
        for worker in self.workers:
            worker.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Stops each worker after its current step. Unfinished answers fail. Waits at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for worker in self.workers:
            worker.ask_to_stop()
        for worker in self.workers:
            worker.stop(max(0.0, deadline - time.monotonic()))

    def stop_after(self, seconds: float) -> None:
        """Starts a timer that stops the workers after `seconds`. Answers that are still unfinished at that time fail.

        The caller must accept no new requests from now on.
        """
        for worker in self.workers:
            worker.stop_after(seconds)

    def submit(self, *requests: Request) -> Answer:
        """Queues `requests` and returns their Answer at once. Raises the same errors as `EngineWorker.submit`."""
        return max(self.alive or self.workers, key=lambda worker: worker.free_slots).submit(*requests)

    def publish(self, metrics: Metrics) -> None:
        """Makes the gauges of `metrics` read this pool at each scrape by Prometheus."""
        metrics.slots.set_function(lambda: self.slots)
        metrics.running.set_function(lambda: self.running)
        metrics.waiting.set_function(lambda: self.waiting)
        metrics.cache_use.set_function(lambda: self.cache_use)

    @property
    def alive(self) -> list[EngineWorker]:
        return [worker for worker in self.workers if worker.failure is None]

    @property
    def failure(self) -> Exception | None:
        """The first worker's failure if all workers have failed, otherwise None."""
        return None if self.alive else self.workers[0].failure

    @property
    def warming(self) -> bool:
        """Whether any worker still has to compile programs that requests may need."""
        return any(worker.warming for worker in self.alive)

    @property
    def slots(self) -> int:
        return sum(worker.slots for worker in self.alive)

    @property
    def running(self) -> int:
        """The number of samples that are being generated."""
        return sum(worker.running for worker in self.alive)

    @property
    def waiting(self) -> int:
        """The number of samples that are waiting for a slot."""
        return sum(worker.waiting for worker in self.alive)

    @property
    def cache_use(self) -> float:
        """The filled share of the workers' caches, from 0 to 1."""
        return sum(worker.cache_use for worker in self.alive) / max(1, len(self.alive))
