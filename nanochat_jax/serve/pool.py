"""Several engines, each with weights and cache of its own on a GPU of its own, as if they were one."""

import time
from collections.abc import Sequence

from nanochat_jax.engine.request import Request
from nanochat_jax.serve.worker import Answer, EngineWorker


class Pool:
    """Each request goes to the worker with the most room; among equals to the first, which keeps a lonely chat where
    its earlier turns are. One that has failed gets nothing more, and the others go on."""

    def __init__(self, workers: Sequence[EngineWorker]):
        self.workers = workers

    def start(self) -> None:
        """Called in the event loop that will await the answers."""
        for worker in self.workers:
            worker.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Ends the workers after the steps they are in, and every answer that is not complete."""
        deadline = time.monotonic() + timeout
        for worker in self.workers:
            worker.ask_to_stop()
        for worker in self.workers:
            worker.stop(max(0.0, deadline - time.monotonic()))

    def stop_after(self, seconds: float) -> None:
        """Ends what is not complete after `seconds`. Whoever calls this lets nobody new in."""
        for worker in self.workers:
            worker.stop_after(seconds)

    def submit(self, *requests: Request) -> Answer:
        """Queues `requests` and returns their answer at once; raises what `EngineWorker.submit` does."""
        return max(self.alive or self.workers, key=lambda worker: worker.room).submit(*requests)

    @property
    def alive(self) -> list[EngineWorker]:
        return [worker for worker in self.workers if worker.failure is None]

    @property
    def failure(self) -> Exception | None:
        """Why nothing works any more; None as long as one worker does."""
        return None if self.alive else self.workers[0].failure

    @property
    def warming(self) -> bool:
        """Whether some of what requests will need is yet to be compiled."""
        return any(worker.warming for worker in self.alive)

    @property
    def slots(self) -> int:
        return sum(worker.slots for worker in self.alive)

    @property
    def running(self) -> int:
        """Samples being generated."""
        return sum(worker.running for worker in self.alive)

    @property
    def waiting(self) -> int:
        """Samples that wait for a slot."""
        return sum(worker.waiting for worker in self.alive)

    @property
    def cache_use(self) -> float:
        """Share of the caches that holds tokens."""
        return sum(worker.cache_use for worker in self.alive) / max(1, len(self.alive))
