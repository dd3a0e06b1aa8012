"""Keeps the memory that XLA frees after each program on a CPU, so that the next program need not fault it in again.

On a CPU, XLA allocates the temporary arrays of a program when the program starts, and frees them when it ends. A
training step of the cpu preset has 650 MB of them. By default, glibc returns such large blocks to the kernel. So in
every step, the kernel must clear 160,000 pages anew, which takes about a fifth of the step's time.
"""

import ctypes
import mmap
import os
import sys

# Parameters of mallopt, from glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
HUGE_PAGE = 2**21
MADV_HUGEPAGE = 14


def keep_freed_memory() -> bool:
    """Makes malloc keep what is freed, and places it in huge pages. Returns whether this is possible and was done.

    Call this before other threads allocate memory. It works with glibc on Linux, and does nothing if the environment
    already configures glibc's malloc. The process then holds its peak memory until it ends, or up to 2 GiB more than it
    uses.
    """
    if not sys.platform.startswith("linux") or _configured_by_user():
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # A block of its own mapping, or at the top of the heap, would be returned to the kernel. And blocks above 64 MiB
    # always get their own mapping if their thread has an arena of its own.
    if not all(libc.mallopt(*option) for option in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1))):
        return False
    _use_huge_pages(libc, half_of_memory())
    return True


def half_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


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
