"""Programs that try to forge the verdict, at every level, and as an ordinary user too."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nanochat_jax.tasks import sandbox
from nanochat_jax.tasks.sandbox import execute

SECRET = "the-expected-value-of-the-test"
TESTS = f"""
def check(candidate):
    assert candidate([2, 3]) == [4, 9], "{SECRET}"
    assert candidate([]) == []
    assert candidate([5]) == [25]

check(square)
"""
HONEST = "def square(numbers):\n    return [n * n for n in numbers]\n"

# Each of these runs to its end or leaves early, with an exit code of 0, and passes no honest comparison.
FORGERS = {
    "exits with 0": "import os\nos._exit(0)",
    "exits with 0 when it is called": "import os\ndef square(numbers):\n    os._exit(0)",
    "ends with SystemExit(0) and says so at exit": """
import atexit
atexit.register(print, '{"success": true}')
def square(numbers):
    raise SystemExit(0)
""",
    "writes a verdict to every descriptor": """
import os
for fd in range(256):
    for verdict in ('{"success": true}', '{"nonce": "", "success": true, "refused": []}'):
        try:
            os.write(fd, (verdict + chr(10)).encode())
        except OSError:
            pass
os._exit(0)
""",
    "reads every descriptor and echoes it": """
import os
read = b""
for fd in range(256):
    try:
        os.set_blocking(fd, False)
        read += os.read(fd, 65536)
    except (OSError, TypeError):
        pass
for fd in range(256):
    try:
        os.write(fd, read + b'{"success": true}')
    except OSError:
        pass
os._exit(0)
""",
    "returns an object that equals everything": """
class Equal(list):
    def __eq__(self, other):
        return True
    def __ne__(self, other):
        return False
    __hash__ = None
def square(numbers):
    return Equal()
""",
    "returns an object without a class of its own that equals everything": """
from unittest.mock import ANY
def square(numbers):
    return ANY
""",
    "reads a secret from the runner's frames, reports it, and leaves": """
import json, os, sys
frame = sys._getframe()
while frame:
    ends = [v for k, v in frame.f_locals.items() if k.endswith("_fd") or k in ("channel", "calls", "replies")]
    if len(ends) > 1:
        os.set_blocking(ends[0], False)
        try:
            nonce = os.read(ends[0], 64).decode()
        except OSError:
            nonce = ""
        os.write(ends[1], json.dumps({"nonce": nonce, "success": True, "value": True, "refused": []}).encode())
        os._exit(0)
    frame = frame.f_back
""",
    "jumps over the assertions with a tracing function": """
import sys
def trace(frame, event, arg):
    if frame.f_code.co_name == "check" and event == "line":
        frame.f_lineno = max(line for *_, line in frame.f_code.co_lines() if line)
    return trace
sys.settrace(trace)
def square(numbers):
    return [n * n for n in numbers] if numbers == [5] else None
""",
    "reads the expected values from the source of its caller": """
import sys
def square(numbers):
    frame = sys._getframe(1)
    with open(frame.f_code.co_filename) as source:
        expected = eval(source.read().split(chr(10))[frame.f_lineno - 1].split("==")[1])
    return expected[0] if isinstance(expected, tuple) else expected
""",
    "replaces builtins and the modules of the judge": """
import builtins, json, os, sys
builtins.AssertionError = type("AssertionError", (BaseException,), {"__new__": lambda *a: None})
builtins.exec = builtins.compile = lambda *a, **k: None
builtins.isinstance = lambda *a: True
json.loads = lambda text: {"success": True}
os.read = lambda *a: b""
def square(numbers):
    return []
""",
    "defines check, candidate and the modules of the tests": """
import sys, types
def check(candidate):
    pass
candidate = lambda numbers: None
sys.modules["tests"] = sys.modules["judge"] = types.ModuleType("tests")
def square(numbers):
    return None
""",
    "walks the frames and calls what it finds": """
import sys
frame = sys._getframe()
while frame.f_back:
    frame = frame.f_back
    send = frame.f_locals.get("send")
    if send:
        for _ in range(9):
            send({"value": True, "success": True, "refused": []})
    for name, value in list(frame.f_globals.items()):
        if name in ("decode", "encode", "set_limits"):
            frame.f_globals[name] = lambda *a: True
def square(numbers):
    return True
""",
    "replaces the functions of the judge in memory": """
