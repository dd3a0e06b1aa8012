"""Handles Ctrl-C, SIGTERM and SIGHUP during training: the run saves its state before it stops.

A stop signal is handled as follows:

1. `Interruption` stores the first signal as `received` and writes a message. A second Ctrl-C ends the process at once.
   All other later signals change nothing.
2. With one process, `stop_signal` equals `received`. The training loop reads `stop_signal` before every step. If the
   loop is waiting for a batch, `raise_at_signal` ends the wait, since a shard may take an hour to arrive.
   `raise_at_signal` also ends an evaluation, since CORE may take longer than a scheduler waits between SIGTERM and
   SIGKILL.
3. With several processes, all must stop after the same step. A process that stopped alone would leave the others
   waiting in a collective operation. So a process requests a stop by setting the flag batch["stop"]. The step sums the
   flags of all devices into its metric `stop`. `StepLog.flush` reads this metric one step late, but after the same step
   in every process. If the sum is positive, `flush` sets `agreed` to SIGTERM. With several processes, `stop_signal`
   equals `agreed`. A process that fails to write its part of a checkpoint also sets batch["stop"].
4. `RunControl` saves the state, waits until the checkpoint is complete, and exits with status 128 + the signal's
   number. To resume the run, start the same command again.

Before the loop starts, there is nothing to save, and signals end the process at once (`commandline.run`).
"""

import os
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from types import FrameType

import jax

from nanochat_jax.stop_signals import SAME_SIGNAL_SECONDS, STOP_SIGNALS, postpone_if_lost

MESSAGE = b"\nstopping after this step; the state will be saved (Ctrl-C again: stop at once)\n"


class StopRequested(BaseException):
    """A stop signal raises this exception to end a wait or an evaluation.

    The class is not derived from Exception, so that code that retries after errors does not catch it. Some libraries
    replace it with an exception of their own. So a handler must test `Interruption.raised` before it treats an
    exception as an error.
    """


class Interruption:
    """Catches stop signals, so that the training loop can save the state before the run stops."""

    def __init__(self):
        self.received: int | None = None  # the first stop signal that this process has received
        self.raised: int | None = None  # the signal for which StopRequested was raised
        self.agreed: int | None = None  # SIGTERM once any process has requested a stop; always None with one process
        self._old_handlers: dict = {}
        self._terminals: list[int] = []  # which of stdout and stderr are terminals, as file descriptors
        self._may_raise = False
        self._first_interrupt: float | None = None  # when the first Ctrl-C came
        self._left = False

    @property
    def stop_signal(self) -> int | None:
        """The signal that ends the run before its next step, or None."""
        return self.received if jax.process_count() == 1 else self.agreed

    @contextmanager
    def raise_at_signal(self) -> Generator[None]:
        """Within this context, a stop signal raises StopRequested at once if there is only one process."""
        if jax.process_count() > 1:
            yield
            return
        self._may_raise = True
        try:
            if self.received:
                self.raised = self.received
                raise StopRequested
            yield
        finally:
            self._may_raise = False

    def __enter__(self) -> "Interruption":
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        # Signals that are already ignored stay ignored. For example, nohup makes a command ignore SIGHUP.
        caught = [s for s in STOP_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        self._old_handlers = {s: signal.signal(s, self._receive) for s in caught}
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        if self.received is None:
            for s, handler in self._old_handlers.items():
                signal.signal(s, handler)
        # After a stop signal, `_receive` stays installed, so that more signals do not change the exit status.

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        # A handler may run in the middle of a `print`. A second `print` would then fail, so the handler uses
        # os.write.
        again = self._note_interrupt(signum)
        if self._left:
            if again:
                os._exit(128 + (self.received or signum))
            return
        if again:
            handler = self._old_handlers[signum]
            signal.signal(signum, handler)
            if callable(handler):
                handler(signum, frame)
            raise KeyboardInterrupt
        if self.received is not None or (self._may_raise and postpone_if_lost(signum, self._receive, frame)):
            return
        self.received = signum
        if signum == signal.SIGHUP:
            self._leave_terminal()
        with suppress(OSError):
            os.write(2, MESSAGE)
        if self._may_raise:
            self._may_raise = False
            self.raised = signum
            raise StopRequested

    def _leave_terminal(self) -> None:
        """Sends all further output to /dev/null instead of the terminal, because printing to a closed terminal fails.

        After the hangup, `os.isatty` is False for the closed terminal, so `__enter__` has noted which streams it was.
        """
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            for stream in self._terminals:
                os.dup2(null, stream)

    def _note_interrupt(self, signum: int) -> bool:
        """Notes the time of the first Ctrl-C. Returns whether this one is the second that the user has pressed.

        The terminal sends a Ctrl-C to this process, and programs such as `uv run` may send it again. So signals within
        a second of the first count as one.
        """
        if signum != signal.SIGINT:
            return False
        now = time.monotonic()
        if self._first_interrupt is None:
            self._first_interrupt = now
        return now - self._first_interrupt > SAME_SIGNAL_SECONDS
