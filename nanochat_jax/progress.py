"""Shows the progress of long work on stderr. On a terminal, shows a bar with the time left. If stderr is not a
terminal, prints a line every ten seconds."""

import errno
import math
import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich import progress

PATIENCE = 2.0  # seconds; shorter work shows no progress
BETWEEN_LINES = 10.0  # seconds between printed lines, if stderr is not a terminal


class Progress:
    """Counts finished items of work, and shows the count. `total` is the number of all items, or None if unknown.

    Use a Progress in a `with` block: the bar then disappears at the end of the block, even after an error.
    """

    def __init__(self, label: str, total: int | None) -> None:
        self.label, self.total, self.done = label, total, 0
        self._start = self._last_line = time.monotonic()
        self._bar: progress.Progress | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def advance(self, count: int = 1, note: str = "") -> None:
        """Adds `count` to the number of finished items. `note`, such as a speed, is shown after the number."""
        self.reach(self.done + count, note)

    def reach(self, done: int, note: str = "") -> None:
        """Sets the number of finished items to `done`, and updates the display if an update is due."""
        self.done = done
        now = time.monotonic()
        if now - self._start < PATIENCE:
            return
        state = f"{done:,}" + (f"/{self.total:,}" if self.total else "") + (f", {note}" if note else "")
        if sys.stderr.isatty():
            self._show(state)
        elif now - self._last_line > BETWEEN_LINES:
            self._last_line = now
            left = f", {self.seconds / done * (self.total - done):.0f} s left" if self.total and done else ""
            print(f"{self.label}: {state}{left}", file=sys.stderr, flush=True)

    def _show(self, state: str) -> None:
        from rich import progress
        from rich.console import Console

        if self._bar is None:
            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TextColumn("{task.fields[state]}"),
                progress.TimeRemainingColumn(elapsed_when_finished=True),
            )
            self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.label, total=self.total, state="")
            self._bar.start()
        self._bar.update(self._task, completed=self.done, state=state)


class Timer:
    """A stopwatch with laps."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def lap(self) -> float:
        """Ends the current lap, returns its length in seconds, and starts the next lap."""
        now = time.perf_counter()
        self.start, elapsed = now, now - self.start
        return elapsed

    def lap_if_passed(self, seconds: float) -> bool:
        """Returns whether the current lap has lasted at least `seconds`. If so, starts the next lap."""
        if time.perf_counter() - self.start < seconds:
            return False
        self.lap()
        return True


def say(line: str) -> None:
    """Prints a line. If nobody can read the line any more, raises no error, so that the work continues.

    Nobody can read the line if the terminal is closed, or if the program that reads our output has ended.
    """
    try:
        print(line, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), sys.stdout.fileno())


def short(count: float) -> str:
    """Shortens a number: 423456 -> "423K", 6.291e9 -> "6.29B"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.{max(0, 2 - int(math.log10(count / size)))}f}{unit}"
    return f"{count:.0f}"


def clock(seconds: float) -> str:
    """Formats seconds: 90 -> "1m30s"."""
    seconds = max(0, round(seconds))
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def count_of(number: int, noun: str) -> str:
    """Returns "1 file" or "2,000 files". The plural of `noun` must end in s."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