import gc, types
for thing in gc.get_objects():
    if isinstance(thing, types.FunctionType) and thing.__name__ in ("answer", "call", "judge", "fail", "clean_up"):
        thing.__code__ = (lambda *args, **kwargs: {"value": True, "refused": []}).__code__
    if isinstance(thing, dict) and "success" in thing:
        thing["success"] = True
def square(numbers):
    return None
""",
    "answers from a tracing function and a thread": """
import os, sys, threading
def answer(*args):
    for fd in range(3, 64):
        try:
            os.write(fd, b'{"value": true, "refused": []}' + bytes([10]))
        except OSError:
            pass
    return answer
sys.settrace(answer)
try:
    threading.Thread(target=answer, daemon=True).start()
except RuntimeError:
    pass  # threads are not allowed here
def square(numbers):
    return None
""",
    "sends answers of types that do not exist": """
import sys
send = sys._getframe(1).f_locals["send"]
for value in (["eval", "1"], ["object", "x", "y", 3], ["list"] * 3, ["dict", 1], {"a": 1}, ["Foreign"]):
    send({"value": value})
def square(numbers):
    return None
""",
    "sends what would upset the reader of the report": """
import sys
send = sys._getframe(1).f_locals["send"]
send({"refused": 5})
send({"error": ["x"], "text": "\\ud800" * 10 ** 6})
""",
    "changes the arguments": """
def square(numbers):
    numbers[:] = [4, 9]
    return numbers
""",
    "kills the judge": """
import os, signal
os.kill(os.getppid(), signal.SIGKILL)
def square(numbers):
    os.kill(os.getppid(), signal.SIGKILL)
""",
    "asks the judge to stop": """
import os, signal
os.kill(os.getppid(), signal.SIGTERM)
def square(numbers):
    os.kill(os.getppid(), signal.SIGTERM)
""",
    "leaves a child that answers": """
import os
if os.fork() == 0:
    for _ in range(3):
        os.write(4, b'{"value": true}' + bytes([10]))
    import time
    time.sleep(60)
os._exit(0)
""",
    "recurses for ever": "def square(numbers):\n    return square(numbers)",
    "answers without end": "import itertools\ndef square(numbers):\n    return itertools.count()",
    "answers too much": "def square(numbers):\n    return 'x' * (1 << 25)",
    "nests deeply": "def square(numbers):\n    x = []\n    for _ in range(10 ** 5):\n        x = [x]\n    return x",
}

# Finds the judges, and the commands that started them, even if this program is in a PID namespace.
TARGETS = """
import ctypes, os, re, resource, signal, sys
targets = set()
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            if sys.argv[0] in file.read() and int(pid) != os.getpid():
                with open(f"/proc/{pid}/stat") as file:
                    targets |= {int(pid), int(file.read().rpartition(")")[2].split()[1])}
    except OSError:
        pass
"""
READER = "reads the expected values from the memory of the judge or of the command"
# These reach into other processes, which programs of the same user may do by default.
INVADERS = {
    "writes a verdict through /proc into deleted files and kills the judge": """
for pid in targets:
    for fd in range(64):
        try:
            if "(deleted)" in os.readlink(f"/proc/{pid}/fd/{fd}"):
                with open(f"/proc/{pid}/fd/{fd}", "r+b", 0) as file:
                    file.truncate(0)
                    file.write(b'{"success": true}')
        except OSError:
            pass
os.kill(os.getppid(), signal.SIGKILL)
def square(numbers):
    return None
""",
    "writes a verdict to descriptors that it fetches from the judge": """
libc = ctypes.CDLL(None)
for pid in targets:
    process = libc.syscall(434, pid, 0)  # pidfd_open
    for number in range(64):
        fd = libc.syscall(438, process, number, 0)  # pidfd_getfd
        if fd >= 0 and os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
            os.write(fd, b'{"nonce": "", "success": true}' + bytes([10]))
        if fd >= 0:
            os.close(fd)
os.kill(os.getppid(), signal.SIGKILL)
def square(numbers):
    return None
""",
    READER: """
