"""What `bash tests/run.sh -m gpu` does: one process that may use the GPU, and nothing is skipped in silence."""

import importlib
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.config import REPOSITORY


@pytest.mark.parametrize(("marker", "workers"), [("gpu", 0), ("aot", 0), ("slow", 4)])
def test_tests_for_a_gpu_share_one_process(tmp_path, marker, workers):
    """Each process that uses a GPU takes most of its memory, and the workers of pytest-xdist would use the CPU."""
    tree = tmp_path / "tree"
    for folder in ("tests", "rustbpe", ".venv/bin"):
        (tree / folder).mkdir(parents=True)
    shutil.copy(REPOSITORY / "tests" / "run.sh", tree / "tests")
    (tree / "setup.sh").touch()
    for tool in ("python", "ruff", "ty", "lint-imports", "codespell", "cargo"):
        (tree / ".venv" / "bin" / tool).write_text(f'#!/bin/sh\necho "{tool} $*" >> {tmp_path}/calls\n')
        (tree / ".venv" / "bin" / tool).chmod(0o755)
    done = subprocess.run(["bash", str(tree / "tests" / "run.sh"), "-m", marker], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (call,) = [call for call in (tmp_path / "calls").read_text().splitlines() if "-m pytest" in call]
    assert f"-n {workers} " in call and call.endswith(f"-m {marker}")


def test_a_gpu_that_jax_does_not_see_fails_the_tests_that_need_it():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "-k", "bfloat16"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "JAX sees no GPU" in done.stdout and "skipped" not in done.stdout, done.stdout


def test_the_comparison_of_gradients_would_find_a_wrong_one(monkeypatch):
    """The gradients are about 1e-4, so an absolute tolerance of 2e-2 would accept zeros."""
    monkeypatch.syspath_prepend(REPOSITORY / "tests")
    assert_close = importlib.import_module("test_gpu").assert_close
    right = np.random.default_rng(0).normal(scale=1e-4, size=(2, 256, 4, 128))
    assert_close(jnp.asarray(right, jnp.bfloat16), right, tolerance=2e-2)  # rounding is no error
    for wrong in (0 * right, 1.1 * right, -right):
        with pytest.raises(AssertionError):
            assert_close(wrong, right, tolerance=2e-2)
