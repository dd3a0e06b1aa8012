"""Right programs succeed, every other one fails, limits hold, and nothing that a program starts outlives it.

test_forgers.py has the programs that try to forge the verdict."""

import fcntl
import functools
import os
import subprocess
import sys
import time

import pytest

from nanochat_jax.tasks import sandbox
from nanochat_jax.tasks.sandbox import execute


def test_a_program_that_ends_well():
    result = execute("import sys\nprint('out')\nprint('err', file=sys.stderr)\nx = sum(range(10))")
    assert result.success and result.error is None and not result.timeout and not result.memory_exceeded
    assert result.stdout == "out\n" and result.stderr == "err\n"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("assert 1 == 2, 'unequal'", "AssertionError: unequal"),
        ("def broken(:", "SyntaxError"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise SystemExit", "SystemExit"),
        ("exit()", "SystemExit"),
        ("import os; os._exit(0)", "exited early with code 0"),
        ("import os; os.execv('/bin/true', ['true'])", "exited early with code 0"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "signal 15"),
        ("import os; os.read = os.write = lambda *a: b'x'\nraise ValueError('later')", "ValueError: later"),
        ("raise type('Odd', (Exception,), {})(chr(0xd800) * 5000)", "Odd"),
    ],
)
def test_a_program_that_does_not_run_to_its_end_fails(code, error):
    result = execute(code)
    assert not result.success and error in result.error


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)"])
def test_the_wall_clock_ends_it(code):
    start = time.monotonic()
    result = execute(code, timeout=0.5)
    assert result.timeout and not result.success and "0.5 s" in result.error
    assert time.monotonic() - start < 3


def test_memory_is_limited():
    hog = "x = bytearray(512 * 1024 * 1024)"
    result = execute(hog)
    assert result.memory_exceeded and not result.success and "MemoryError" in result.error
    assert execute(hog, memory_bytes=None).success


def test_output_is_bounded():
    result = execute("for _ in range(10): print('x' * 100_000)")
    assert result.success and len(result.stdout) <= sandbox.MAX_OUTPUT
    assert not execute("open('big', 'wb').write(bytes(64 * 1024 * 1024))").success


def test_environment_input_and_folder_are_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.chdir(tmp_path)
    result = execute("""
import os
assert "SECRET_TOKEN" not in os.environ and "HOME" not in os.environ and "PATH" not in os.environ
open("mine", "w").close()
print(os.getcwd())
try:
    input()
except EOFError:
    print("no input")
""")
    folder, line = result.stdout.splitlines()
    assert result.success and line == "no input"
    assert not os.path.exists(folder) and not list(tmp_path.iterdir())


def test_two_at_once_do_not_meet():
    first, second = execute("open('a', 'w').close()"), execute("import os; assert not os.path.exists('a')")
    assert first.success and second.success


# Starts a child that leaves its process group and its parent (a daemon). The child locks the file `mark` until it ends,
# and would write to it later. The program goes on when the file is locked.
DAEMON = """
import fcntl, os, time
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        file = open({mark!r}, "w")
        fcntl.flock(file, fcntl.LOCK_EX)
        os.write(write, b"x")
        time.sleep(10)
        file.write("still here")
        file.close()
    os._exit(0)
os.read(read, 1)
"""
ENDS = {"success": "", "timeout": "time.sleep(60)", "exit": "os._exit(0)", "kill": "os.kill(os.getpid(), 9)"}
only_root = pytest.mark.skipif(os.getuid() != 0, reason="only root's programs can start processes")
strong_levels = pytest.mark.parametrize("level", ["namespace", "subreaper"])


def is_gone(mark):
    with open(mark) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def skip_without(level):
    if level == "namespace" and sandbox.strongest_level() != level:
        pytest.skip("no PID namespaces here")


@only_root
@strong_levels
@pytest.mark.parametrize("end", ENDS)
def test_a_daemon_does_not_outlive_the_program(level, end, tmp_path):
    skip_without(level)
    result = execute(
        DAEMON.format(mark=str(tmp_path / "mark")) + ENDS[end], level=level, timeout=4 if end == "timeout" else 30
    )
    assert is_gone(tmp_path / "mark") and not (tmp_path / "mark").read_text()
    assert (result.success, result.timeout) == (end == "success", end == "timeout"), result


@only_root
@strong_levels
def test_the_program_ends_when_the_command_is_killed(level, tmp_path):
    skip_without(level)
    mark = tmp_path / "mark"
    program = DAEMON.format(mark=str(mark)).replace("sleep(10)", "sleep(60)") + "time.sleep(60)"
    command = f"from nanochat_jax.tasks import sandbox; sandbox.execute({program!r}, timeout=60, level={level!r})"
    process = subprocess.Popen([sys.executable, "-c", command])
    until(lambda: mark.exists() and not is_gone(mark))
    process.kill()
    process.wait()
    until(lambda: is_gone(mark))


@only_root
def test_at_the_weakest_level_a_child_ends_but_a_daemon_does_not(tmp_path):
    child = DAEMON.replace("os.setsid()", "pass").format(mark=str(tmp_path / "child"))
    assert execute(child, level="group").success
    until(lambda: is_gone(tmp_path / "child"))
    assert execute(DAEMON.format(mark=str(tmp_path / "daemon")), level="group").success
    assert not is_gone(tmp_path / "daemon")


