"""How far a long evaluation is: a bar with the time left on a terminal, now and then a line elsewhere."""

import sys
import time

PATIENCE = 2.0  # seconds; what is done by then shows nothing
BETWEEN_LINES = 30.0  # seconds


class Progress:
    """Counts `total` pieces of work. As a context manager it takes its bar away at the end, also after an error."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done = label, total, 0
        self._start = self._last_line = time.monotonic()
        self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if now - self._start < PATIENCE:
            return
        if sys.stderr.isatty():
            self._show()
        elif now - self._last_line > BETWEEN_LINES:
            self._last_line = now
            left = (now - self._start) / self.done * (self.total - self.done)
            print(f"{self.label}: {self.done}/{self.total}, {left:.0f} s left", file=sys.stderr, flush=True)

    def _show(self) -> None:
        from rich import progress
        from rich.console import Console

        if self._bar is None:
            columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
                       progress.TimeRemainingColumn(elapsed_when_finished=True))  # fmt: skip
            self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.label, total=self.total)
            self._bar.start()
        self._bar.update(self._task, completed=self.done)
