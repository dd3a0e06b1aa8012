"""Strict settings for every test, and the way to test data that does not live in the repository."""

import atexit
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

# Started in the background of a script, this process and all it starts would ignore Ctrl-C, which is tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# On the CPU, unless the tests for a GPU are asked for; there compiled in haste, since most programs run but once.
if "gpu" not in sys.argv:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# What one test, or a process it starts, has compiled is there for the others: half of the time goes into compiling.
# With pytest-xdist the workers come here with the controller's folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="nanochat-tests-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax

pytest.register_assert_rewrite("page")  # its fixtures are a plugin of two test files, which import it first

jax.config.update("jax_numpy_rank_promotion", "raise")

TEST_DATA = Path(os.environ.get("NANOCHAT_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared")


def _folder(name: str) -> Path:
    path = TEST_DATA / name
    if not path.is_dir():
        pytest.skip(f"no test data at {path}: set NANOCHAT_TEST_DATA")
    return path


@pytest.fixture
def golden_dir() -> Path:
    """Values recorded from other implementations."""
    return _folder("golden")


@pytest.fixture
def data_dir() -> Path:
    """Real training and evaluation data."""
    return _folder("data")


@pytest.fixture(autouse=True)
def own_base_dir(tmp_path, monkeypatch) -> Path:
    """Every test writes into a base folder of its own."""
    path = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(path))
    return path
