"""Strict settings and a base folder of its own for every test, and the test data outside the repository."""

import atexit
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

# A shell script starts background processes with SIGINT ignored, and nohup starts them with SIGHUP ignored. Their
# children inherit this, but tests send both signals to children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tests run on the CPU unless GPU tests are selected.
if "gpu" not in sys.argv:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
# They compile with few optimizations, because most programs run once. The tests marked gpu and aot need real programs.
if not {"gpu", "aot"} & set(sys.argv):
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# All tests and the processes they start share a compilation cache, since compiling takes half of the time. The workers
# of pytest-xdist inherit the controller's folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="nanochat-tests-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax

# XLA's older code generator for CPUs compiles in half the time. JAX 0.10 has this flag; 0.12 ends if it is given. The
# workers of pytest-xdist inherit the controller's flags.
OLD_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
if "gpu" not in sys.argv and jax.__version_info__ < (0, 11) and OLD_EMITTERS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {OLD_EMITTERS}"

pytest.register_assert_rewrite("page")  # before the two test files that use its fixtures import it

jax.config.update("jax_numpy_rank_promotion", "raise")

TEST_DATA = Path(os.environ.get("NANOCHAT_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared")


# The files that take longest. They start first, so that no worker of pytest-xdist is left with one at the end.
LONGEST = (
    "parallel/test_sharding.py", "training/test_loop.py", "evals/test_chat_eval.py", "training/test_run.py",
    "model/test_gpt.py", "scripts/test_chat_web.py", "serve/test_pool.py", "engine/test_engine_devices.py",
    "training/test_resume.py", "engine/test_engine.py", "scripts/test_chat_cli.py", "serve/test_compiling.py",
    "data/test_text_choice.py", "tasks/test_generated_tasks.py", "training/test_signals.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    def place(item: pytest.Item) -> int:
        file = "/".join(item.path.parts[-2:])
        return LONGEST.index(file) if file in LONGEST else len(LONGEST)

    items.sort(key=place)


def _folder(name: str) -> Path:
    """A folder of test data; skips the test if it is missing."""
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
    """Gives every test its own base folder."""
    path = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(path))
    return path


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """Restores the signal handlers, because a command that runs in the process of a test keeps its own to the end."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(s) for s in signals]
    yield
    for s, handler in zip(signals, before, strict=True):
        signal.signal(s, handler)
