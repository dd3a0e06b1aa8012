"""What nvidia-smi says about a node, and what is refused before a run is started."""

import os
import subprocess
import sys

import pytest
import tiny

from nanochat_jax.config import REPOSITORY, UserError
from nanochat_jax.parallel import gpu_node

H100 = "NVIDIA H100 80GB HBM3"
ALL_NVLINK = "\tGPU0\tGPU1\tGPU2\tCPU Affinity\n" + "".join(
    f"GPU{i}\t" + "\t".join(" X " if i == j else "NV18" for j in range(3)) + "\t0-31\n" for i in range(3)
)


@pytest.fixture
def node(tmp_path, monkeypatch):
    """node(rows, matrix, limits) puts a stand-in for nvidia-smi on PATH. A row is (name, used MiB)."""

    def put(rows, matrix=ALL_NVLINK, limits="0, 700.00, 700.00\n1, 700.00, 700.00\n2, 700.00, 700.00\n"):
        table = "".join(f"{i}, GPU-{i}abc, {name}, 580.65.06, {used}, 81559\n" for i, (name, used) in enumerate(rows))
        (tmp_path / "table").write_text(table)
        (tmp_path / "matrix").write_text(matrix)
        (tmp_path / "limits").write_text(limits)
        script = f"""#!/bin/sh
case "$*" in
    *power.limit*) cat {tmp_path}/limits ;;
    *--query-gpu=*) cat {tmp_path}/table ;;
    *--list-gpus*) sed 's/^/GPU /' {tmp_path}/table ;;
    "topo -m") cat {tmp_path}/matrix ;;
esac
"""
        (tmp_path / "nvidia-smi").write_text(script)
        (tmp_path / "nvidia-smi").chmod(0o755)
        return gpu_node.visible()

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return put


def test_a_good_node(node):
    gpus = node([(H100, 4)] * 3)
    gpu_node.check(gpus, 0.92)
    assert gpu_node.describe(gpus) == f"3 x {H100}, driver 580.65.06, 79.6 GiB each"
    assert gpu_node.nvlink(gpus) == "between all 3 GPUs (NV18)"
    assert gpu_node.power(gpus) == "700 W, the default"


def test_gpus_of_two_kinds(node):
    gpus = node([(H100, 4), (H100, 4), ("NVIDIA A100-SXM4-80GB", 4)])
    chosen = "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=0,1"
    with pytest.raises(UserError, match=rf"of 2 kinds \(.*H100.*: 0, 1; .*A100.*: 2\).* {chosen}$"):
        gpu_node.check(gpus, 0.92)


def test_a_gpu_in_use(node, monkeypatch):
    rows = [(H100, 4), (H100, 40000), (H100, 4)]
    words = r"memory of GPU 1 \(39\.1 of 79\.6 GiB\), and JAX would take 92%: end that .* CUDA_VISIBLE_DEVICES=0,2$"
    with pytest.raises(UserError, match=words):
        gpu_node.check(node(rows), 0.92)
    gpu_node.check(node(rows), 0.5)  # enough is free for what JAX takes
    with pytest.raises(UserError, match=r"end that process .*, or lower XLA_CLIENT_MEM_FRACTION$"):
        gpu_node.check(node(rows[1:2]), 0.92)
    for chosen, indices in (("0,2", [0, 2]), ("GPU-0a,GPU-2abc", [0, 2]), ("1", [1]), ("", []), ("-1", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert [gpu.index for gpu in node(rows)] == indices


def test_no_nvlink(node):
    gpus = node([(H100, 4)] * 3, ALL_NVLINK.replace("NV18", "PHB"))
    assert gpu_node.nvlink(gpus).startswith("MISSING between 3 of 3 pairs, such as 0 and 1 (PHB)")
    assert gpu_node.nvlink(node([(H100, 4)] * 3, "")).startswith("unknown")
    assert gpu_node.nvlink(node([(H100, 4)] * 4)).startswith("unknown"), "the matrix shows only three"


def test_a_gpu_with_a_lowered_power_limit(node):
    gpus = node([(H100, 4)] * 3, limits="0, 700.00, 700.00\n1, 350.00, 700.00\n2, 350.00, 700.00\n")
    words = "LOWERED on GPU 1, 2 (to 350 of 700 W): a step takes longer; raise it with sudo nvidia-smi -pl 700"
    assert gpu_node.power(gpus) == words
    for limits in ("", "0, [N/A], [N/A]\n", "Field is not a valid field to query.\n"):
        assert gpu_node.power(node([(H100, 4)], limits=limits)).startswith("unknown")


def test_libraries_that_hide_those_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}:/nowhere:")
    assert gpu_node.second_libraries() == []
    (tmp_path / "libcudnn.so.9").touch()
    (tmp_path / "libcudart.so.13").touch()
    assert gpu_node.second_libraries() == [tmp_path / "libcudnn.so.9"]


def test_the_doctor_refuses_before_jax_starts(node, own_base_dir):
    node([(H100, 4), (H100, 40000)])
    env = tiny.environment(own_base_dir) | {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": ""}
    command = [sys.executable, "-m", "scripts.doctor"]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "another process uses memory of GPU 1" in done.stderr
    assert f"2 x {H100}" in done.stdout and "GiB of shared memory free" in done.stdout
    # If the CPU is chosen, the GPUs are not looked at.
    for flags, platforms in (["--device_type=cpu"], ""), ([], "cpu"):
        done = subprocess.run(
            [*command, "--depth=2", *flags], cwd=REPOSITORY, env=env | {"JAX_PLATFORMS": platforms},
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert done.returncode == 0 and "GPUs:" not in done.stdout, done.stderr
