"""Keeps the memory that XLA frees after each program on a CPU, so that the next program need not fault it in again.

On a CPU, XLA allocates the temporary arrays of a program when the program starts, and frees them when it ends. A
training step of 4,096 tokens has 650 MB of them (depth 4, width 256, vocabulary 4,096). By default, glibc returns such
large blocks to the kernel. So in every step, the kernel must clear 160,000 pages anew, which took a sixth of the step's
CPU time (2 cores of an AMD EPYC, JAX 0.10.2).
"""

import contextlib
import ctypes
import mmap
import os
from collections.abc import Generator

# Parameters of mallopt, from glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
HUGE_PAGE = 2**21
MADV_HUGEPAGE = 14


@contextlib.contextmanager
def freed_memory_kept() -> Generator[bool]:
    """Makes malloc keep what is freed, and places it in huge pages. Yields whether this is possible and was done.

    JAX must start its threads inside this context. They then allocate from the main heap. Any other thread gets a heap
    of its own, from which blocks above 64 MiB always return to the kernel.

    This works with glibc on Linux. It does nothing if the environment already configures glibc's malloc. The process
    then holds its peak memory until it ends.
    """
    libc = ctypes.CDLL(None)
    possible = hasattr(libc, "gnu_get_libc_version") and not _configured_by_user()
    if not possible:
        yield False
        return
    libc.mallopt(M_MMAP_MAX, 0)  # blocks in mappings of their own would return to the kernel
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # so would the top of the heap
    libc.mallopt(M_ARENA_MAX, 1)
    _use_huge_pages(libc, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    try:
        yield True
    finally:
        libc.mallopt(M_ARENA_MAX, 8 * (os.cpu_count() or 1))  # glibc's default, for the threads that compile


def _configured_by_user() -> bool:
    return "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in os.environ
    )


def _use_huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """Grows the heap by `size` bytes of address space that the kernel will back with huge pages when they are used.

    No memory is used yet. If the address space is limited (ulimit -v), nothing happens.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block:
        first = -(-block // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(first, (block + size - first) // mmap.PAGESIZE * mmap.PAGESIZE, MADV_HUGEPAGE)
        libc.free(block)