@only_root
@strong_levels
def test_a_program_that_forks_all_the_time_is_gone_after_its_time(level, tmp_path):
    skip_without(level)
    # Each process writes a file, forks, and ends: there are never many at once, and the process ids change soon.
    relay = f"""
import os
os.setsid() if os.fork() == 0 else os._exit(0)
while True:
    open({str(tmp_path / "mark")!r}, "w").close()
    if os.fork():
        os._exit(0)
"""
    execute(relay, level=level, timeout=2)
    (tmp_path / "mark").unlink(missing_ok=True)
    time.sleep(0.3)
    assert not (tmp_path / "mark").exists()


def missing(monkeypatch, tmp_path, code):
    """Runs the judge on a system that lacks something: `code` takes it away first."""
    judge = tmp_path / "judge.py"
    judge.write_text(f"import sys\n{code}\n" + sandbox.JUDGE.read_text())
    monkeypatch.setattr(sandbox, "JUDGE", judge)
    fresh_probes(monkeypatch)


def fresh_probes(monkeypatch):
    for function in (sandbox.strongest_level, sandbox.describe, sandbox._failure_of):
        monkeypatch.setattr(sandbox, function.__name__, functools.cache(function.__wrapped__))


NO_PROC = """
import builtins, os
def refuse(function):
    def refusing(path, *args, **kwargs):
        if str(path).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return function(path, *args, **kwargs)
    return refusing
builtins.open, os.listdir = refuse(builtins.open), refuse(os.listdir)
"""
NO_NAMESPACE = """
import ctypes
class Lib(ctypes.CDLL):
    def __getattr__(self, name):
        if name == "unshare":
            return lambda *args: -1
        return super().__getattr__(name)
ctypes.CDLL = Lib
"""
NO_MEMORY_LIMIT = """
import resource
set_limit = resource.setrlimit
def setrlimit(kind, value):
    if kind == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    set_limit(kind, value)
resource.setrlimit = setrlimit
"""
UNLIMITED = "not limited on this system: "


@pytest.mark.parametrize(
    ("code", "level", "words"),
    [
        (NO_NAMESPACE, "subreaper", "without PID namespaces"),
        (NO_NAMESPACE, "subreaper", "namespace failed: the judge exited early with code 1 (OSError: "),
        (NO_PROC, "group", "process that leaves its group survives"),
        ("sys.modules['ctypes'] = None", "group", "process that leaves its group survives"),
        ("sys.modules['ctypes'] = None", "group", sandbox.UNPROTECTED),
        ("sys.modules['resource'] = None", None, UNLIMITED + "memory, CPU time, file size, open files"),
        (NO_MEMORY_LIMIT, None, UNLIMITED + "memory"),
        ("sys.modules['resource'] = sys.modules['ctypes'] = None" + NO_PROC, "group", UNLIMITED + "memory, CPU time"),
    ],
)
def test_without_linux_it_falls_back_and_says_so(code, level, words, monkeypatch, tmp_path):
    missing(monkeypatch, tmp_path, code)
    assert level in (None, sandbox.strongest_level())
    assert words in sandbox.describe()
    assert execute("def f(x):\n    return x + 1", "assert f(1) == 2", "f").success
    assert not execute("def f(x):\n    return x", "assert f(1) == 2", "f").success
    assert execute("import time; time.sleep(60)", timeout=1).timeout


def test_tests_that_do_not_fit_into_the_socket_reach_the_judge(monkeypatch, tmp_path):
    many = "assert f(1) == 1\n" + "x = 'a long line of the tests'\n" * 50_000 + "assert f(2) == {}\n"
    assert execute("f = int", many.format(2), "f", timeout=30).success
    assert not execute("f = int", many.format(3), "f", timeout=30).success
    missing(monkeypatch, tmp_path, "import time; time.sleep(60)")  # a judge that reads nothing
    assert execute("f = int", many.format(2), "f", level="group", timeout=0.5).timeout
    missing(monkeypatch, tmp_path, "sys.exit(3)")
    assert execute("f = int", many.format(2), "f", level="group").error == "the judge exited early with code 3"


# A judge that sends a verdict of its own, and ends with the exit code 0 or 1.
JUDGE = """
import json, os
channel = json.loads(sys.argv[1])["channel"]
nonce = os.read(channel, 100).decode().partition(chr(10))[0]
os.write(channel, json.dumps({verdict}).encode() + bytes([10]))
os._exit({code})
"""


@pytest.mark.parametrize(
    ("verdict", "code", "success"),
    [
        ("{'success': True, 'nonce': nonce}", 0, True),
        ("{'success': True, 'nonce': nonce}", 1, False),
        ("{'success': True, 'nonce': nonce[1:]}", 0, False),
        ("{'success': True}", 0, False),
        ("[nonce]", 0, False),
    ],
)
def test_a_verdict_counts_if_it_has_the_nonce_and_the_judge_ended_well(verdict, code, success, monkeypatch, tmp_path):
    missing(monkeypatch, tmp_path, JUDGE.replace("{verdict}", verdict).replace("{code}", str(code)))
    assert execute("", level="group").success is success


def test_a_busy_machine_gets_time_and_a_probe_without_an_answer_is_not_called_a_refusal(monkeypatch, tmp_path):
    missing(monkeypatch, tmp_path, "import time; time.sleep(6)")  # longer than the time of a program
    assert sandbox.strongest_level() != "group"
    fresh_probes(monkeypatch)
    monkeypatch.setattr(sandbox, "PROBE_TIMEOUT", 0.1)
    assert sandbox.strongest_level() == "group"
    said = sandbox.describe()
    assert "namespace failed: not finished after 0.1 s" in said and "subreaper failed: not finished" in said
    assert "unknown whether all limits hold: not finished after 0.1 s" in said and UNLIMITED not in said
