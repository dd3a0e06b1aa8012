"""Right programs succeed, every other one fails, and no cheap way of avoiding failure counts as success."""

import gzip
import json
import os
import time

import pytest

from nanochat_jax.tasks import sandbox
from nanochat_jax.tasks.humaneval import HumanEval
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


def test_writing_to_every_descriptor_is_no_success():
    code = """
import os
for fd in range(3, 64):
    try:
        os.write(fd, b'{"nonce": "' + b"0" * 32 + b'"}')
    except OSError:
        pass
os._exit(0)
"""
    assert not execute(code).success


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


def test_children_do_not_outlive_it(tmp_path):
    mark = tmp_path / "alive"
    code = f"""
import os, time
try:
    child = os.fork()
except OSError:
    raise SystemExit  # not allowed here, which is just as good
if child == 0:
    time.sleep(1.5)
    open({str(mark)!r}, "w").close()
"""
    execute(code, timeout=5)
    time.sleep(2)
    assert not mark.exists()


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


def test_humaneval_knows_right_from_wrong(data_dir):
    task = HumanEval("test", data_dir)
    for conversation in task[:5]:
        prompt, solution = (message["content"] for message in conversation["messages"])
        assert task.evaluate(conversation, solution)
        assert task.evaluate(conversation, f"Here it is:\n```python\n{solution}\n```\nI hope it helps.")
        assert not task.evaluate(conversation, prompt + "\n    return None\n")
        assert not task.evaluate(conversation, "import sys\nsys.exit(0)")
        assert not task.evaluate(conversation, "")
    assert task.reward(conversation, solution) == 1.0


def test_humaneval_gives_back_the_imports_of_the_prompt():
    row = {
        "prompt": "# typing\nfrom typing import List\nimport math\n\n\ndef f(x: List[int]) -> float:\n    import os\n",
        "canonical_solution": "    return math.sqrt(x[0])\n",
        "entry_point": "f",
        "test": "def check(candidate):\n    assert candidate([4]) == 2\n",
    }
    with_code_only = "```\ndef f(x: List[int]) -> float:\n    return math.sqrt(x[0])\n```"
    task = HumanEval.__new__(HumanEval)
    assert task.evaluate(HumanEval.conversation(row), with_code_only)


@pytest.mark.slow
def test_every_canonical_solution_of_humaneval_passes(data_dir):
    with gzip.open(data_dir / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as rows:
        assert sum(1 for row in rows if json.loads(row)) == 164
    task = HumanEval("test", data_dir)
    failed = [c["entry_point"] for c in task if not task.evaluate(c, c["messages"][1]["content"])]
    assert not failed
