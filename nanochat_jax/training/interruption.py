"""Handles Ctrl-C and SIGTERM during training: the run saves its state before it stops.

A stop signal is handled as follows:

1. `Interruption` stores the signal as `received` and prints a message. A second Ctrl-C ends the process at once.
2. With one process, `stop_signal` is `received`. The training loop reads `stop_signal` before every step. If the loop
   is waiting for a batch, `raise_while_waiting` ends the wait, since a shard may take an hour to arrive.
3. With several processes, all must stop after the same step. A process that stopped alone would leave the others
   waiting in a collective operation. So a process requests a stop by setting the flag batch["stop"]. The step sums the
   flags of all devices into its metric `stop`. `StepLog.flush` reads this metric one step late, but after the same step
   in every process. If the sum is positive, `flush` sets `agreed` to SIGTERM. With several processes, `stop_signal` is
   `agreed`. A process that fails to write its part of a checkpoint sets the same flag.
4. `RunControl` saves the state, waits until the checkpoint is complete, and exits with status 128 + the signal's
   number. To resume the run, start the same command again.
"""

import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

import jax


class Interruption:
    """Catches Ctrl-C and SIGTERM, so that the training loop can save the state before the run stops."""

    def __init__(self):
        self.received: int | None = None  # the signal that this process has received
        self.agreed: int | None = None  # SIGTERM once any process requests a stop; always None with one process
        self._old_handlers: dict = {}
        self._waiting = False

    @property
    def stop_signal(self) -> int | None:
        """The signal that ends the run before its next step, or None."""
        return self.received if jax.process_count() == 1 else self.agreed

    @contextmanager
    def raise_while_waiting(self) -> Generator[None]:
        """Within this context, a stop signal raises InterruptedError at once."""
        self._waiting = True
        try:
            if self.received:
                raise InterruptedError
            yield
        finally:
            self._waiting = False

    def __enter__(self) -> "Interruption":
        self._old_handlers = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._old_handlers.items():
            signal.signal(s, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self.received = signum
        print("\nstopping after this step; the state will be saved (Ctrl-C again: stop at once)", flush=True)
        if self._waiting:
            self._waiting = False
            raise InterruptedError
