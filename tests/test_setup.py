"""setup.sh: which Python and which extras it installs, and what it refuses.

The real setup.sh runs in a copy of the tree, with stubs of the programs that it calls.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nanochat_jax.config import REPOSITORY


@pytest.fixture
def setup(tmp_path):
    """setup(*extras) runs the real setup.sh in a copy of the tree, with almost nothing on PATH."""
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    shutil.copy(REPOSITORY / "setup.sh", tree)
    for name in ("pyproject.toml", "rustbpe"):
        source = Path(REPOSITORY / name)
        ignore = shutil.ignore_patterns("target")
        shutil.copytree(source, tree / name, ignore=ignore) if source.is_dir() else shutil.copy(source, tree / name)
    tools = "bash cat cut sha256sum xargs head env sed mktemp rm dirname echo grep sleep sh mkdir"
    for tool in tools.split():
        (tree / "bin" / tool).symlink_to(shutil.which(tool))

    def run(*extras: str, **environment: str) -> subprocess.CompletedProcess:
        env = {"PATH": str(tree / "bin"), "HOME": str(tmp_path)} | environment
        command = ["bash", str(tree / "setup.sh"), *extras]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    def put(name: str, script: str) -> None:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tree / name).chmod(0o755)

    run.put, run.tree = put, tree
    return run


def test_setup_names_what_is_missing(setup):
    """Without cargo, and without a new enough Python: one line that says what to install."""
    without_cargo = setup()
    assert without_cargo.returncode == 2 and "error: cargo is missing: install Rust" in without_cargo.stderr
    setup.put("bin/cargo", "exit 0")
    without_python = setup()
    assert without_python.returncode == 2 and "error: Python 3.11 to 3.14 with venv" in without_python.stderr
    assert not (setup.tree / ".venv").exists()


# Answers as Python 3.{minor} would, but cannot make an environment.
PYTHON = """
case "$*" in
    *"<= sys.version_info"*) [ {minor} -ge 11 ] && [ {minor} -le 14 ] ;;
    *"sys.version_info >="*) [ {minor} -lt 12 ] ;;
    --version) echo "Python 3.{minor}.1" ;;
    *) false ;;
esac
"""


def test_setup_takes_the_newest_suitable_python_and_says_so(setup):
    setup.put("bin/cargo", "exit 0")
    setup.put("bin/python3", PYTHON.format(minor=15))
    refused = setup()
    assert refused.returncode == 2 and "Python 3.11 to 3.14 with venv is needed; found Python 3.15.1" in refused.stderr
    setup.put("bin/python3.11", PYTHON.format(minor=11))
    done = setup()
    assert f"== Python: {setup.tree}/bin/python3.11 Python 3.11.1" in done.stdout
    assert "note: with Python 3.12 or newer" in done.stdout
    setup.put("bin/python3.13", PYTHON.format(minor=13))
    setup.put("bin/python3.14", "echo 'pyenv: python3.14: command not found' >&2; exit 127")  # a shim
    done = setup()
    assert f"== Python: {setup.tree}/bin/python3.13 Python 3.13.1" in done.stdout and "note:" not in done.stdout


def test_setup_takes_the_python_that_it_is_told_or_refuses(setup):
    setup.put("bin/cargo", "exit 0")
    setup.put("bin/python3.13", PYTHON.format(minor=13))
    setup.put("bin/python3.11", PYTHON.format(minor=11))
    assert f"== Python: {setup.tree}/bin/python3.11 Python 3.11.1" in setup(PYTHON="python3.11").stdout
    refused = setup(PYTHON="/no/such/python")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "error: PYTHON=/no/such/python is not Python 3.11 to 3.14" in refused.stderr
    setup.put("bin/uv", f"echo uv $* >> {setup.tree}/calls; exit 1")  # uv makes the environment, with the same Python
    setup(PYTHON="python3.11")
    setup()
    chosen = [call.split("--python ")[1] for call in (setup.tree / "calls").read_text().splitlines()]
    assert chosen == [f"{setup.tree}/bin/python3.11 .venv", f"{setup.tree}/bin/python3.13 .venv"]


# Writes one line at a time, as nvidia-smi does on a machine with eight GPUs.
EIGHT_GPUS = """
for i in 0 1 2 3 4 5 6 7; do
    case "$*" in
        *--list-gpus*) echo "GPU $i: NVIDIA H100 80GB HBM3 (UUID: GPU-$i)" ;;
        *--query-gpu=driver_version*) echo "{driver}" ;;
    esac
    [[ "$*" != *--id=0* ]] || exit 0
    sleep 0.01
