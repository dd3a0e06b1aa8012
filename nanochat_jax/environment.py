"""What a run runs on and with: the machine, the packages' versions, the code's commit. Told, never decided by."""

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
    """The commit, with a + where files differ from it (empty without git), Python's version and those of PACKAGES.

    As they are when first asked for, that is at the start of a run: the files may change while it goes on.
    """
    commit = _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain") else "")
    return {"commit": commit, "python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def environment() -> dict[str, str]:
    """The machine and the versions, to be read by people."""
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
    """Commit, branch and whether files differ from it."""
    if not (commit := _git("rev-parse", "--short=12", "HEAD")):
        return "not a git checkout"
    dirty = " with local changes" if _git("status", "--porcelain") else ""
    return f"commit {commit} on {_git('rev-parse', '--abbrev-ref', 'HEAD')}{dirty}"


def _git(*args: str) -> str:
    """What git says of this code; empty where there is no git, or no checkout."""
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
    # In a process of its own: this one must not take a GPU's memory from a training run.
    ask = "from nanochat_jax.parallel import devices; print(devices.describe())"
    try:
        done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
