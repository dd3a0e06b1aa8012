"""What all benchmarks show alike: where and when it was measured, and a table that can be read as it is."""

import os
import sys
import time


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def about() -> dict:
    """Where and when it was measured."""
    from nanochat_jax import machine

    python = sys.version.split()[0]
    return {"date": time.strftime("%Y-%m-%d"), "cpu": machine.cpu(), "cores": cores(), "python": python,
            "code": machine.code()}  # fmt: skip


def table(cells: list[list[str]], left: tuple[bool, ...]) -> str:
    """Markdown of rows of cells, the headings first; `left` says which columns are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(line, widths, left, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * (w + 1) + ("-" if to_left else ":") for w, to_left in zip(widths, left, strict=True)]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])