done
"""


@pytest.mark.parametrize(("driver", "extra"), [("580.65.06", "cuda13"), ("570.124.06", "cuda12")])
def test_setup_installs_jax_for_the_driver(setup, driver, extra):
    setup.put("bin/cargo", "exit 0")
    setup.put("bin/python3", "[[ $1 != -m ]]")  # good enough to be chosen, but cannot make an environment
    setup.put("bin/nvidia-smi", EIGHT_GPUS.replace("{driver}", driver))
    for _ in range(5):
        done = setup("serve")
        assert f"== setting up .venv [serve {extra}]" in done.stdout, done.stderr


def test_setup_does_not_install_the_compiler_of_cuda_13_beside_cuda_12(setup):
    setup.put("bin/cargo", "exit 0")
    setup.put("bin/python3", "[[ $1 != -m ]]")
    setup.put("bin/nvidia-smi", EIGHT_GPUS.replace("{driver}", "570.124.06"))
    done = setup("aot")
    assert done.returncode == 2 and done.stderr.startswith("error: the extra aot holds CUDA 13")
    setup.put("bin/nvidia-smi", EIGHT_GPUS.replace("{driver}", "580.65.06"))
    assert "== setting up .venv [aot cuda13]" in setup("aot").stdout


def test_setup_refuses_gpus_whose_driver_does_not_answer(setup):
    setup.put("bin/nvidia-smi", EIGHT_GPUS.replace("{driver}", "Failed to initialize NVML: Driver mismatch"))
    done = setup("serve")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "lists GPUs, but not the version of their driver (Failed to initialize NVML" in done.stderr
    setup.put("bin/nvidia-smi", "echo 'No devices were found'; exit 6")
    assert "cargo is missing" in setup("serve").stderr  # a driver without GPUs is a machine without GPUs


def test_setup_hashes_its_sources_alike_without_sha256sum(setup):
    """Older versions of macOS have shasum instead."""
    digests = []
    for tool in ("sha256sum", "shasum"):
        setup.put(".venv/bin/python", "exit 0")
        setup.put("bin/cargo", "exit 0")
        setup.put("bin/uv", "exit 0")
        (setup.tree / "bin" / "sha256sum").unlink(missing_ok=True)
        (setup.tree / "bin" / tool).symlink_to(shutil.which(tool))
        (setup.tree / ".venv" / ".made").unlink(missing_ok=True)
        setup.put(".venv/bin/python", 'for wheels; do [ "$last" != -w ] || touch "$wheels/x.whl"; last=$wheels; done')
        done = setup("serve")
        assert done.returncode == 0, done.stderr
        digests.append((setup.tree / ".venv" / ".made").read_text())
    assert digests[0] == digests[1] and re.fullmatch("[0-9a-f]{16} serve\n", digests[0])


def test_after_a_driver_upgrade_setup_makes_the_environment_again(setup):
    setup.put(".venv/bin/python", "exit 0")
    (setup.tree / ".venv" / ".made").write_text("0123456789abcdef serve cuda12 dev cuda12\n")
    setup.put("bin/nvidia-smi", EIGHT_GPUS.replace("{driver}", "580.65.06"))
    assert "cargo is missing" in setup("serve").stderr
    assert (setup.tree / ".venv" / "bin" / "python").exists(), "what works is kept if another cannot be made"
    setup.put("bin/cargo", "exit 0")
    setup.put("bin/python3", "[[ $1 != -m ]]")
    done = setup("serve")
    assert "the GPU driver has changed: making .venv again, with cuda13 instead of cuda12" in done.stdout, done.stderr
    assert "== setting up .venv [serve dev serve cuda13]" in done.stdout
    assert not (setup.tree / ".venv" / "bin").exists()
    refused = setup("dev", "cuda12")
    assert refused.returncode == 2 and "the extra cuda12 does not fit this machine's GPU driver" in refused.stderr


def test_sourcing_setup_does_not_end_the_shell():
    command = ["bash", "-c", "cd / && source $0/setup.sh no-such-extra; echo $? $PWD $-", str(REPOSITORY)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.stdout == "2 / hBc\n" and process.stderr.startswith("error: run it as bash setup.sh")
