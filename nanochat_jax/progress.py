"""How far something long is: a bar with the time left on a terminal, now and then a line elsewhere. On stderr."""

import math
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


class Timer:
    """Seconds since the last lap."""

    def __init__(self):
        self.start = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        self.start, elapsed = now, now - self.start
        return elapsed

    def passed(self, seconds: float) -> bool:
        """Whether that much time has passed; then it starts anew."""
        if time.perf_counter() - self.start < seconds:
            return False
        self.lap()
        return True


def short(count: float) -> str:
    """423456 -> "423K", 6.291e9 -> "6.29B"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.{max(0, 2 - int(math.log10(count / size)))}f}{unit}"
    return f"{count:.0f}"


def clock(seconds: float) -> str:
    """90 -> "1m30s"."""
    seconds = max(0, round(seconds))
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
