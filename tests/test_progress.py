"""Progress of long work: nothing at first, then a line every ten seconds."""

import pytest

from nanochat_jax import progress
from nanochat_jax.progress import Progress, count_of, short


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_every_ten_seconds_with_the_time_left(clock, capsys):
    with Progress("rows", 4000) as work:
        for _ in range(4):
            clock[0] += 6
            work.advance(1000)
    assert lines(capsys) == ["rows: 2,000/4,000, 12 s left", "rows: 4,000/4,000, 0 s left"]


def test_without_a_total_and_with_a_note(clock, capsys):
    with Progress("characters", None) as work:
        clock[0] += 11
        work.reach(5_000_000, f"{5 / work.seconds:.2f}M/s")
    assert lines(capsys) == ["characters: 5,000,000, 0.45M/s"]


def test_short_work_shows_nothing_not_even_on_a_terminal(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("rows", 3) as work:
        work.advance()
    assert lines(capsys) == []


def test_a_terminal_gets_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress("rows", 3) as work:
        clock[0] += 3
        work.advance(2, "fast")
    assert "rows" in (shown := capsys.readouterr().err) and "2/3, fast" in shown


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00K"), (12_345.6, "12.3K"), (423_456, "423K"), (6.291e9, "6.29B")],
)
def test_large_numbers_in_three_digits(count, text):
    assert short(count) == text


def test_one_is_singular():
    assert [count_of(n, "file") for n in (0, 1, 2, 2000)] == ["0 files", "1 file", "2 files", "2,000 files"]
