"""What a test does to a training process before it starts: makes it print a lot, or wait in an evaluation."""

import functools
import importlib
import sys
import time
from pathlib import Path

from nanochat_jax import run_log


def print_a_lot() -> None:
    """Prints 200 lines with every log record, so that most signals arrive in the middle of `print`."""
    append = run_log.append

    @functools.wraps(append)
    def noisy(*args, **fields):
        for _ in range(200):
            print("x" * 200)
        append(*args, **fields)

    run_log.append = noisy


def block_at(function: str, block: Path) -> None:
    """While the file `block` exists, `function` ("module:name" or "module:Class:name") waits before it starts.

    It makes the file `blocked` beside it.
    """
    module, *owner, name = function.split(":")
    where = importlib.import_module(module)
    where = getattr(where, owner[0]) if owner else where
    real = getattr(where, name)

    @functools.wraps(real)
    def blocked(*args, **kwargs):
        while block.exists():
            block.with_name("blocked").touch()
            time.sleep(0.01)
        return real(*args, **kwargs)

    setattr(where, name, blocked)


def both(function: str, block: Path) -> None:
    print_a_lot()
    block_at(function, block)


def import_from(folder: Path) -> None:
    """Lets modules in `folder` stand in for installed ones."""
    sys.path.insert(0, str(folder))
