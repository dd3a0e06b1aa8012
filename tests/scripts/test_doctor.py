"""What the doctor prints about a machine and a preset."""

import email.utils
import http.server
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
import tiny
from huggingface_hub import constants

from nanochat_jax.config import REPOSITORY
from scripts import doctor as script


def doctor(base, devices, *flags):
    command = [sys.executable, "tests/support/peak_memory.py", "scripts.doctor", *flags]
    env = tiny.environment(base, devices) | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120)


def test_a_preset_on_eight_devices(own_base_dir):
    done = doctor(own_base_dir, 8, "--config=d20", "--shard=full")
    assert done.returncode == 0, done.stderr
    printed = dict(re.findall(r"^([A-Z][^:\n]*): +(.*)$", done.stdout, re.MULTILINE))
    assert "560,988,160 parameters" in printed["Model"] and printed["Mesh"] == "node=1, data=8, model=1, --shard=full"
    assert printed["Batch"].startswith("524,288 tokens = ") and "x 8 replicas x 2048" in printed["Batch"]
    assert printed["On one device"].startswith("0.26 GiB of weights"), "an eighth of 561M parameters in 4 bytes"
    assert "21,400 steps, 11,219,763,200 tokens" in printed["Pretraining"]
    assert printed["Devices"].startswith("8 x cpu") or printed["Devices"].startswith("1 x cpu"), printed["Devices"]
    assert re.search(r"Python 3\.\d+.*jax .*flax .*optax ", printed["Versions"]) and "GiB" in printed["Memory"]
    assert {"Platform", "CPU", "Device memory", "Free disk", "Rust tokenizer"} <= printed.keys()
    assert "HF_HUB_OFFLINE" in printed["Hub"]
    assert re.fullmatch(r"4 MiB in [0-9.]+ ms, [0-9.]+ GB/s of bus bandwidth", printed["All-reduce"])
    assert re.search(r"matmuls in \w+ \(.*\), attention by xla \(no NVIDIA GPU\)", done.stdout)
    assert int(printed["Peak"].removesuffix(" MiB")) < 1500, "MiB, where weights and optimizer state would be 6,000"


def test_two_processes_are_described_as_one_machine(own_base_dir):
    where = tiny.free_address()
    command = [sys.executable, "-m", "scripts.doctor", f"--coordinator={where}", "--num_processes=2", "--depth=2"]
    started = [
        subprocess.Popen(
            [*command, f"--process_id={i}", "--total_batch_size=32768", "--device_batch_size=1"], cwd=REPOSITORY,
            env=tiny.environment(own_base_dir, 4) | {"HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    (printed, errors), (_, more_errors) = [p.communicate(timeout=120) for p in started]
    assert [p.returncode for p in started] == [0, 0], errors + more_errors
    assert "8 x cpu (cpu) in 2 processes" in printed and "node=1, data=8, model=1" in printed
    assert "32,768 tokens = 2 gradient accumulation steps x 1 row x 8 replicas x 2048" in printed


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(503 if "broken" in self.path else 200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_whether_the_hub_answers_is_printed(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert re.fullmatch(r"http://127.0.0.1:\d+ answers in \d+ ms", script.hub())
        broken = f"http://127.0.0.1:{server.server_port}/broken"
        monkeypatch.setattr(constants, "ENDPOINT", broken)
        assert script.hub() == f"{broken} answers with an error (503 Service Unavailable)"
        server.shutdown()
    with socket.socket() as taken:  # no server listens on it
        taken.bind(("127.0.0.1", 0))
        for wrong in (f"http://127.0.0.1:{taken.getsockname()[1]}", "no-address"):
            monkeypatch.setattr(constants, "ENDPOINT", wrong)
            assert re.fullmatch(rf"{wrong} does not answer \(.+\): use local text and tasks", script.hub())


def test_a_wrong_clock_is_told():
    def date(seconds):
        return email.utils.formatdate(time.time() + seconds, usegmt=True)

    assert script.wrong_clock(date(0)) == script.wrong_clock(date(30)) == script.wrong_clock(None) == ""
    assert script.wrong_clock("no date") == ""
    assert re.fullmatch(r"; THIS MACHINE'S CLOCK IS 1h00m BEHIND THE HUB'S: set it", script.wrong_clock(date(3601)))
    assert "AHEAD OF THE HUB'S" in script.wrong_clock(date(-90))


def test_the_tokenizer_is_the_one_that_training_will_use(own_base_dir, capsys):
    folder = own_base_dir / "tokenizer"
    train = "python -m scripts.tok_train trains one of 4,096 tokens"
    assert script.tokenizer_here(4096) == (4096, f"none yet in {folder}: {train}")
    folder.mkdir(parents=True)
    assert script.tokenizer_here(4096) == (4096, f"damaged, in {folder}: {train}")
    (folder / "nanochat.json").write_text('{"vocab_size": 4000}')
    (folder / "source.json").write_text('{"vocab_size": 4096, "source": "local"}')  # the text ran out of pairs
    assert script.tokenizer_here(4096) == (4000, f"4,000 tokens, trained on local, in {folder}")
    size, text = script.tokenizer_here(65536)
    assert size == 4000 and text.endswith("NOT what these settings would train: " + train.replace("4,096", "65,536"))


def test_a_preset_without_a_tokenizer_is_planned_with_the_presets_vocabulary(own_base_dir):
    done = doctor(own_base_dir, 1, "--config=configs/cpu.toml")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Tokenizer: +none yet in .* trains one of 4,096 tokens$", done.stdout, re.MULTILINE)
    assert re.search(
        r"^Model: +5,242,880 parameters, 4 layers, width 256, .* context 256$", done.stdout, re.MULTILINE
    ), done.stdout


@pytest.mark.parametrize(
    ("devices", "flags", "words"),
    [(6, ["--config=d20"], "--total_batch_size=524288 is not a multiple of 2048 tokens x 6 replicas"),
     (2, ["--mesh=data=3"], "this run has 2: try node=1,data=2,model=1"), (1, ["--depth=0"], "--depth=0"),
     (1, ["--device_type=tpu"], "--device_type=tpu: ")],
)  # fmt: skip
def test_what_cannot_be_trained_here_is_one_line(own_base_dir, devices, flags, words):
    done = doctor(own_base_dir, devices, *flags)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
