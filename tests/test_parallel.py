"""How the processes of a run find each other, and which precision a device gets."""

import builtins
import io
import subprocess
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import tiny

from nanochat_jax import parallel
from nanochat_jax.config import UserError


@pytest.fixture
def joined(monkeypatch):
    """Arguments of every attempt to join other processes."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **where: calls.append(where))
    for name in ("SLURM_STEP_NUM_TASKS", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_one_process_joins_nobody(joined, monkeypatch):
    parallel._join("", 0, -1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    parallel._join("", 0, -1)
    assert joined == []


@pytest.mark.parametrize(("name", "value"), [("SLURM_STEP_NUM_TASKS", "16"), ("JOB_COMPLETION_INDEX", "0")])
def test_slurm_and_kubernetes_say_themselves_where(joined, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    parallel._join("", 0, -1)
    assert joined == [{"heartbeat_timeout_seconds": 30}]


def test_flags_say_where_and_come_first(joined, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    parallel._join("there:1234", 2, 1)
    (where,) = joined
    assert where.items() >= {"coordinator_address": "there:1234", "num_processes": 2, "process_id": 1}.items()


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("there:1", 0, -1), "needs --num_processes=N and --process_id=0 to N-1, got 0 and -1"),
     (("there:1", 2, 2), "got 2 and 2"), (("there", 2, 0), "--coordinator=there: must be host:port"),
     (("", 2, 0), "--num_processes needs --coordinator=host:port")],
)  # fmt: skip
def test_processes_that_cannot_be_counted_are_refused(joined, flags, words):
    with pytest.raises(UserError, match=words):
        parallel._join(*flags)
    assert joined == []


def test_processes_that_cannot_be_joined_are_one_line(joined, monkeypatch):
    def fail(**where):
        raise RuntimeError("nobody there\nand more of it")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"^could not join the other processes: nobody there$"):
        parallel._join("there:1", 2, 1)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    with pytest.raises(UserError, match="nobody there: try --coordinator=host:port --num_processes=N --process_id=I"):
        parallel._join("", 0, -1)


def test_the_example_for_slurm_is_a_script_of_one_task_a_gpu():
    path = tiny.REPOSITORY / "docs" / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8")
    assert "--ntasks-per-node=8" in text and "--gpus-per-node=8" in text and "scripts.train --stage=base" in text


# -----------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "why"),
    [("gpu", "9.0", jnp.bfloat16, "the GPU has bf16 units"), ("gpu", "12.0", jnp.bfloat16, "the GPU has bf16 units"),
     ("gpu", "7.5", jnp.float32, "this GPU has no bf16 units"), ("tpu", "", jnp.bfloat16, "TPUs multiply in bf16")],
)  # fmt: skip
def test_precision_is_what_the_device_is_good_at(monkeypatch, platform, capability, dtype, why):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert parallel.choose_dtype("") == (dtype, why)


@pytest.mark.parametrize(("flags", "dtype"), [("avx2 amx_bf16 amx_tile", jnp.bfloat16), ("avx512_bf16", jnp.float32)])
def test_a_cpu_multiplies_in_bfloat16_where_it_has_amx(monkeypatch, flags, dtype):
    opened = builtins.open

    def read(path, *args, **kwargs):
        return io.StringIO(f"flags : {flags}\n") if path == "/proc/cpuinfo" else opened(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", read)
    chosen, why = parallel.choose_dtype("")
    assert chosen == dtype and "AMX" in why


def test_the_flag_overrides_and_the_choice_is_printed_with_its_reason(capsys):
    assert parallel.precision("bfloat16") == jnp.bfloat16 and parallel.precision("float32") == jnp.float32
    out = capsys.readouterr().out
    assert "matmuls in bfloat16 (as asked)" in out and "matmuls in float32 (as asked)" in out
    with pytest.raises(UserError, match="--compute_dtype=float16: must be bfloat16 or float32"):
        parallel.precision("float16")
