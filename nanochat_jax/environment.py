"""Describes the machine, the package versions and the code's commit for the records. No decision depends on them."""

import functools
import os
import platform
import subprocess
import sys
import time
from importlib import metadata

from nanochat_jax import config

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@functools.cache
def versions() -> dict[str, str]:
    """Returns the commit of the code, and the versions of Python and PACKAGES.

    A + after the commit means that files differ from the commit. Without git, the commit is "". The result is cached
    when the run starts, since files may change during the run.
    """
    commit = _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain") else "")
    return {"commit": commit, "python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def describe() -> dict[str, str]:
    """Returns a description of the machine, the code and the versions, as {name: value}, for people to read."""
    packages = [f"{name} {_version(name)}" for name in ("jax", "flax", "optax")]
    try:
        memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError):
        memory = "unknown"
    return {
        "Date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "Code": code(),
        "Platform": platform.platform(),
        "CPU": f"{cpu()}, {os.cpu_count()} cores",
        "Memory": memory,
        "Devices": _devices(),
        "Versions": f"Python {platform.python_version()}, " + ", ".join(packages),
        "Base folder": str(config.base_dir()),
    }


def cpu() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def code() -> str:
    """Returns the commit and the branch, and says whether files differ from the commit."""
    if not (commit := _git("rev-parse", "--short=12", "HEAD")):
        return "not a git checkout"
    dirty = " with local changes" if _git("status", "--porcelain") else ""
    return f"commit {commit} on {_git('rev-parse', '--abbrev-ref', 'HEAD')}{dirty}"


def _git(*args: str) -> str:
    """Returns what `git ARGS` prints for this repository. Returns "" if there is no git or no checkout."""
    command = ["git", "-C", str(config.REPOSITORY), *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    """Describes the devices that JAX runs on. A child process asks JAX, because JAX in this process would take GPU
    memory away from training."""
    program = "from nanochat_jax.parallel import devices; print(devices.describe())"
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({config.first_line(error)})"
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return done.stdout.strip() or f"unknown ({reason})"
