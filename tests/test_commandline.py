"""Commands that are stopped: one line and the signal in the exit status, whatever they are doing."""

import itertools
import os
import signal
import subprocess
import sys
import time

import killable
import pytest
import tiny

from nanochat_jax.config import REPOSITORY

# Runs a command that prints a line for each document and each report of progress.
NOISY = """
import runpy, sys
from nanochat_jax import progress
from nanochat_jax.data import parquet

def noisy(function):
    def called(*args, **kwargs):
        for _ in range(50):
            print("x" * 200)
        return function(*args, **kwargs)
    return called

progress.Progress.reach = noisy(progress.Progress.reach)
texts_of = parquet.texts_of
parquet.texts_of = lambda path: map(noisy(str), (text for _ in range(10**6) for text in texts_of(path)))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    base = tmp_path_factory.mktemp("world")
    tiny.make_world(base)
    output = base / "base.txt"
    assert killable.run("base", base, output, model_tag="d2", num_iterations=2) == 0, output.read_text()
    return base


def started(world, argv: list[str], output) -> subprocess.Popen:
    with open(output, "w") as file:
        return subprocess.Popen(
            [sys.executable, "-c", NOISY, *argv], cwd=REPOSITORY, env=tiny.environment(world), stdout=file, stderr=file
        )


def storm(process: subprocess.Popen, signals) -> None:
    deadline = time.monotonic() + 60
    for signum in itertools.cycle(signals):
        process.send_signal(signum)
        if process.poll() is not None:
            return
        time.sleep(0.001)
        assert time.monotonic() < deadline, "the process does not end"


@pytest.mark.parametrize(
    ("argv", "signals"),
    [("scripts.tok_train --data_dir={texts} --vocab_size=300 --fresh", [signal.SIGTERM]),
     ("scripts.chat_eval -i base -a sums", [signal.SIGINT]),
     pytest.param("scripts.tok_train --data_dir={texts} --fresh", [signal.SIGINT], marks=pytest.mark.slow),
     pytest.param("scripts.chat_eval -i base -a sums", [signal.SIGTERM], marks=pytest.mark.slow),
     pytest.param("scripts.base_eval --core_dir={core}", [signal.SIGTERM], marks=pytest.mark.slow),
     pytest.param("nanochat_jax.dataset --data_dir={many}", [signal.SIGINT], marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_storm_of_signals_in_a_storm_of_output_ends_a_command(argv, signals, world, tmp_path, request):
    core = request.getfixturevalue("data_dir") / "core" if "{core}" in argv else ""
    if "{many}" in argv:
        (tmp_path / "many").mkdir()
        for i in range(4):
            (tmp_path / "many" / f"{i}.txt").write_text("\n\n".join(f"text {j} of file {i}" for j in range(10**6)))
    argv = argv.format(texts=world / "texts", core=core, many=tmp_path / "many").split()
    process = started(world, argv, output := tmp_path / "output.txt")
    busy = 5_000 if "dataset" not in argv[0] else 10
    while output.stat().st_size < busy:
        assert process.poll() is None, output.read_text()[-3000:]
        time.sleep(0.01)
    storm(process, signals)
    text = output.read_text().replace("x" * 200, "")
    assert process.returncode == 128 + signals[0], text[-3000:]
    assert "Traceback" not in text and "reentrant" not in text and text.count("stopped\n") == 1, text[-3000:]


def test_a_reader_that_has_gone_ends_a_command_quietly(world):
    """As `python -m scripts.chat_eval ... | head -n 1` does."""
    argv = [sys.executable, "-c", NOISY, "scripts.chat_eval", "-i", "base", "-a", "sums"]
    reading, writing = os.pipe()
    process = subprocess.Popen(
        argv, cwd=REPOSITORY, env=tiny.environment(world), stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    os.close(reading)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGPIPE and "Traceback" not in errors and "Error" not in errors, errors
