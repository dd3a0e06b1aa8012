"""Judges one program. `sandbox.execute` runs this file in a separate Python interpreter.

A program can change everything in its own process: `assert`, `==`, the tests, and the code that reports the verdict. So
this process, the judge, never runs the program. It forks another process for the program, and calls the program's
function over a pipe. The answers come back as JSON, and the judge rebuilds plain data from them. The tests, the
expected values and the comparisons stay in the judge, and only the judge can send the verdict. If the program forges a
message, the judge takes the message for an answer, and the tests check it like any other answer.

A program runs as the same user as the judge, and so could reach into the judge: through /proc, with ptrace or with
pidfd_getfd. Three measures prevent this:

    socket           the tests arrive and the verdict leaves over a socket, which, unlike a file or a pipe, cannot be
                     opened through /proc
    hide,            the kernel closes the judge's memory and descriptors to processes without privileges,
    drop_privileges  and the program has none
    confine          with Landlock, the program cannot reach into any process that it did not start

A program can still kill the judge, unless Landlock prevents it. Then there is no verdict, and the program has failed.

    sandbox.execute ── starts ──> judge ── forks ──> (keeper ── forks ──>) program

How the program's processes are killed depends on the level (see sandbox.py). The keeper exists only at the level
"namespace". It is process 1 of a PID namespace: when it ends, the kernel kills all processes of the namespace. At the
level "subreaper", the judge becomes the parent of every process that the program leaves behind, and kills these
processes. At the level "group", sandbox.execute kills the judge's process group. A process that has left the group
survives.

This file imports only the standard library. It does without ctypes, resource, prctl, Landlock and /proc if the system
lacks them.
"""

import builtins
import collections.abc
import contextlib
import itertools
import json
import numbers
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any, NoReturn

try:
    import resource
except ImportError:
    resource = None

MAX_REPLY = 16 * 1024 * 1024  # maximum size in bytes of one answer of the program
MAX_ITEMS = 100_000  # at most this many items are read from a generator or another iterable that is not plain data
MAX_ERROR = 1000  # maximum length of an error message, in characters
MEASURES = ("drop_privileges", "confine")  # the program's process takes these itself
CLEANUP = 10.0  # for at most this many seconds, the judge tries to kill the processes that a program left behind

# Constants from the Linux headers
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x8, 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 3, 4, 36, 38
LINUX_CAPABILITY_VERSION_3 = 0x20080522
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # system calls without a function
LANDLOCK_CREATE_RULESET_VERSION, LANDLOCK_RULE_PATH_BENEATH, LANDLOCK_SCOPE_SIGNAL = 1, 1, 2
LANDLOCK_ACCESS_FS_MAKE_BLOCK, LANDLOCK_ACCESS_FS_REFER = 1 << 11, 1 << 13


# -----------------------------------------------------------------------------
# Values as JSON. A JSON list is [type, ...]; every other JSON value stands for itself.


def encode(value: Any) -> Any:
    """Turns a value into JSON. A value of a subclass, such as OrderedDict, becomes a value of the built-in class.

    A value that is not plain data becomes ["object", name of its type, its truth value, its items or None].
    """
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, numbers.Integral):  # int, or for example an integer of NumPy
        value = int(value)
        return value if abs(value) < 2**63 else ["int", hex(value)]  # Python refuses very long decimal numbers
    if isinstance(value, numbers.Rational):
        return ["fraction", encode(value.numerator), encode(value.denominator)]
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if (decimal := sys.modules.get("decimal")) and isinstance(value, decimal.Decimal):
        return ["decimal", str(value)]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", *([encode(key), encode(item)] for key, item in value.items())]
    for kind in (list, tuple, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, *map(encode, value)]
    if isinstance(value, collections.abc.Set):  # a set, or the keys of a dict
        return ["set", *map(encode, value)]
    items = None
    if isinstance(value, collections.abc.Iterable):
        items = [encode(item) for item in itertools.islice(value, MAX_ITEMS)]
    return ["object", type(value).__name__, bool(value), items]


def decode(data: Any) -> Any:
    """Rebuilds a value from the JSON that `encode` made. Raises an exception if a list in the JSON is malformed."""
    if not isinstance(data, list):
        return data
    kind, *rest = data
    match kind:
        case "list" | "tuple" | "set" | "frozenset":
            return getattr(builtins, kind)(map(decode, rest))
        case "dict":
            return {decode(key): decode(item) for key, item in rest}
        case "int":
            return int(rest[0], 16)
        case "complex":
            return complex(*rest)
        case "bytes":
            return bytes.fromhex(rest[0])
        case "fraction":
            from fractions import Fraction

            return Fraction(*map(decode, rest))
        case "decimal":
            from decimal import Decimal

            return Decimal(rest[0])
        case "object":
            return Foreign(*rest)
    raise ValueError(f"unknown type {kind!r}")


