"""Prints how many lines of each room the tests ran, from coverage's JSON report: coverage_by_room.py FILE."""

import json
import sys
from collections import defaultdict
from pathlib import Path, PurePath


def room_of(path: str) -> str:
    """nanochat_jax/model/gpt.py -> nanochat_jax/model; a file outside the rooms is a room of its own."""
    parts = PurePath(path).parts
    return "/".join(parts[:2]) if parts[0] == "nanochat_jax" else parts[0]


def main(report: Path) -> None:
    rooms = defaultdict(lambda: [0, 0])
    for path, file in json.loads(report.read_text(encoding="utf-8"))["files"].items():
        summary = file["summary"]
        for room in (room_of(path), "all"):
            rooms[room][0] += summary["covered_lines"]
            rooms[room][1] += summary["num_statements"]
    print("\ncoverage by room:")
    for room, (covered, lines) in sorted(rooms.items(), key=lambda item: (item[0] == "all", item[0])):
        if lines:
            print(f"  {room:34} {covered:6,} of {lines:6,} lines  {covered / lines:6.1%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
