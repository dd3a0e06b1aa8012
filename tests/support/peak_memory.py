"""The peak memory of a process.

As a program, runs a command and prints its peak: peak_memory.py scripts.doctor --config=d20
"""

import re
import resource
import runpy
import sys
from pathlib import Path


def peak_memory() -> int:
    """The largest amount of memory this process has used, in bytes.

    On Linux, getrusage would also count the memory that the parent had at the fork.
    """
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = ""  # the current folder, as for `python -m`
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    finally:
        print("Peak:", peak_memory() // 2**20, "MiB")
