"""Training processes that start within a tenth of a second (see forked.py) and can be killed at any moment."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import zlib
from pathlib import Path

import forked
import tiny


def start(stage: str, base: Path, output: Path, devices: int = 1, before=None, **flags) -> multiprocessing.Process:
    """Starts a process that trains `stage` of the tiny model in the base folder `base`; `output` is a file.

    The process first calls `before`, a function that can be pickled.
    """
    argv, env = tiny.command(stage, **flags)[2:], tiny.environment(base, devices)
    process = forked.context.Process(target=_live, args=(argv, env, str(output), before))
    process.start()
    return process


def run(stage: str, base: Path, output: Path, devices: int = 1, before=None, **flags) -> int:
    """Trains to the end, and returns the exit code."""
    process = start(stage, base, output, devices, before, **flags)
    process.join(300)
    assert process.exitcode is not None, f"{stage} has not ended after 300 s"
    return process.exitcode


def kill(process: multiprocessing.Process) -> bool:
    """Sends SIGKILL, and returns whether the process was still running."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def until(condition, process: multiprocessing.Process, seconds: float = 120.0) -> bool:
    """Waits for a condition, checking it every half millisecond. False if the process ended first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if not process.is_alive():
            return condition()
        assert time.monotonic() < deadline, f"the condition is not met after {seconds} s"
        time.sleep(0.0005)
    return True


def _live(argv: list[str], env: dict[str, str], output: str, before) -> None:
    os.environ.update(env)
    if before is not None:
        before()
    forked.redirect(output, output)
    sys.argv = argv

    import jax

    from nanochat_jax import commandline
    from nanochat_jax.parallel import devices
    from nanochat_jax.tasks.task import Mixture
    from scripts import train

    start = devices.start

    def start_with_cache(*args, **kwargs):
        start(*args, **kwargs)
        jax.config.update(
            "jax_persistent_cache_min_compile_time_secs", 0.0
        )  # cache everything: these processes do not live long

    devices.start = start_with_cache
    # The tiny model answers no question right: if all rewards were 0, reinforcement would change nothing.
    Mixture.reward = lambda self, conversation, completion: zlib.crc32(completion.encode()) % 8 / 8
    commandline.run(train.main, train.chosen_stage())
