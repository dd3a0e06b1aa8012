"""A run's log: log.jsonl in the run's folder, one JSON object per line. wandb only shows a copy.

After a resume, a step may be logged twice: of records with the same KEY, the last one counts. When a run restarts from
an earlier step, its record of kind "config" invalidates everything that its stage logged for later steps, scores and
the note "finished" included.
"""

import json
import math
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

LOG = "log.jsonl"
# The last three tell scores apart by number of problems and by sampling.
KEY = ("kind", "stage", "step", "suite", "task", "split", "n", "temperature", "num_samples")


def append(run_dir: Path, kind: str, stage: str, step: int, **fields: Any) -> None:
    """Adds one record. NaN and infinity become null, since JSON has neither."""
    record: dict[str, Any] = {"kind": kind, "stage": stage, "step": step, "time": round(time.time(), 3)}
    record |= {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
    run_dir.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    with open(run_dir / LOG, "a+b") as log:
        if log.tell() and _last_byte(log) != b"\n":
            line = b"\n" + line  # a process died in the middle of a line: do not continue that line
        log.write(line)  # one write, so that two writers' lines do not mix


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def read(run_dir: Path) -> list[dict]:
    """The records that count, in the order they were last written. Incomplete lines are skipped; no log: []."""
    path = run_dir / LOG
    if not path.exists():
        return []
    records: dict[tuple, dict] = {}
    for line in path.read_text(encoding="utf-8").split("\n"):  # splitlines() would split within texts, at U+2028
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the process ended in the middle of a write
        key = tuple(map(record.get, KEY))
        if record.get("kind") == "config":
            stage, step = record["stage"], record["step"]
            records = {k: r for k, r in records.items() if r.get("stage") != stage or r["step"] <= step}
        records.pop(key, None)
        records[key] = record
    return list(records.values())
