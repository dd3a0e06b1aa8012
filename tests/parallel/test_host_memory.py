"""Memory that XLA frees is kept for the next program."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")

# Prints how many pages are faulted in when a thread allocates, fills and frees 256 MiB for the second time.
PROGRAM = """
import resource, threading
from nanochat_jax.parallel.host_memory import freed_memory_kept

def use():
    b"x" * 2**28

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with freed_memory_kept() as kept:
    faults()
    print(kept, faults())
"""


def run(program: str = PROGRAM, **environment: str) -> list[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    return subprocess.check_output([sys.executable, "-c", program], env=clean | environment, text=True).split()


def test_freed_memory_is_not_faulted_in_again():
    kept, faults = run()
    assert kept == "True" and int(faults) < 1000  # of 65,536 pages


def test_the_settings_of_the_user_win():
    kept, faults = run(MALLOC_ARENA_MAX="8")
    assert kept == "False" and int(faults) > 60_000


def test_a_limited_address_space_is_no_error():
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({2**32}, {2**32}))\n"
    kept, faults = run(limit + PROGRAM)
    assert kept == "True" and int(faults) < 1000


def test_a_program_on_a_cpu_reuses_the_memory_of_the_last_one():
    """JAX's own threads allocate it."""
    program = """
import resource
import jax, jax.numpy as jnp
from nanochat_jax.parallel import devices

devices.start("cpu")
f = jax.jit(lambda x: jax.lax.cummax(x.reshape(16, -1) + 1, axis=0)[:, :3])
x = jnp.zeros(2**24)
for _ in range(3):
    f(x).block_until_ready()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""
    assert int(run(program)[0]) < 1000
    assert int(run(program, MALLOC_ARENA_MAX="8")[0]) > 15_000
