"""What Ctrl-C, SIGTERM and SIGHUP do to a command.

While training has a state to save, training/interruption.py handles these signals instead.
"""

import atexit
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SAME_SIGNAL_SECONDS = 1.0  # for this long after the signal that ends a command, further signals are ignored
AGAIN_SECONDS = 0.01  # a signal that arrives where exceptions are ignored is handled after this time
TWICE_SECONDS = 0.05  # a second Ctrl-C within this time is ignored, because `uv run` may send each Ctrl-C twice


# Python calls these functions at any moment, and ignores exceptions that they raise: JAX's callback of the garbage
# collector, and the method that runs when an object is deleted.
EXCEPTIONS_IGNORED = {"_xla_gc_callback", "__del__"}


def postpone_if_lost(signum: int, handler: Callable[[int, FrameType | None], None], frame: FrameType | None) -> bool:
    """Whether an exception that a signal handler raises now would be lost. If so, calls the handler again shortly."""
    while frame is not None and frame.f_code.co_name not in EXCEPTIONS_IGNORED:
        frame = frame.f_back
    if frame is None or not hasattr(signal, "setitimer"):
        return False
    signal.signal(signal.SIGALRM, lambda _, frame: handler(signum, frame))
    signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
    return True


def was_interrupted(error: BaseException | None) -> bool:
    """Whether a Ctrl-C caused this error."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


class StopSignals:
    """Handles the signals that stop a command.

    Ctrl-C raises KeyboardInterrupt. SIGTERM and SIGHUP raise SystemExit instead, because scripts.chat_cli goes on after
    a KeyboardInterrupt. While the command cleans up, further signals have no effect for a second. After that, a signal
    ends the process at once, in case the cleanup hangs. A handler may interrupt a `print`, so handlers write with
    os.write.
    """

    def __init__(self):
        self._interrupted = -math.inf  # when the last Ctrl-C came
        self.ended_by: int | None = None  # the signal that ends the command
        self._since = math.inf  # when it came
        for signum in STOP_SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # under nohup, for example, SIGHUP stays ignored
                signal.signal(signum, self._receive)
        # Exit handlers run in reverse order, so this one runs last. It makes Python ignore the stop signals, because a
        # signal while Python ends would change the exit status.
        atexit.register(self._ignore_all)

    def end(self, signum: int) -> None:
        """Prints that the command is stopped. From now on, signals do not change the command's exit status."""
        self.ended_by, self._since = signum, time.monotonic()
        with suppress(OSError):
            os.write(2, b"stopped\n")

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.ended_by is None and postpone_if_lost(signum, self._receive, frame):
            return
        now = time.monotonic()
        if self.ended_by is not None:
            if now - self._since > SAME_SIGNAL_SECONDS:
                os._exit(128 + self.ended_by)
        elif signum != signal.SIGINT:
            self.end(signum)
            sys.exit(128 + signum)
        elif now - self._interrupted > TWICE_SECONDS:
            self._interrupted = now
            raise KeyboardInterrupt

    @staticmethod
    def _ignore_all() -> None:
        for signum in STOP_SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