class Foreign:
    """A stand-in for a value that is not plain data, such as a generator. The stand-in has the value's truth value and
    items. It is equal only to itself."""

    def __init__(self, name: str, truth: bool, items: list | None):
        self.name, self.truth = name, truth
        self.items = None if items is None else [decode(item) for item in items]

    def __bool__(self) -> bool:
        return self.truth

    def __iter__(self) -> collections.abc.Iterator:
        if self.items is None:
            raise TypeError(f"{self.name!r} object is not iterable")
        return iter(self.items)

    def __repr__(self) -> str:
        return f"<{self.name}>"


def describe(error: BaseException) -> dict:
    """Describes an exception as JSON: the name of its type, and its message."""
    try:
        text = str(error)[:MAX_ERROR]
    except Exception:
        text = ""
    return {"error": type(error).__name__, "text": text}


# -----------------------------------------------------------------------------
# The judge


class EndedError(BaseException):
    """Raised if the program has ended, and so cannot answer. `except Exception` in a test does not catch this error."""


class ProgramError(Exception):
    """Raised if the program sends an invalid message, or raises an exception that the judge cannot rebuild."""


class Program:
    """The program, as the judge sees it: two pipes and a child process."""

    def __init__(self, calls: int, replies: int, child: int, status: int | None):
        """`calls` and `replies` are the judge's ends of the pipes.

        child: the process id of the keeper, or of the program if there is no keeper.
        status: the pipe through which the keeper reports how the program ended, or None if there is no keeper.
        """
        self.calls, self.replies, self.child, self.status = calls, replies, child, status
        self.buffer = b""
        self.exit_code: int | None = None  # -n if signal n killed the program

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls the program's function `name`. Raises the exception that the function raises.

        The arguments are copies: if the function changes a list, the tests do not see the change.
        """
        arguments = [encode(arg) for arg in args], {key: encode(arg) for key, arg in kwargs.items()}
        data = json.dumps([name, *arguments]).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self.calls, data) :]
        except BrokenPipeError:
            self.fail()
        return decode(self.answer("value"))

    def answer(self, key: str) -> Any:
        """Returns the value under `key` in the program's next message. If the message describes an exception instead,
        raises that exception."""
        message = json.loads(self._line())
        if not isinstance(message, dict) or not message.keys() & {key, "error"}:
            raise ProgramError("ValueError: the program sent a message of its own")
        if key in message:
            return message[key]
        name, text = str(message["error"])[:MAX_ERROR], str(message.get("text"))[:MAX_ERROR]
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
            raise kind(text)
        raise ProgramError(f"{name}: {text}")

    def _line(self) -> bytes:
        line = bytearray(self.buffer)
        while b"\n" not in self.buffer:
            # The program may have ended even if the pipe is open, since a child of the program may hold it open.
            ended = self._has_ended()
            if select.select([self.replies], [], [], 0 if ended else 0.05)[0]:
                self.buffer = os.read(self.replies, 1 << 20)
                if not self.buffer:
                    self.fail()
                line += self.buffer
                if len(line) > MAX_REPLY:
                    raise ProgramError(f"ValueError: an answer of more than {MAX_REPLY >> 20} MiB")
            elif ended:
                self.fail()
        self.buffer = self.buffer.partition(b"\n")[2]
        return bytes(line.partition(b"\n")[0])

    def _has_ended(self, flags: int = os.WNOHANG) -> bool:
        if self.exit_code is None:
            pid, status = os.waitpid(self.child, flags)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
                if self.status is not None:
                    self.exit_code = int(os.read(self.status, 16) or self.exit_code)
        return self.exit_code is not None

    def fail(self) -> NoReturn:
        """Waits until the program has ended. Then raises EndedError, whose message says how the program ended."""
        self._has_ended(flags=0)
        code = self.exit_code or 0
        raise EndedError(f"killed by signal {-code}" if code < 0 else f"exited early with code {code}")


def judge(channel: int, level: str, function: str, limits: dict[str, int]) -> NoReturn:
    """Runs program.py, and then the tests. Sends the verdict, a line of JSON, over the socket `channel`.

    The socket brings a line with a nonce, which the verdict repeats, and then the tests. `function` is the name of the
    function that the tests call. They may also call it `candidate`. `limits` are the program's resource limits, as in
    `set_limits`. The verdict's "refused" names the limits and measures that the system refused.
    """
    refused = prepare(level)
    program = start(level, channel, limits)
    if level != "group":
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # if the command that runs the sandbox is killed, the program ends too

    def stop(signum: int, frame: FrameType | None) -> None:
        clean_up(level, program)
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    # The nonce and the tests are read after the fork, so that they are not in the memory of the program's process.
    with open(channel, "rb", closefd=False) as file:
        nonce, _, tests = file.read().decode().partition("\n")
    verdict: dict[str, Any] = {"nonce": nonce, "success": False}
    try:
        set_limits({name: limits[name] for name in ("RLIMIT_AS", "RLIMIT_CPU") if name in limits})
        said = program.answer("refused")  # sent after the program's last line
        verdict["refused"] = refused + [name for name in (*MEASURES, *limits) if name in said]

        def call(*args: Any, **kwargs: Any) -> Any:
            return program.call(function, *args, **kwargs)

        exec(compile(tests, "tests.py", "exec"), {"__name__": "tests", function: call, "candidate": call})
        verdict["success"] = True
    except (EndedError, ProgramError) as error:
        verdict["error"] = str(error)
    except BaseException as error:
        verdict["error"] = "{error}: {text}".format(**describe(error))
        verdict["memory"] = isinstance(error, MemoryError)
    clean_up(level, program)
    with open(channel, "wb") as file:
        file.write(json.dumps(verdict).encode() + b"\n")
    os._exit(0)


def prepare(level: str) -> list[str]:
    """Prepares this process for the level, and hides it from the program. Raises OSError if the system does not support
    the level. Returns the names of the measures that the system refused, which happens only at the level "group"."""
    if level == "namespace":
        enter_namespaces()
    elif level == "subreaper":
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        descendants_of(os.getpid())
    return [] if take(hide, required=level != "group") else ["hide"]


def clean_up(level: str, program: Program) -> None:
    """Kills the program and, as far as the level allows, every process that it started. Waits until they are gone."""
    if program.exit_code is None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # SIGTERM may start a second clean-up
            os.kill(program.child, signal.SIGKILL)
            os.waitpid(program.child, 0)  # a keeper ends after all processes of its namespace
        program.exit_code = -signal.SIGKILL
    end = time.monotonic() + CLEANUP
    while level == "subreaper" and time.monotonic() < end:
        # A program that keeps forking could start processes faster than they are killed. So all are stopped first.
        left = descendants_of(os.getpid())
        for sig in (signal.SIGSTOP, signal.SIGKILL):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sig)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return  # no child is left, and so no descendant: orphans become children of this process
        time.sleep(0.002)


def descendants_of(ancestor: int) -> list[int]:
    """Returns the process ids of a process's children, grandchildren and so on. Raises OSError if there is no /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):  # the process has ended meanwhile
                with open(f"/proc/{entry}/stat", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()  # the fields after the name, which may hold spaces
                children.setdefault(int(fields[1]), []).append(int(entry))
    found = [ancestor]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


# -----------------------------------------------------------------------------
# The program's process


def start(level: str, channel: int, limits: dict[str, int]) -> Program:
    """Starts the program in a separate process, which cannot use the socket `channel`."""
    calls_read, calls_write = os.pipe()
    replies_read, replies_write = os.pipe()
    own, others = [channel, calls_write, replies_read], [calls_read, replies_write]
    status_read = status_write = None
    if level == "namespace":
        status_read, status_write = os.pipe()
        own.append(status_read)
        others.append(status_write)
    child = os.fork()
    if child == 0:
        for fd in own:
            os.close(fd)
        if status_write is None:
            run_program(calls_read, replies_write, level, limits)
        keep(status_write, calls_read, replies_write, limits)
    for fd in others:
        os.close(fd)
    return Program(calls_write, replies_read, child, status_read)


def enter_namespaces() -> None:
    """Moves this process to a new user namespace and a new mount namespace. The children that it forks afterwards are
    in a new PID namespace."""
    uid, gid = os.geteuid(), os.getegid()
    call_libc("unshare", CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def keep(status: int, calls: int, replies: int, limits: dict[str, int]) -> NoReturn:
    """Starts the program, waits until it has ended, and writes its exit code to the pipe `status`. Runs in the
    keeper, process 1 of the PID namespace."""
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):  # a container may forbid mounting; then /proc stays the host's
            call_libc("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
            call_libc("mount", b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
        program = os.fork()
        if program == 0:
            os.close(status)
            run_program(calls, replies, "namespace", limits)
        os.close(calls)
        os.close(replies)
        while True:
            pid, how = os.wait()
            if pid == program:
                os.write(status, str(os.waitstatus_to_exitcode(how)).encode())
                break
    finally:
        os._exit(0)


def run_program(calls: int, replies: int, level: str, limits: dict[str, int]) -> NoReturn:
    """Runs program.py, then calls the functions that the judge names, until the judge closes the pipe.

    The program may replace functions of the modules used here. Replacing them can only change its own answers.
    """
    read, write, loads, dumps, leave = os.read, os.write, json.loads, json.dumps, os._exit

    def send(message: dict) -> None:
        with contextlib.suppress(Exception):  # the program may have closed or replaced stdout
            sys.stdout.flush()
        data = dumps(message).encode() + b"\n"
        while data:
            data = data[write(replies, data) :]

    try:
        refused = [] if take(drop_privileges, required=level != "group") else ["drop_privileges"]
        refused += [] if take(confine, required=False) else ["confine"]
        refused += set_limits(limits)
        main = ModuleType("__main__")
        sys.modules["__main__"] = main
        try:
            with open("program.py", encoding="utf-8") as file:
                code = compile(file.read(), "program.py", "exec")
            exec(code, main.__dict__)
        except BaseException as error:
            send(describe(error))
            leave(0)
        send({"refused": refused})
        buffer = b""
        while True:
            while b"\n" not in buffer:
                data = read(calls, 1 << 20)
                if not data:
                    leave(0)
                buffer += data
            line, _, buffer = buffer.partition(b"\n")
            name, args, kwargs = loads(line)
            try:
                if name not in main.__dict__:
                    raise NameError(f"name {name!r} is not defined")
                value = main.__dict__[name](*map(decode, args), **{key: decode(arg) for key, arg in kwargs.items()})
                message = {"value": encode(value)}
            except BaseException as error:
                message = describe(error)
            send(message)
    finally:
        leave(1)  # never returns to the judge's code


def take(measure: Callable[[], Any], required: bool) -> bool:
    """Takes one of the measures that protect the verdict. Returns whether the system allowed it. Raises OSError if the
    system refused a measure that is required."""
    try:
        measure()
    except OSError:
        if required:
            raise
        return False
    return True


def hide() -> None:
    """From now on, a process without privileges can neither trace this process nor open its memory or its descriptors
    in /proc."""
    prctl(PR_SET_DUMPABLE, 0)


def drop_privileges() -> None:
    """Gives up root's privileges for good, so that this process cannot inspect processes that have privileges."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    call_libc("capset", struct.pack("II", LINUX_CAPABILITY_VERSION_3, 0), bytes(24))  # 24 zero bytes: no capabilities
    prctl(PR_SET_DUMPABLE, 1)  # at 0, as in the judge, the program could not open /dev/stdout


def landlock_version() -> int:
    """Returns the version of the kernel's Landlock. Raises OSError if there is none."""
    if sys.platform != "linux":
        raise OSError("this system has no Landlock")  # elsewhere, an unknown system call may end the process
    return call_libc("syscall", LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)


def confine() -> None:
    """Enters a Landlock domain. A process in it can reach only into processes of the domain, through /proc or ptrace,
    and since Linux 6.12 it can send signals only to them. Files can be used as before, except that before Linux 5.19 a
    file cannot be moved to another folder."""
    version = landlock_version()
    # A domain must restrict some use of files. Moving between folders is always restricted, and allowed again below.
    files = LANDLOCK_ACCESS_FS_REFER if version >= 2 else LANDLOCK_ACCESS_FS_MAKE_BLOCK
    attributes = struct.pack("=QQQ", files, 0, LANDLOCK_SCOPE_SIGNAL if version >= 6 else 0)
    ruleset = call_libc("syscall", LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    if version >= 2:
        root = os.open("/", os.O_PATH)
        rule = struct.pack("=Qi", files, root)
        call_libc("syscall", LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
        os.close(root)
    call_libc("syscall", LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def set_limits(limits: dict[str, int]) -> list[str]:
    """Sets resource limits {name: value}, such as {"RLIMIT_CPU": 6}. Returns the names of the refused limits."""
    if resource is None:
        return list(limits)
    refused = []
    for name, value in limits.items():
        try:
            kind = getattr(resource, name)
            _, hard = resource.getrlimit(kind)
            if hard == resource.RLIM_INFINITY or hard > value:
                resource.setrlimit(kind, (value, value))
        except (AttributeError, ValueError, OSError):
            refused.append(name)
    return refused


def prctl(option: int, value: int = 0) -> int:
    return call_libc("prctl", option, value, 0, 0, 0)


def call_libc(name: str, *args: Any) -> int:
    """Calls a function of the C library. Raises OSError if the function fails (returns -1) or does not exist."""
    try:
        import ctypes

        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (ImportError, AttributeError) as error:
        raise OSError(f"this system has no {name}") from error
    result = function(*(ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in args))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name} failed")
    return result


if __name__ == "__main__":
    judge(**json.loads(sys.argv[1]))
