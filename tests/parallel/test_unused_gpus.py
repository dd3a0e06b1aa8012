"""A machine with GPUs on which JAX sees none: nothing runs on the CPU by mistake."""

import importlib.util
import os
import subprocess
import sys

import pytest
import tiny

from nanochat_jax.config import REPOSITORY
from nanochat_jax.parallel import gpu_node

LISTED = "GPU 0: NVIDIA H100 (UUID: GPU-0)\nGPU 1: NVIDIA H100 (UUID: GPU-1)\n"
SOME = f"#!/bin/sh\n[ \"$1\" = --list-gpus ] && printf '{LISTED}'\n".replace("\n'", "\\n'")
NO_GPUS = "#!/bin/sh\necho 'No devices were found' >&2\nexit 6\n"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a stand-in for nvidia-smi on PATH."""

    def put(script: str) -> None:
        path = tmp_path / "bin" / "nvidia-smi"
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return put


@pytest.mark.parametrize(("script", "hidden", "count"), [(SOME, None, 2), (NO_GPUS, None, 0), (SOME, "-1", 0)])
def test_gpus_are_those_that_the_driver_lists_and_nobody_hides(nvidia_smi, monkeypatch, script, hidden, count):
    nvidia_smi(script)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert gpu_node.count() == count


@pytest.mark.parametrize(
    "command", [["scripts.train", "--stage=base"], ["scripts.doctor"], ["scripts.chat_eval", "-isft"]]
)
def test_a_gpu_that_jax_does_not_see_is_one_line(nvidia_smi, own_base_dir, command):
    nvidia_smi(SOME)
    env = tiny.environment(own_base_dir) | {"HF_HUB_OFFLINE": "1"}
    del env["JAX_PLATFORMS"]
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        pytest.skip("JAX for GPUs is installed")
    run = [sys.executable, "-m", *command]
    done = subprocess.run(run, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    expected = "error: this machine has 2 NVIDIA GPUs, but JAX sees none: run 'bash setup.sh' to install"
    assert done.stderr.startswith(expected) and "--device_type=cpu" in done.stderr and done.stderr.count("\n") == 1
    done = subprocess.run(run, cwd=REPOSITORY, env=env | {"JAX_PLATFORMS": "cuda"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: JAX_PLATFORMS=cuda: ") and "run 'bash setup.sh' to install" in done.stderr
    if command[0] == "scripts.train":  # whoever says that the CPU is meant gets further
        for flags, extra in (["--device_type=cpu"], {}), ([], {"JAX_PLATFORMS": "cpu"}):
            done = subprocess.run([*run, *flags], cwd=REPOSITORY, env=env | extra, capture_output=True, text=True)
            assert done.returncode == 2 and "train a tokenizer" in done.stderr, done.stderr
