"""Handles Ctrl-C and SIGTERM during training: the run saves its state before it stops.

How a stop signal is handled, from its arrival to the exit code:

1. The handler of `Interruption` stores the signal as `received` and prints a line. A second Ctrl-C ends the process at
   once.
2. The loop reads `stop_signal` before every step. In a run with one process, `stop_signal` is `received`. If the loop
   is waiting for a batch, `raise_while_waiting` ends the wait with an InterruptedError, since a shard may take an hour
   to arrive.
3. If a run has several processes, all must stop after the same step: a process that stopped alone would leave the
   others waiting in a collective operation. So a process requests a stop by setting a flag in its batch
   (`sharding.put_flag` -> batch["stop"]), and the step sums the flags of all devices into its metric `stop`. Like every
   metric, `stop` is read by `StepLog.flush` one step late, but at the same step in every process. If `stop` is
   positive, `flush` sets `agreed` to SIGTERM. In a run with several processes, `stop_signal` is `agreed`. A process
   that could not write its part of a checkpoint requests a stop with the same flag.
4. `RunControl` saves the state, waits until the checkpoint is complete and exits with 128 + the signal's number. To
   resume the run, start the same command again.
"""

import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

import jax


class Interruption:
    """Catches the first Ctrl-C or SIGTERM, so that the loop can save the state before the run stops."""

    def __init__(self):
        self.received: int | None = None  # the signal that this process has received
        self.agreed: int | None = None  # with several processes: SIGTERM once any process has requested a stop
        self._old_handlers: dict = {}
        self._waiting = False

    @property
    def stop_signal(self) -> int | None:
        """The signal that stops the run before its next step, or None if the run goes on."""
        return self.received if jax.process_count() == 1 else self.agreed

    @contextmanager
    def raise_while_waiting(self) -> Generator[None]:
        """A context for long waits: within it, a stop signal raises InterruptedError at once."""
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
