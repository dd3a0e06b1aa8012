"""Runs a model's Python code in separate processes, with limits on time, memory, files and output.

The sandbox stops accidents: endless loops, excessive memory use, fork bombs, stray files and leaked environment
variables. The verdict comes from a process that the program cannot change, so a program cannot declare itself right
(see judge.py). But the sandbox is not a security boundary. Malicious code can still use the network, read every file
that the user can read, and write where the user can write. To be safe from malicious code, use a container or a virtual
machine.

A program may start other processes. The system decides which of them end together with the program:

    namespace  all of them, because the program runs in a PID namespace
    subreaper  all of them, unless the program kills the judge
    group      those that stay in the program's process group

`strongest_level` finds out which of these levels work here.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MAX_OUTPUT = 64 * 1024  # maximum number of bytes to keep from each of stdout and stderr
MAX_FILE = 16 * 1024 * 1024  # maximum size in bytes of a file that the program writes; stdout and stderr are files too
MAX_OPEN = 64  # maximum number of open files
PROBE_TIMEOUT = 60.0  # a program that tests a level gets this many seconds, because the machine may be busy
GRACE = 5.0  # after a timeout, the judge gets this many seconds to clean up
JUDGE = Path(__file__).with_name("judge.py")

LEVELS = {
    "namespace": "in PID namespaces; processes that they start end with them",
    "subreaper": "without PID namespaces; processes that they start are searched and killed",
    "group": "in process groups; a process that leaves its group survives",
}
# Programs that succeed at a level if the level works here. The imports check that a program can read the standard
# library. In a PID namespace, the program is process 2.
PROBES = {"namespace": "import os, statistics\nassert os.getpid() == 2", "subreaper": "import statistics"}
LIMITS = {
    "RLIMIT_AS": "memory",
    "RLIMIT_CPU": "CPU time",
    "RLIMIT_FSIZE": "file size",
    "RLIMIT_NOFILE": "open files",
    "RLIMIT_NPROC": "processes",
    "RLIMIT_CORE": "core dumps",
}


@dataclass(frozen=True)
class Result:
    """How a program ended. `success` means that the program ran to its last line without an exception and passed the
    tests."""

    success: bool
    stdout: str
    stderr: str
    error: str | None
    timeout: bool
    memory_exceeded: bool
    unlimited: tuple[str, ...] = ()  # limits that the system refused, such as "memory"


def execute(
    code: str,
    tests: str = "",
    function: str = "candidate",
    *,
    timeout: float = 5.0,
    memory_bytes: int | None = 256 * 1024 * 1024,
    level: str | None = None,
) -> Result:
    """Runs the program in `code`, then the tests in `tests`, and returns the result.

    The program and the tests run in two processes. `function` is the name of the program's function that the tests
    call. They may also call it `candidate`. The tests cannot use any other name that the program defines. Arguments and
    results are copied, as plain data. Without tests, the program's own process reports success, so the program can
    forge the report.

    `timeout` is in wall-clock seconds and includes the start of the interpreter. `memory_bytes` limits the address
    space (None: no limit). The program gets no input, an empty environment, and a temporary working directory. `level`
    is a key of LEVELS, by default the strongest level that works here.
    """
    level = level or strongest_level()
    limits = {
        "RLIMIT_CPU": int(timeout) + 1,
        "RLIMIT_FSIZE": MAX_FILE,
        "RLIMIT_NOFILE": MAX_OPEN,
        "RLIMIT_CORE": 0,
    }
    if memory_bytes:
        limits["RLIMIT_AS"] = memory_bytes
    if os.getuid():
        limits["RLIMIT_NPROC"] = 0  # no new processes or threads; the kernel ignores this limit for root
    with (
        tempfile.TemporaryDirectory(prefix="nanochat-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
        tempfile.TemporaryFile() as report_file,
    ):
        Path(folder, "program.py").write_text(code, encoding="utf-8", errors="replace")
        stdin.write(tests.encode(errors="replace"))
        stdin.seek(0)
        settings = {"report": report_file.fileno(), "level": level, "function": function, "limits": limits}
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", JUDGE, json.dumps(settings)],
            cwd=folder,
            env={},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=(report_file.fileno(),),
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            process.terminate()  # the judge kills what the program started, and then exits
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        report = _read_report(report_file)
        success = not timed_out and report.get("success") is True
        return Result(
            success,
            stdout=_head(stdout),
            stderr=_head(stderr),
            error=None if success else _failure(timed_out, report, process.returncode, timeout),
            timeout=timed_out,
            memory_exceeded=bool(report.get("memory")),
            unlimited=tuple(words for name, words in LIMITS.items() if name in (report.get("unlimited") or ())),
        )


@functools.cache
def strongest_level() -> str:
    """Returns the strongest level that works here. The first call tries out the levels."""
    return next((level for level in PROBES if not _failure_of(level)), "group")


@functools.cache
def describe() -> str:
    """Describes, in one line, the level in force, why no stronger level is, and the limits that this system refuses."""
    level = strongest_level()
    parts = [LEVELS[level]]
    parts += [f"{stronger} failed: {error}" for stronger in PROBES if (error := _failure_of(stronger))]
    result = execute("", level=level, timeout=PROBE_TIMEOUT)
    if result.unlimited:
        parts.append(f"not limited on this system: {', '.join(result.unlimited)}")
    elif not result.success:
        parts.append(f"unknown whether all limits hold: {result.error}")
    return "; ".join(parts)


@functools.cache
def _failure_of(level: str) -> str:
    """Returns "" if `level` works here, else one line with the reason why it does not."""
    result = execute(PROBES[level], level=level, timeout=PROBE_TIMEOUT)
    if result.success:
        return ""
    last = result.stderr.strip().rpartition("\n")[2]  # if the judge ended early, the last line of its traceback
    return (result.error or "").partition("\n")[0] + (f" ({last})" if last else "")


def _failure(timed_out: bool, report: dict, code: int, timeout: float) -> str:
    if timed_out:
        return f"not finished after {timeout:g} s"
    if "error" in report:
        return str(report["error"])
    return f"the judge was killed by signal {-code}" if code < 0 else f"the judge exited early with code {code}"


def _read_report(file: IO[bytes]) -> dict:
    """Returns the judge's report, or {} if the judge ended without one."""
    file.seek(0)
    try:
        return json.loads(file.read())
    except ValueError:
        return {}


def _head(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(MAX_OUTPUT).decode("utf-8", errors="replace")
