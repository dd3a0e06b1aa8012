"""scripts.doctor --target compiles the run of a preset on H100s that are not there, and says what it would need."""

import importlib.util
import json
import subprocess
import sys

import pytest
import tiny

from nanochat_jax.config import REPOSITORY
from nanochat_jax.forecast import compiled

if not any(importlib.util.find_spec(name) for name in compiled.PLUGINS):
    pytest.skip("no compiler for GPUs: bash setup.sh dev aot", allow_module_level=True)

pytestmark = pytest.mark.aot


def doctor(base, *flags):
    command = [sys.executable, "-m", "scripts.doctor", *flags]
    environment = tiny.environment(base, 1)
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1200)


@pytest.mark.parametrize("count", [1, 8])
def test_d20(own_base_dir, count):
    file = own_base_dir / "forecast.json"
    done = doctor(own_base_dir, "--config=d20", f"--target=h100:{count}", "--price_per_hour=24", f"--json={file}")
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "A BOUND, NOT A MEASUREMENT" in done.stdout and "compiling the training step" in done.stdout
    found = json.loads(file.read_text())
    assert found["batch"]["rows"] == 32 and found["batch"]["tokens"] == 524_288
    assert 35 < found["memory"]["peak"] / 2**30 < 45 and found["memory"]["peak"] < found["memory"]["usable"]
    assert found["memory"]["weights"] == 4 * 560_988_160
    assert found["cudnn"] == 40 * found["batch"]["grad_accum_steps"]
    best, usual = found["step"]["bound"], found["step"]["with good kernels"]
    expected = 0.28 * 8 / count  # seconds
    assert 0.7 * expected < best["seconds"] < usual["seconds"] < 1.4 * expected
    assert 0.4 < usual["mfu"] < best["mfu"] < 1
    wanted = {"matmuls", "attention", "loss", "norms", "optimizer"} | ({"communication"} if count > 1 else set())
    assert wanted <= best["parts"].keys() and min(best["parts"][name]["seconds"] for name in wanted) > 0
    assert best["parts"]["other"]["seconds"] < 0.15 * best["seconds"], "kernels without a name"
    assert best["price"] == pytest.approx(24 * found["steps"] * best["seconds"] / 3600, abs=0.01)
    if count > 1:
        assert 1 <= found["sent"] / found["sent_at_least"] < 1.06
    assert found["decode"]["kernels_per_token"] > 100 and found["prefill"]["seconds"] > 0


def test_a_target_that_is_too_small(own_base_dir):
    flags = ["--depth=8", "--max_seq_len=131072", "--total_batch_size=131072", "--num_iterations=10"]
    done = doctor(own_base_dir, *flags, "--target=rtx4090:1")
    assert done.returncode == 2
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "more than a run may use of a NVIDIA GeForce RTX 4090" in error and error.count(" GiB)") == 2, error
