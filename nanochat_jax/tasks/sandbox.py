"""Runs Python that a model wrote, in a new interpreter with limits on time, memory, files and output.

This is not a security boundary. It stops accidents (endless loops, memory hogs, fork bombs, stray files, leaked
environment variables) and cheap ways of passing a test without solving the problem. Malicious code can still reach the
network and read what the user can read: run such code in a container or a virtual machine.
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

MAX_OUTPUT = 64 * 1024  # bytes kept of stdout; the same limit holds for stderr
MAX_FILE = 16 * 1024 * 1024  # bytes that the program may write to one file; also limits its captured output


@dataclass(frozen=True)
class Result:
    """How a program ended. `success` means that the program ran to its last line without an exception."""

    success: bool
    stdout: str
    stderr: str
    error: str | None
    timeout: bool
    memory_exceeded: bool


# What the child process runs. The program counts as successful only if the runner, after running it, reports the nonce.
# The nonce is a random number that stays unread in a pipe while the program runs. An exit code of 0 would prove
# nothing: a program can call sys.exit(0), which raises SystemExit in the runner, or os._exit(0), which ends the runner
# at once. The runner sets the limits itself, since setting them in a preexec_fn would be unsafe in a parent with
# threads. The functions that the runner needs after the program are bound to names before it starts, since the program
# may overwrite them in their modules.
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
    """Runs `code` as a separate program and reports how it ended.

    `timeout` is in wall-clock seconds and includes the start of the interpreter; `memory_bytes` limits the address
    space (None: no limit). The program has no input, an empty environment, and a temporary working directory.
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
            # Always kill the whole process group: children can outlive even a program that succeeded.
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
    """Why a program did not succeed, in one line."""
    if timed_out:
        return f"not finished after {timeout:g} s"
    if "error" in report:
        return str(report["error"])
    return f"killed by signal {-code}" if code < 0 else f"exited early with code {code}"


@contextlib.contextmanager
def _pipe() -> Generator[tuple[int, int], None, None]:
    """Yields the (read end, write end) of a new pipe, and closes both afterwards."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def _read_report(fd: int) -> dict:
    """The runner's report, a small JSON object, or {} if there is none. Never waits for a report."""
    os.set_blocking(fd, False)
    try:
        report = json.loads(os.read(fd, 65536))
    except (BlockingIOError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _head(file: IO[bytes]) -> str:
    """The first MAX_OUTPUT bytes of the captured output in `file`, as text."""
    file.seek(0)
    return file.read(MAX_OUTPUT).decode("utf-8", errors="replace")
