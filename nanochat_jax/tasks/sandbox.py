"""Runs a model's Python code in a new interpreter, with limits on time, memory, files and output.

The sandbox stops accidents: endless loops, excessive memory use, fork bombs, stray files and leaked environment
variables. It also stops simple tricks that pass a test without solving the problem. But it is not a security
boundary. Malicious code can still use the network and read every file that the user can read. To be safe from malicious
code, use a container or a virtual machine.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MAX_OUTPUT = 64 * 1024  # maximum number of bytes to keep from each of stdout and stderr
MAX_FILE = 16 * 1024 * 1024  # maximum size in bytes of a file that the program writes; stdout and stderr are files too


@dataclass(frozen=True)
class Result:
    """How a program ended. `success` means that the program ran to its last line without an exception."""

    success: bool
    stdout: str
    stderr: str
    error: str | None
    timeout: bool
    memory_exceeded: bool


# The child process runs the code below, called the runner. The runner sets the limits and then runs the program. The
# parent process could set the limits in a preexec_fn, but a preexec_fn is unsafe if the parent process has threads.
#
# An exit code of 0 does not prove success, because the program can stop early with sys.exit(0) or os._exit(0). So the
# parent process puts a random number, the nonce, into a pipe. After the program's last line, the runner reads the nonce
# and reports it. If the report lacks the nonce, the program has failed.
#
# The program may replace functions in the modules that the runner uses. So before the program starts, the runner saves
# the functions that it will need later.
_RUNNER = """
import json, os, resource, sys
read, write, leave, dumps = os.read, os.write, os._exit, json.dumps

def limit(kind, value):
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):
        pass  # macOS refuses RLIMIT_AS; a hard limit may already be lower

def run(nonce_fd, report_fd, memory, seconds, max_file):
    if memory:
        limit(resource.RLIMIT_AS, memory)
    limit(resource.RLIMIT_CPU, seconds)
    limit(resource.RLIMIT_FSIZE, max_file)
    limit(resource.RLIMIT_NOFILE, 64)
    limit(resource.RLIMIT_CORE, 0)
    if os.getuid():
        limit(resource.RLIMIT_NPROC, 0)  # no new processes or threads; the kernel ignores this limit for root
    report = {}
    try:
        with open("program.py", encoding="utf-8") as f:
            code = compile(f.read(), "program.py", "exec")
        exec(code, {"__name__": "__main__"})
        sys.stdout.flush()
    except BaseException as error:
        report["memory"] = isinstance(error, MemoryError)
        report["error"] = f"{type(error).__name__}: {error}"[:1000]
    else:
        report["nonce"] = read(nonce_fd, 64).decode()
    write(report_fd, dumps(report).encode())
    leave(0)  # without waiting for threads and exit handlers that the program left behind

run(*map(int, sys.argv[1:]))
"""


def execute(code: str, timeout: float = 5.0, memory_bytes: int | None = 256 * 1024 * 1024) -> Result:
    """Runs `code` in a separate process and reports how it ended.

    `timeout` is in wall-clock seconds and includes the start of the interpreter. `memory_bytes` limits the address
    space (None: no limit). The program gets no input, an empty environment, and a temporary working directory.
    """
    nonce = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="nanochat-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
        _pipe() as (nonce_read, nonce_write),
        _pipe() as (report_read, report_write),
    ):
        Path(folder, "program.py").write_text(code, encoding="utf-8", errors="replace")
        os.write(nonce_write, nonce.encode())
        arguments = (nonce_read, report_write, memory_bytes or 0, int(timeout) + 1, MAX_FILE)
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _RUNNER, *map(str, arguments)],
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=(nonce_read, report_write),
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            # Kill the whole process group. Even after a success, child processes of the program may still be running.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        report = _read_report(report_read)
        success = not timed_out and report.get("nonce") == nonce
        return Result(
            success,
            stdout=_head(stdout),
            stderr=_head(stderr),
            error=None if success else _failure(timed_out, report, process.returncode, timeout),
            timeout=timed_out,
            memory_exceeded=bool(report.get("memory")),
        )


def _failure(timed_out: bool, report: dict, code: int, timeout: float) -> str:
    if timed_out:
        return f"not finished after {timeout:g} s"
    if "error" in report:
        return str(report["error"])
    return f"killed by signal {-code}" if code < 0 else f"exited early with code {code}"


@contextlib.contextmanager
def _pipe() -> Generator[tuple[int, int], None, None]:
    """Yields the file descriptors (read end, write end) of a new pipe, and closes them afterwards."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def _read_report(fd: int) -> dict:
    """Returns the runner's report, or {} if there is no report. Does not wait for a report."""
    os.set_blocking(fd, False)
    try:
        report = json.loads(os.read(fd, 65536))
    except (BlockingIOError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _head(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(MAX_OUTPUT).decode("utf-8", errors="replace")
