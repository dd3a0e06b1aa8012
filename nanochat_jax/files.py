"""Small files: written whole or not at all, and read where they may be missing."""

import json
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes a file, its folder included. Whoever reads it meanwhile, or after a crash, sees the old one or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} where there is no such file, or nothing of the kind in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
