"""Reads and writes a run's log: log.jsonl in the run's folder, with one JSON object per line. wandb gets a copy.

After a resume, a step may be logged twice. If several records agree in all fields of KEY, only the last one counts.
Whenever a run starts or resumes, it logs a record of kind "config" with its current step. This record cancels all
earlier records in the log that have the same stage and a greater step, even scores and the note "finished".
"""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nanochat_jax import files
from nanochat_jax.config import UserError

LOG = "log.jsonl"
LONGEST = 1 << 22  # bytes; a longer line is not a record
NEEDED = {"kind": str, "stage": str, "step": int}  # fields that every record has, and their types
# From "n" on, the fields are the number of problems and the settings of an evaluation. Scores that differ in one of
# these fields all count.
KEY = ("kind", "stage", "step", "suite", "task", "split", "n", "temperature", "num_samples", "max_new_tokens", "top_k",
       "seed")  # fmt: skip


def append(run_dir: Path, kind: str, stage: str, step: int, **fields: Any) -> None:
    """Adds one record to the log. NaN and infinity become null, since JSON has neither."""
    record: dict[str, Any] = {"kind": kind, "stage": stage, "step": step, "time": round(time.time(), 3)}
    record |= {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
    run_dir.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    with open(run_dir / LOG, "a+b") as log:
        if log.tell() and _last_byte(log) != b"\n":
            line = b"\n" + line  # a process died while writing the last line: start a new line
        log.write(line)  # one write per line, so that the lines of two processes do not mix


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def read(run_dir: Path) -> list[dict]:
    """Returns the records that count, in the order of the log. Returns [] if there is no log.

    Skips lines that are not records, and prints the number of these lines. Such lines come from a process that died
    while writing, from a file system that crashed, or from other programs. Raises UserError if the log cannot be read.
    """
    path = run_dir / LOG
    records: dict[tuple, dict] = {}
    skipped = 0
    try:
        with open(path, "rb") as log:
            for line in _lines(log):
                record = _parse(line)
                if record is None:
                    skipped += bool(line.strip())
                    continue
                key = tuple(map(record.get, KEY))
                if record["kind"] == "config":
                    stage, step = record["stage"], record["step"]
                    records = {k: r for k, r in records.items() if r["stage"] != stage or r["step"] <= step}
                records.pop(key, None)
                records[key] = record
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable, or move it away") from None
    if skipped:
        files.print_once(f"{path}: {skipped:,} {'line is' if skipped == 1 else 'lines are'} not a record: skipped")
    return list(records.values())


def _lines(log: BinaryIO) -> Iterator[bytes]:
    """Yields the lines of a log. Yields b"too long" in place of a line of LONGEST bytes or more."""
    while line := log.readline(LONGEST):
        rest = line
        while len(rest) == LONGEST and not rest.endswith(b"\n"):
            rest = log.readline(LONGEST)
        yield b"too long" if len(line) == LONGEST else line


def _parse(line: bytes) -> dict | None:
    """Returns the record in a line, or None if the line holds no record."""
    try:
        record = json.loads(line.decode("utf-8-sig").strip("\0"))  # a crash may leave zero bytes at the end of a line
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not all(type(record.get(k)) is kind for k, kind in NEEDED.items()):
        return None
    if not all(isinstance(record.get(k), str | int | float | None) for k in (*KEY, "time")):
        return None
    return None if isinstance(record.get("time"), str) else record
