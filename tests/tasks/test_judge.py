"""The answers of honest programs arrive unchanged. test_forgers.py has the programs that try to forge the verdict."""

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

from nanochat_jax.tasks import judge
from nanochat_jax.tasks.sandbox import execute


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
    result = execute(program, "assert f(1) == [[1], 0]\nassert f(x=2, y=3) == candidate(2, y=3)[:0]", "f")
    assert result.error == "AssertionError: " and result.stdout.count("x") == 3000  # [[1, 2], 3] != []
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
