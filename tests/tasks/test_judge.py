"""Programs that try to forge the verdict, and honest programs whose answers must arrive unchanged."""

import json
import math
import os
import re
from collections import Counter, namedtuple
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction

import numpy as np
import pytest

from nanochat_jax.tasks import judge, sandbox
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
    for verdict in ('{"success": true}', '{"nonce": "", "success": true, "unlimited": []}'):
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
    ends = [v for k, v in frame.f_locals.items() if k.endswith("_fd") or k in ("report", "calls", "replies")]
    if len(ends) > 1:
        os.set_blocking(ends[0], False)
        try:
            nonce = os.read(ends[0], 64).decode()
        except OSError:
            nonce = ""
        os.write(ends[1], json.dumps({"nonce": nonce, "success": True, "value": True, "unlimited": []}).encode())
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
            send({"value": True, "success": True, "unlimited": []})
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
        thing.__code__ = (lambda *args, **kwargs: {"value": True, "unlimited": []}).__code__
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
            os.write(fd, b'{"value": true, "unlimited": []}' + bytes([10]))
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
send({"unlimited": 5})
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


def run(program, level=None, tests=TESTS, **limits):
    return execute(program, tests, "square", level=level, **limits)


@pytest.mark.parametrize("name", FORGERS)
def test_no_program_writes_its_own_verdict(name):
    assert not run(FORGERS[name]).success


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
            with open(f"/proc/{pid}/fd/{fd}", "w") as file:
                print(pid, "fd", fd)
                file.write('{"success": true}')
        except OSError:
            pass
if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0:  # PTRACE_ATTACH
    print("traced")
print("done")
def square(numbers):
    return None
"""


@pytest.mark.parametrize(
    "level",
    [
        "namespace",
        # Root's programs give up root's privileges. With an ordinary user's, it is up to the kernel's settings (Yama).
        pytest.param("subreaper", marks=pytest.mark.skipif(os.getuid() != 0, reason="depends on the system")),
    ],
)
def test_a_program_cannot_look_into_other_processes(level):
    if level == "namespace" and sandbox.strongest_level() != level:
        pytest.skip("no PID namespaces here")
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


@pytest.mark.parametrize("level", sandbox.LEVELS)
def test_an_honest_program_passes(level):
    if level == "namespace" and sandbox.strongest_level() != level:
        pytest.skip("no PID namespaces here")
    assert run(HONEST, level).success
    assert run("print('noise')\nimport sys\nsys.stdout = None\n" + HONEST, level).success
    wrong = run(HONEST.replace("n * n", "n + n"), level)
    assert not wrong.success and wrong.error == f"AssertionError: {SECRET}"


def sent(value):
    """What the judge gets if the program returns `value`."""
    return judge.decode(json.loads(json.dumps(judge.encode(value))))


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, -1, 2**63, -(2**63), 2**70, 0.1, 1e-310, math.inf, 1 + 2j, "", "\ud800\n é 日本"),
        *(b"\x00\xff", [], (), {}, set(), frozenset([1]), [1, (2, [3.0, "x"])], ["list", 1], {frozenset([1]), 2}),
        *({1: "a", (2, 3): {"b": None}}, Fraction(1, 3), Decimal("0.50")),
    ],
)
def test_plain_data_arrives_as_it_is(value):
    assert sent(value) == value and type(sent(value)) is type(value)


def test_other_values_compare_as_they_did():
    assert sent(10**5000) == 10**5000  # longer than Python writes in decimal
    assert math.isnan(sent(math.nan)) and str(sent(-0.0)) == "-0.0"
    assert list(sent({2: 0, 1: 0})) == [2, 1]
    assert sent(Counter("aab")) == {"a": 2, "b": 1} and sent({"a": 1}.keys()) == {"a"}
    assert sent(namedtuple("Point", "x y")(1, 2)) == (1, 2) and sent(IntEnum("E", "a b").b) == 2
    assert sent(np.int64(3)) == 3 and type(sent(np.float32(0.5))) is float
    generator = sent(n for n in [1, 2])
    assert generator != [1, 2] and tuple(generator) == (1, 2)
    assert sent(range(2)) != [0, 1] and sorted(sent(range(2))) == [0, 1] and not sent(range(0))
    assert sent(re.match("a", "ab")) and sent(len) != len
    with pytest.raises(TypeError, match="not iterable"):
        iter(sent(len))


def test_calls_reach_the_same_program():
    program = "calls = []\ndef f(x, *, y=0):\n    calls.append(x)\n    print('x' * 1000)\n    return [calls, y]\n"
    result = execute(program, "assert f(1) == [[1], 0]\nassert f(x=2, y=3) == candidate(2, y=3)[:0] or True", "f")
    assert result.success and result.stdout.count("x") == 3000
    tests = "assert f(1) == [[1], 0]\nassert f(x=(2,), y={3}) == [[1, (2,)], {3}]"
    assert execute(program, tests, "f").success


def test_exceptions_arrive_as_they_are():
    tests = """
for wrong, kind in ((None, TypeError), ("x", ValueError), (0, ZeroDivisionError)):
    try:
        f(wrong)
    except kind as error:
        assert type(error) is kind and str(error)
    else:
        raise AssertionError(wrong)
"""
    assert execute("def f(x):\n    return 1 / int(x)", tests, "f").success
    own = execute("class Own(Exception): pass\ndef f(x):\n    raise Own('mine')", "f(1)", "f")
    assert own.error == "Own: mine"
    assert execute("", "f(1)", "f").error == "NameError: name 'f' is not defined"
    assert execute("f = 3", "f(1)", "f").error == "TypeError: 'int' object is not callable"
    assert execute("def f(x): return bytearray(1 << 29)", "f(1)", "f").memory_exceeded


def test_time_and_memory_are_limited_in_the_tests_too():
    assert execute("f = int", "while True: pass", "f", timeout=1).timeout
    assert execute("f = int", "x = bytearray(1 << 29)", "f").memory_exceeded
    assert execute("def f(x):\n    while True: pass", "f(1)", "f", timeout=1).timeout


def test_what_encode_did_not_make_is_refused():
    for data in (["eval", "1"], [], ["int"], ["int", 3], ["dict", 1], ["set", ["list"]], ["object"]):
        with pytest.raises((ValueError, TypeError, IndexError)):
            judge.decode(data)
    assert math.isnan(judge.decode(judge.encode(math.nan)))


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc")
def test_descendants_are_found():
    assert os.getpid() in judge.descendants_of(os.getppid())
