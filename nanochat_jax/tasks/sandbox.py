"""Runs a model's Python code in separate processes, with limits on time, memory, files and output.

The sandbox stops accidents: endless loops, excessive memory use, fork bombs, stray files and leaked environment
variables. The verdict comes from a process that the program cannot change, so a program cannot declare itself right
(see judge.py). But the sandbox is not a security boundary. Malicious code can still use the network, read every file
that the user can read, and write where the user can write, for example change this file for the programs that follow.
To be safe from malicious code, use a container or a virtual machine.

A program may start other processes. The system decides which of them end together with the program:

    namespace  all of them, because the program runs in a PID namespace
    subreaper  all of them, unless the program kills the judge
    group      those that stay in the program's process group

`strongest_level` finds out which of these levels work here.

A program must not reach into the judge or into this process, where the verdict and the expected values are. At the
level "namespace" it cannot, since the kernel protects what is outside its user namespace, and the judge has privileges
that it lacks. At the other levels it may be able to, if the system refuses what should prevent it (see judge.py):

    without Landlock (before Linux 5.13, or switched off), a program can reach into a judge that is just starting.
    Therefore this command runs programs one at a time. But a program can still change the verdicts of another command,
    and later verdicts if it kills its judge and lives on. A program whose judge was killed has failed.

    without prctl or ctypes as well, which only the level "group" accepts, a program can read the expected values and
    write its own verdict.

`Result.weakness` and `describe` say so.
"""

import contextlib
import functools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nanochat_jax.tasks import judge

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
NO_LANDLOCK = "one at a time, because without Landlock a program can change the verdict on another one"
UNPROTECTED = "without protection of the verdict: a program can read the expected values and write its own verdict"


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
    weakness: str = ""  # how any program here could change a verdict: "", NO_LANDLOCK or UNPROTECTED


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
    channel, judges_channel = socket.socketpair()
    with (
        channel,
        judges_channel,
        tempfile.TemporaryDirectory(prefix="nanochat-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
        _alone(level),
        _hidden(level) as hidden,
    ):
        Path(folder, "program.py").write_text(code, encoding="utf-8", errors="replace")
        settings = {"channel": judges_channel.fileno(), "level": level, "function": function, "limits": limits}
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", JUDGE, json.dumps(settings)],
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=(judges_channel.fileno(),),
            start_new_session=True,
        )
        judges_channel.close()
        end = time.monotonic() + timeout
        timed_out = False
        report = {}
        try:
            report = _report(channel, tests, end)
            process.wait(max(0, end - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            timed_out = True
            process.terminate()  # the judge kills what the program started, and then exits
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        success = not timed_out and process.returncode == 0 and report.get("success") is True
        refused = report.get("refused") or ()
        return Result(
            success,
            stdout=_head(stdout),
            stderr=_head(stderr),
            error=None if success else _failure(timed_out, report, process.returncode, timeout),
            timeout=timed_out,
            memory_exceeded=bool(report.get("memory")),
            unlimited=tuple(words for name, words in LIMITS.items() if name in refused),
            weakness=_weakness(level, hidden, refused),
        )


@functools.cache
def strongest_level() -> str:
    """Returns the strongest level that works here. The first call tries out the levels."""
    return next((level for level in PROBES if not _failure_of(level)), "group")


@functools.cache
def describe() -> str:
    """Describes, in one line, the level in force, why no stronger level is, how a program could change a verdict, and
    the limits that this system refuses."""
    level = strongest_level()
    parts = [LEVELS[level]]
    parts += [f"{stronger} failed: {error}" for stronger in PROBES if (error := _failure_of(stronger))]
    result = execute("", level=level, timeout=PROBE_TIMEOUT)
    if result.weakness:
        parts.append(result.weakness)
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


def _report(channel: socket.socket, tests: str, end: float) -> dict:
    """Sends the tests to the judge. Returns its report, or {} if the judge ended without one. Raises TimeoutError at
    the time `end`."""
    nonce = secrets.token_hex(16)
    received = bytearray()

    def limit_time() -> None:
        channel.settimeout(max(0.001, end - time.monotonic()))

    try:
        limit_time()
        channel.sendall(f"{nonce}\n{tests}".encode(errors="replace"))
        channel.shutdown(socket.SHUT_WR)
        while not received.endswith(b"\n"):
            limit_time()
            part = channel.recv(1 << 16)
            if not part:
                break
            received += part
    except (BrokenPipeError, ConnectionResetError):  # the judge ended without having read everything
        pass
    try:
        report = json.loads(received)
    except ValueError:
        return {}
    return report if isinstance(report, dict) and report.get("nonce") == nonce else {}


_one_at_a_time = threading.Lock()


def _alone(level: str) -> contextlib.AbstractContextManager:
    """Lets one program run at a time, if a program could reach into the judges that start meanwhile."""
    if level == "namespace" or judge.take(judge.landlock_version, required=False):
        return contextlib.nullcontext()
    return _one_at_a_time


_hiding = threading.Lock()
_programs = 0  # number of programs for which this process is hidden
_restore = False  # whether to end the hiding after the last program


@contextlib.contextmanager
def _hidden(level: str) -> Generator[bool]:
    """Hides this process while a program runs, as the judge hides itself. Yields whether that worked.

    While hidden, a debugger or profiler of an ordinary user cannot attach to this process, and it dumps no core. At the
    level "namespace", hiding is not necessary.
    """
    global _programs, _restore
    if level == "namespace":
        yield True
        return
    with _hiding:
        try:
            if judge.prctl(judge.PR_GET_DUMPABLE) == 1:
                judge.hide()
                _restore = True
            hidden = True
        except OSError:
            hidden = False
        _programs += 1
    try:
        yield hidden
    finally:
        with _hiding:
            _programs -= 1
            if _restore and not _programs:
                judge.prctl(judge.PR_SET_DUMPABLE, 1)
                _restore = False


def _weakness(level: str, hidden: bool, refused: Collection[str]) -> str:
    """Returns how the program could have changed a verdict, given what the system refused."""
    if level == "namespace" or "confine" not in refused:
        return ""
    return NO_LANDLOCK if hidden and not {"hide", "drop_privileges"} & set(refused) else UNPROTECTED


def _head(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(MAX_OUTPUT).decode("utf-8", errors="replace")
