"""Helpers for all benchmarks. They run a measurement in its own process, and print results as a table and as JSON."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from nanochat_jax.config import REPOSITORY, UserError

JOB_SECONDS = 3600


class JobFailed(Exception):
    """A measurement gave no result. The message is the last line of stderr, or says that the time ran out."""


def run(python: str, script: Path, job: dict, ours: bool = False) -> dict:
    """Runs `script` with the argument `job`, and returns the JSON object in the script's last line of output.

    Raises JobFailed if the last line is not JSON or the time runs out. The interpreter `python` reads the script from
    standard input. The script runs outside the repository, because the folder rustbpe/ there would hide the package
    rustbpe. If `ours` is true, the script can import this project. Any interpreter other than sys.executable runs
    without PYTHONPATH.
    """
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    elif ours:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [python, "-", json.dumps(job)], input=script.read_text(encoding="utf-8"), cwd=folder, env=environment,
                capture_output=True, text=True, encoding="utf-8", timeout=JOB_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise JobFailed(f"no result within {JOB_SECONDS} s") from None
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}, no output"]
        raise JobFailed(lines[-1][:200]) from None


def device(script: Path, device_type: str) -> dict:
    """Asks a new process for JAX's devices. Raises UserError if there is no device of type `device_type`."""
    try:
        return run(sys.executable, script, {"job": "device", "device_type": device_type}, ours=True)
    except JobFailed as error:
        raise UserError(f"--device_type={device_type}: JAX finds no such device ({error})") from error


def probe(python: str, script: Path) -> dict:
    """Asks the interpreter `python` which other tools it can import. Raises UserError if `python` does not run."""
    try:
        return run(python, script, {"job": "probe"})
    except (OSError, JobFailed) as error:
        raise UserError(f"--peer_python={python}: not a Python that runs ({error})") from error


def cores() -> int:
    """Returns the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def about() -> dict:
    """Returns the date, the machine and the code version of a measurement."""
    from nanochat_jax import environment

    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": environment.cpu(),
        "cores": cores(),
        "python": sys.version.split()[0],
        "code": environment.code(),
    }


def table(cells: Sequence[Sequence[str]], left: Sequence[bool]) -> str:
    """Returns a Markdown table, padded so that it is also readable as plain text.

    The first row of `cells` is the header. `left` says which columns are left-aligned.
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(line, widths, left, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * (w + 1) + ("-" if to_left else ":") for w, to_left in zip(widths, left, strict=True)]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def check_json(path: str) -> None:
    """Raises UserError if the folder of --json=PATH does not exist.

    The benchmarks call this before measuring, so that no result is lost.
    """
    if path and not Path(path).absolute().parent.is_dir():
        raise UserError(f"--json={path}: its folder does not exist")


def report(line: dict, path: str) -> None:
    """Prints `line` as JSON. Also appends it to the file `path` if `path` is not empty."""
    text = json.dumps(line)
    print(f"\n{text}")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
