"""Ctrl-C and SIGTERM during training: the run saves before it stops.

How a stop signal is handled, from its arrival to the exit code:

1. The handler of `Interruption` stores the signal as `received` and prints a line. A second Ctrl-C ends the process at
   once.
2. The loop reads `stop_signal` before every step. In a run with one process, this is `received`. While the loop waits
   for a batch, `raise_while_waiting` ends the wait with an InterruptedError, since a shard may take an hour to arrive.
3. Several processes must stop after the same step: one that stopped alone would leave the others waiting in a
   collective. So a process requests a stop by setting a flag in its batch (`sharding.put_flag` -> batch["stop"]), and
   the step sums the flags of all devices into its metric `stop`. `StepLog.flush` reads the sum one step late, like
   every metric, but at the same step in every process. If the sum is positive, `flush` sets `agreed` to SIGTERM. In a
   run with several processes, `stop_signal` is `agreed`. A process that could not write its part of a checkpoint
   requests a stop in the same way.
4. `RunControl` saves the state, waits until the checkpoint is complete and exits with 128 + the signal's number. The
   same command resumes the run.
"""

import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

import jax


class Interruption:
    """Catches the first Ctrl-C or SIGTERM, so that the loop can save before the run stops."""

    def __init__(self):
        self.received: int | None = None  # the signal that this process has received
        self.agreed: int | None = None  # SIGTERM once any of several processes has requested a stop
        self._old_handlers: dict = {}
        self._waiting = False

    @property
    def stop_signal(self) -> int | None:
        """The signal that stops the run before its next step; None if the run goes on."""
        return self.received if jax.process_count() == 1 else self.agreed

    @contextmanager
    def raise_while_waiting(self) -> Generator[None]:
        """Within this block, which is for long waits, a stop signal raises InterruptedError at once."""
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
