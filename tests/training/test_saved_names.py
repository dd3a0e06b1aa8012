"""What a run saves keeps its names: runs of earlier versions are resumed, reported and chatted with.

    PYTHONPATH=.:tests/support python tests/training/test_saved_names.py   # records tests/recorded/saved_names.json

Record it again only when a name is meant to go.
"""

import json
import tempfile
from pathlib import Path

import tiny

from nanochat_jax.config import REPOSITORY

RECORDED = REPOSITORY / "tests" / "recorded" / "saved_names.json"
STAGES = ("base", "mid", "sft", "rl")
RL_FLAGS = {"eval_examples": 2, "eval_samples": 2}


def names(value: object) -> dict | None:
    """The keys of a JSON value, nested; None for anything but an object."""
    return {key: names(inner) for key, inner in sorted(value.items())} if isinstance(value, dict) else None


def saved_names(base: Path, stage: str) -> dict:
    """Trains a stage of the tiny model and returns the names in the files of its run and last checkpoint."""
    done = tiny.run(stage, base, model_tag="names", eval_every=2, **(RL_FLAGS if stage == "rl" else {}))
    assert done.returncode == 0, done.stderr[-2000:]
    run = base / f"{stage}_checkpoints" / "names"
    step = max(run.glob("step_*"))
    kinds: dict[str, set[str]] = {}
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        kinds.setdefault(record["kind"], set()).update(record)
    files = {path.name for path in step.iterdir()}
    files |= {path.name for path in run.iterdir() if not path.name.startswith("step_")}
    saved = {file: names(json.loads((step / file).read_text(encoding="utf-8"))) for file in ("meta.json", "data.json")}
    return {
        "config.json": sorted(json.loads((run / "config.json").read_text(encoding="utf-8"))),
        "files": sorted(files),
        "log.jsonl": {kind: sorted(fields) for kind, fields in sorted(kinds.items())},
        **saved,
    }


def missing(recorded: object, now: object, path: str = "") -> list[str]:
    """The recorded names that are no longer there; new ones are no harm."""
    if isinstance(recorded, dict):
        if not isinstance(now, dict):
            return [path]
        return [name for key in recorded for name in missing(recorded[key], now.get(key, ()), f"{path}/{key}")]
    if isinstance(recorded, list):
        return [f"{path}/{name}" for name in recorded if name not in now]
    return [path] if now == () else []


def test_missing_names_are_found():
    recorded = {"a": {"b": None, "c": None}, "d": ["x", "y"]}
    assert missing(recorded, {"a": {"b": None, "c": None, "new": None}, "d": ["x", "y", "z"]}) == []
    assert missing(recorded, {"a": {"b": None}, "d": ["x"]}) == ["/a/c", "/d/y"]


def test_a_run_saves_under_the_names_it_always_had(world):
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    for stage in STAGES:  # in one test: each starts from the one before
        assert missing(recorded[stage], saved_names(world, stage)) == [], stage


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        tiny.make_world(Path(folder))
        RECORDED.write_text(json.dumps({stage: saved_names(Path(folder), stage) for stage in STAGES}, indent=1) + "\n")
