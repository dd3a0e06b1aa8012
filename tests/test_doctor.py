"""What the doctor says of a machine and a preset."""

import re
import subprocess
import sys

import pytest
import tiny


def doctor(base, devices, *flags):
    command = [sys.executable, "-m", "scripts.doctor", *flags]
    env = tiny.environment(base, devices) | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=tiny.REPOSITORY, env=env, capture_output=True, text=True, timeout=120)


def test_a_preset_on_eight_devices(own_base_dir):
    done = doctor(own_base_dir, 8, "--config=d20", "--shard=full")
    assert done.returncode == 0, done.stderr
    told = dict(re.findall(r"^([A-Z][^:\n]*): +(.*)$", done.stdout, re.MULTILINE))
    assert "560,988,160 parameters" in told["Model"] and told["Mesh"] == "node=1, data=8, model=1, --shard=full"
    assert told["Batch"].startswith("524,288 tokens = ") and "x 8 replicas x 2048" in told["Batch"]
    assert told["On one device"].startswith("0.26 GiB of weights"), "an eighth of 561M parameters in 4 bytes"
    assert "21,400 steps, 11,219,763,200 tokens" in told["Pretraining"]


@pytest.mark.parametrize(
    ("devices", "flags", "words"),
    [(6, ["--config=d20"], "--total_batch_size=524288 is not a multiple of 2048 tokens x 6 devices"),
     (2, ["--mesh=data=3"], "there are 2: try node=1,data=2,model=1"), (1, ["--depth=0"], "--depth=0"),
     (1, ["--device_type=tpu"], "--device_type=tpu: ")],
)  # fmt: skip
def test_what_cannot_be_trained_here_is_one_line(own_base_dir, devices, flags, words):
    done = doctor(own_base_dir, devices, *flags)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
