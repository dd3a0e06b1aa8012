"""Describes the machine, the package versions and the commit of the code, for logs and reports.

The descriptions are only recorded and printed. No decision depends on them.
"""

import functools
import os
import platform
import subprocess
import time
from importlib import metadata

from nanochat_jax import config

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@functools.cache
def versions() -> dict[str, str]:
    """Returns the commit of the code, the version of Python, and the versions of the packages in PACKAGES.

    A + after the commit means that there are uncommitted changes. Without git, the commit is "". The first call caches
    the result, because the source files may change during a run.
    """
    commit = _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain") else "")
    return {"commit": commit, "python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def describe(devices: str) -> dict[str, str]:
    """Describes the machine, the code and the versions as {name: value}, for people to read.

    `devices` describes the devices. `parallel.devices.described_by_child` returns such a text.
    """
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
        "Devices": devices,
        "Versions": f"Python {platform.python_version()}, " + ", ".join(packages),
        "Base folder": str(config.base_dir()),
    }


def cpu() -> str:
    """Returns the name of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def code() -> str:
    """Returns the commit and the branch, with a note if there are uncommitted changes."""
    if not (commit := _git("rev-parse", "--short=12", "HEAD")):
        return "not a git checkout"
    dirty = " with local changes" if _git("status", "--porcelain") else ""
    return f"commit {commit} on {_git('rev-parse', '--abbrev-ref', 'HEAD')}{dirty}"


def _git(*args: str) -> str:
    """Returns the output of `git ARGS` in this repository, or "" if the command fails."""
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
