"""Reads and writes a run's log: log.jsonl in the run's folder, with one JSON object per line. wandb only shows a copy.

After a resume, a step may be logged twice. If several records agree in all fields of KEY, only the last one counts.
Whenever a run starts or resumes, it logs a record of kind "config" with its current step. This record cancels all
earlier records in the log that have the same stage and a greater step, even scores and the note "finished".
"""

import json
import math
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

LOG = "log.jsonl"
# Two scores both count if they differ in the number of problems ("n") or in a setting of the evaluation.
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

    Incomplete lines are skipped.
    """
    path = run_dir / LOG
    if not path.exists():
        return []
    records: dict[tuple, dict] = {}
    for line in path.read_text(encoding="utf-8").split("\n"):  # splitlines() would also split at U+2028 inside a record
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # a process died while writing this line
        key = tuple(map(record.get, KEY))
        if record.get("kind") == "config":
            stage, step = record["stage"], record["step"]
            records = {k: r for k, r in records.items() if r.get("stage") != stage or r["step"] <= step}
        records.pop(key, None)
        records[key] = record
    return list(records.values())
