"""Strict settings for every test, and the way to test data that does not live in the repository."""

import os
import sys
from pathlib import Path

import pytest

# On the CPU, unless the tests for a GPU are asked for.
if "gpu" not in sys.argv:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

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
