"""How far something long is: a bar with the time left on a terminal, now and then a line elsewhere. On stderr."""

import sys
import time

PATIENCE = 2.0  # seconds; what is done by then shows nothing
BETWEEN_LINES = 10.0  # seconds


class Progress:
    """Counts `total` pieces of work (None: nobody knows how many). As a context manager it takes its bar away at the
    end, also after an error. Shown beside the count: `note`, such as a speed."""

    def __init__(self, label: str, total: int | None):
        self.label, self.total, self.done = label, total, 0
        self._start = self._last_line = time.monotonic()
        self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._start

    def advance(self, count: int = 1, note: str = "") -> None:
        self.reach(self.done + count, note)

    def reach(self, done: int, note: str = "") -> None:
        """As many pieces are done."""
        self.done = done
        now = time.monotonic()
        if now - self._start < PATIENCE:
            return
        said = f"{done:,}" + (f"/{self.total:,}" if self.total else "") + (f", {note}" if note else "")
        if sys.stderr.isatty():
            self._show(said)
        elif now - self._last_line > BETWEEN_LINES:
            self._last_line = now
            left = f", {self.seconds / done * (self.total - done):.0f} s left" if self.total and done else ""
            print(f"{self.label}: {said}{left}", file=sys.stderr, flush=True)

    def _show(self, said: str) -> None:
        from rich import progress
        from rich.console import Console

        if self._bar is None:
            columns = (progress.TextColumn("{task.description}"), progress.BarColumn(),
                       progress.TextColumn("{task.fields[said]}"),
                       progress.TimeRemainingColumn(elapsed_when_finished=True))  # fmt: skip
            self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.label, total=self.total, said="")
            self._bar.start()
        self._bar.update(self._task, completed=self.done, said=said)
