"""A run's log: log.jsonl in the run's folder is the truth, one JSON object a line; wandb is a view of it.

After a resume a step may be logged twice: of records that agree in KEY the later one holds. And a run that goes on from
an earlier step leaves a future behind: a start, of which the record of kind "config" tells, ends what was logged of its
stage's later steps, scores and the note that it was finished included.
"""

import json
import math
import os
import time
from pathlib import Path

LOG = "log.jsonl"
# The last three tell scores apart: of fewer problems, of sampled answers.
KEY = ("kind", "stage", "step", "suite", "task", "split", "n", "temperature", "num_samples")


def append(run_dir: Path, kind: str, stage: str, step: int, **fields) -> None:
    """Adds one record. Values that are not finite are logged as null, which every JSON reader understands."""
    record = {"kind": kind, "stage": stage, "step": step, "time": round(time.time(), 3)}
    record |= {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
    run_dir.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    with open(run_dir / LOG, "a+b") as log:
        if log.tell() and _last_byte(log) != b"\n":
            line = b"\n" + line  # a process ended in the middle of its line: do not add to that
        log.write(line)  # one write: lines of two writers do not mix


def _last_byte(file) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def read(run_dir: Path) -> list[dict]:
    """The records that hold, in the order of their (last) writing. Torn lines are skipped; no log is no records."""
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
