"""Ctrl-C and SIGTERM while a run trains: it saves before it stops."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interruption:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop, so that the loop can save first. A second Ctrl-C ends
    the process at once."""

    def __init__(self):
        self.signal: int | None = None
        self._old: dict = {}
        self._waiting = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While the loop waits for what may take long to come: the wish is an InterruptedError there."""
        self._waiting = True
        try:
            if self.signal:
                raise InterruptedError
            yield
        finally:
            self._waiting = False

    def __enter__(self) -> "Interruption":
        self._old = {s: signal.signal(s, self._wish) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for s, handler in self._old.items():
            signal.signal(s, handler)

    def _wish(self, signum, frame) -> None:
        if self.signal == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self.signal = signum
        print("\nstopping after this step; the state will be saved (Ctrl-C again: at once)", flush=True)
        if self._waiting:
            self._waiting = False
            raise InterruptedError