test = re.compile(rb"assert candidate\\((\\[[^]]*\\])\\) == (\\[[^]]*\\])")  # does not match itself
answers = {}
for pid in [*targets] * 3:  # the memory changes meanwhile
    try:
        with open(f"/proc/{pid}/mem", "rb", 0) as memory, open(f"/proc/{pid}/maps") as maps:
            regions = [line.split()[:2] for line in maps]
            for ends, mode in regions:
                first, last = (int(end, 16) for end in ends.split("-"))
                if mode.startswith("rw") and last - first < 1 << 24:
                    try:
                        memory.seek(first)
                        answers |= dict(test.findall(memory.read(last - first)))
                    except OSError:
                        pass
    except OSError:
        pass
def square(numbers):
    return eval(answers[str(numbers).encode()])
""",
    "limits the judge's time": """
resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))
def square(numbers):
    return None
""",
}
FORGERS |= {name: TARGETS + program for name, program in INVADERS.items()}


def run(program, level=None, tests=TESTS, **limits):
    return execute(program, tests, "square", level=level, **limits)


def skip_without(level):
    if level == "namespace" and sandbox.strongest_level() != level:
        pytest.skip("no PID namespaces here")


levels = pytest.mark.parametrize("level", sandbox.LEVELS)


@levels
@pytest.mark.parametrize("name", FORGERS)
def test_no_program_writes_its_own_verdict(name, level):
    skip_without(level)
    assert not run(FORGERS[name], level).success


# Runs programs in a command of an ordinary user, and prints what they achieved.
COMMAND = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
folder, tests, honest, programs, levels = json.load(sys.stdin)
sys.path.insert(0, folder)
from nanochat_jax.tasks import judge, sandbox
for level in levels:
    honest_one = sandbox.execute(honest, tests, "square", level=level, timeout=30)
    with ThreadPoolExecutor(4) as pool:
        execute = partial(sandbox.execute, tests=tests, function="square", level=level, timeout=30)
        results = zip(programs, pool.map(execute, programs.values()))
        successes = [name for name, result in results if result.success]
    print(json.dumps([level, honest_one.success, honest_one.weakness, successes, judge.prctl(judge.PR_GET_DUMPABLE)]))
"""
# Code that takes measures away from the judge and from the command.
NO_LANDLOCK = """
def landlock_version():
    raise OSError("refused")
"""
NO_HIDING = """
def hide():
    raise OSError("refused")
"""
ONLY_LANDLOCK = """
def hide():
    pass
"""
ONLY_NAMESPACES = """
call = call_libc
def call_libc(name, *args):
    if name == "mount":
        raise OSError("refused")  # so the program sees the processes outside its namespace
    return call(name, *args)
"""


@pytest.fixture(scope="module")
def as_ordinary_user():
    """Returns a function that runs programs in a command of an ordinary user: of this one, or if this is root, of uid
    65534. Before, it appends `code` to the functions of judge.py. Returns COMMAND's lines as {level: [...]}."""
    user = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
    for python in (sys.executable, shutil.which("python3", path=os.defpath)):
        with contextlib.suppress(OSError):
            check = [str(python), "-I", "-c", "import ctypes, sys; sys.exit(sys.version_info < (3, 11))"]
            if subprocess.run(check, stderr=subprocess.DEVNULL, cwd="/", **user).returncode == 0:
                break
    else:
        pytest.skip("no Python that another user may run")

    def command(programs, levels, code=""):
        with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which other users may not read
            tasks = Path(folder, "nanochat_jax", "tasks")
            tasks.mkdir(parents=True)
            before, main, after = sandbox.JUDGE.read_text().rpartition('if __name__ == "__main__":')
            (tasks / "judge.py").write_text(before + code + main + after)
            shutil.copyfile(str(sandbox.__file__), tasks / "sandbox.py")
            subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
            settings = json.dumps([folder, TESTS, HONEST, programs, levels])
            run = [str(python), "-I", "-B", "-c", COMMAND]
            # The settings hold the tests. They go to stdin, because all users can read the arguments of a process.
            done = subprocess.run(run, input=settings, capture_output=True, text=True, cwd="/", **user)
        assert done.returncode == 0, done.stderr
        return {level: rest for level, *rest in map(json.loads, done.stdout.splitlines())}

    return command


def test_no_program_of_an_ordinary_user_writes_its_own_verdict(as_ordinary_user):
    lines = as_ordinary_user(FORGERS, ["subreaper", "group"])
    for level, (honest, _, successes, dumpable) in lines.items():
        assert (level, honest, successes, dumpable) == (level, True, [], 1)


def test_each_measure_protects_the_verdict_of_an_ordinary_user(as_ordinary_user):
    programs = {name: FORGERS[name] for name in INVADERS}
    levels = ["subreaper", "group"]
    # Many are started at once: without Landlock, a program could look into a judge that is just starting.
    programs |= {f"{READER} {number}": FORGERS[READER] for number in range(10)}
    for honest, weakness, successes, _ in as_ordinary_user(programs, levels, NO_LANDLOCK).values():
        assert (honest, weakness, successes) == (True, sandbox.NO_LANDLOCK, [])
    if not execute("", level="group").weakness:
        for honest, weakness, successes, _ in as_ordinary_user(programs, levels, ONLY_LANDLOCK).values():
            assert (honest, weakness, successes) == (True, "", [])
    if sandbox.strongest_level() == "namespace":
        code = NO_LANDLOCK + ONLY_LANDLOCK + ONLY_NAMESPACES
        assert as_ordinary_user(programs, ["namespace"], code)["namespace"][:3] == [True, "", []]


def test_without_any_measure_a_program_writes_its_own_verdict_and_the_sandbox_says_so(as_ordinary_user):
    # The socket and the nonce still stop every other program.
    others = {name: FORGERS[name] for name in INVADERS if name != READER}
    for programs in ({READER: FORGERS[READER]}, others):
        honest, weakness, successes, _ = as_ordinary_user(programs, ["group"], NO_LANDLOCK + NO_HIDING)["group"]
        assert honest and weakness == sandbox.UNPROTECTED
        yama = Path("/proc/sys/kernel/yama/ptrace_scope")
        if programs is others or (yama.exists() and yama.read_text().strip() != "0"):
            assert successes == []
        else:
            assert successes == [READER]  # so the tests above would notice if the measures failed


# Through /proc and ptrace, a process can read and change other processes of the same user. This program tries it with
# every process except itself, and prints what it could open.
INTRUDER = """
import ctypes, os
me = os.getpid()
print("looking")
for pid in filter(str.isdigit, os.listdir("/proc")):
    if int(pid) == me:
        continue
    for name in ("mem", "environ"):
        try:
            open(f"/proc/{pid}/{name}", "r+b" if name == "mem" else "rb").close()
            print(pid, name)
        except OSError:
            pass
    for fd in range(32):
        try:
            os.close(os.open(f"/proc/{pid}/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK))
            print(pid, "fd", fd)
        except OSError:
            pass
if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0:  # PTRACE_ATTACH
    print("traced")
print("done")
def square(numbers):
    return None
"""


@levels
def test_a_program_cannot_look_into_other_processes(level):
    skip_without(level)
    weakness = execute("", level=level).weakness
    if weakness == sandbox.UNPROTECTED or (weakness and os.getuid() != 0):  # root's programs give up root's privileges
        pytest.skip(f"programs run {weakness}")
    result = run(INTRUDER, level, timeout=10)
    assert not result.success and not result.timeout
    assert result.stdout == "looking\ndone\n"


def test_a_program_does_not_find_the_tests():
    # Searches its files, arguments, environment and memory. The pattern does not match itself, but the control does.
    program = """
import os, re
control = "here-it-is"
expected = re.compile(rb"the[-]expected-value")
here = re.compile(rb"here[-]it-is")
found = []
for path in ["/dev/stdin", "/proc/self/cmdline", "/proc/self/environ", *os.listdir(".")]:
    text = open(path, "rb").read()
    found += [path for pattern in (expected, here) if pattern.search(text)]
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
    for line in maps:
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if line.split()[1].startswith("rw"):
            memory.seek(first)
            data = memory.read(last - first)
            found += [pattern.pattern for pattern in (expected, here) if pattern.search(data)]
print(sorted(map(str, set(found))))
"""
    result = run(program + HONEST, memory_bytes=None)
    assert result.success and result.stdout == f"{[str(b'here[-]it-is'), 'program.py']}\n"


@levels
def test_an_honest_program_passes(level):
    skip_without(level)
    assert run(HONEST, level).success
    assert run("print('noise')\nimport sys\nsys.stdout = None\n" + HONEST, level).success
    wrong = run(HONEST.replace("n * n", "n + n"), level)
    assert not wrong.success and wrong.error == f"AssertionError: {SECRET}"
