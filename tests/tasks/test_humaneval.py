"""HumanEval: right answers are right however they are written, and wrong ones are wrong."""

import gzip
import json

import pytest

from nanochat_jax.tasks import humaneval, sandbox
from nanochat_jax.tasks.humaneval import HumanEval, extract_code, fenced_blocks


@pytest.fixture
def task(data_dir):
    return HumanEval("test", data_dir)


def by_number(task, number):
    """The conversation of HumanEval/`number`, the function alone, and the whole solution."""
    names = {10: "make_palindrome", 32: "find_zero", 38: "decode_cyclic", 50: "decode_shift", 0: "has_close_elements"}
    conversation = next(c for c in task if c["entry_point"] == names[number])
    solution = conversation["messages"][1]["content"]
    return conversation, solution[solution.index(f"def {names[number]}") :], solution


def test_it_knows_right_from_wrong(task):
    for conversation in task[:5]:
        prompt, solution = (message["content"] for message in conversation["messages"])
        assert task.evaluate(conversation, solution)
        assert task.evaluate(conversation, f"Here it is:\n```python\n{solution}\n```\nI hope it helps.")
        assert not task.evaluate(conversation, prompt + "\n    return None\n")
        assert not task.evaluate(conversation, "import sys\nsys.exit(0)")
        assert not task.evaluate(conversation, "")
    assert task.reward(conversation, solution) == 1.0


def test_the_imports_of_the_prompt_stand_before_the_answer():
    row = {
        "prompt": "# typing\nfrom typing import List\nimport math\n\n\ndef f(x: List[int]) -> float:\n    import os\n",
        "canonical_solution": "    return math.sqrt(x[0])\n",
        "entry_point": "f",
        "test": "def check(candidate):\n    assert candidate([4]) == 2\n",
    }
    with_code_only = "```\ndef f(x: List[int]) -> float:\n    return math.sqrt(x[0])\n```"
    task = HumanEval.__new__(HumanEval)
    assert task.evaluate(HumanEval.conversation(row), with_code_only)


@pytest.mark.parametrize("number", [10, 32, 38, 50])
def test_the_helpers_of_the_prompt_stand_before_the_answer(task, number):
    conversation, function, solution = by_number(task, number)
    assert len(function) < len(solution) - 100  # the helper is not part of it
    assert task.evaluate(conversation, function)
    assert task.evaluate(conversation, f"```python\n{function}\n```")
    name = conversation["entry_point"]
    assert not task.evaluate(conversation, function.replace(f"def {name}", f"def other\n\ndef {name}"))


def test_an_answer_may_define_a_helper_itself_but_the_tests_use_the_prompts(task):
    conversation, function, _ = by_number(task, 10)
    own = "def is_palindrome(text):\n    print('own')\n    return text == text[::-1]\n\n"
    assert task.evaluate(conversation, own + function)
    assert not task.evaluate(conversation, own.replace("return text == text[::-1]", "return True") + function)
    # If the tests encoded with the answer's function, this would be a right decoder.
    conversation, _, _ = by_number(task, 38)
    same = "    return s\n\n"
    assert not task.evaluate(conversation, f"def encode_cyclic(s):\n{same}def decode_cyclic(s):\n{same}")


# How people and models write code in an answer. CODE is the code.
DRESS = {
    "nothing": "CODE",
    "python": "Sure!\n\n```python\nCODE\n```\nIt compares all pairs.",
    "no language": "```\nCODE\n```",
    "py": "```py\nCODE\n```",
    "python3": "```python3\nCODE\n```",
    "Python": "```Python\nCODE\n```",
    "space before the language": "``` python\nCODE\n```",
    "spaces after the fences": "```python  \nCODE\n```  \n",
    "attributes": '```{.python .numberLines}\nCODE\n```\n```python title="a.py"\nx = 1\n```',
    "tildes": "~~~python\nCODE\n~~~",
    "four backticks": "````python\nCODE\n````",
    "no closing fence": "Here:\n```python\nCODE\n",
    "closing fence behind the code": "```python\nCODE```",
    "opening fence behind text": "Here it is: ```python\nCODE\n```",
    "in a list": "1. Write it:\n\n   ```python\n   CODE\n   ```\n2. Run it.",
    "in a list item": "- ```python\n  CODE\n  ```",
    "deep in a list": "* a\n    * b\n        ```python\n        CODE\n        ```",
    "indented with a tab": "\t```python\n\tCODE\n\t```",
    "two blocks, the first of another language": "```bash\npip install x\n```\n\n```python\nCODE\n```",
    "two blocks, the first an example": "```python\nhas_close_elements([1.0], 0.5)\n```\n\n```python\nCODE\n```",
    "two blocks, the second an example": "```python\nCODE\n```\n\n```python\nprint(has_close_elements([1.0], x))\n```",
    "two blocks, the second the output": "```python\nCODE\n```\nprints\n```\nFalse\n```",
    "another language's name": "```pycon\nCODE\n```",
    "Markdown around it": "```markdown\n# Answer\n```python\nCODE\n```\n```",
    "Markdown around it, with longer fences": "````md\n# Answer\n```python\nCODE\n```\n````",
    "inline code before it": "Use ``sorted`` and `abs`:\n```python\nCODE\n```",
}


def dressed(dress, code):
    before = dress[: dress.index("CODE")].rpartition("\n")[2]
    indent = before if before.isspace() else ""
    return dress.replace("CODE", code.replace("\n", "\n" + indent))


@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_the_code_is_found_in_every_dress(ends):
    code = 'def has_close_elements(numbers, x):\n    """Are two close?\n    ```\n    example\n    ```\n    """\n'
    code += "    for n in numbers:\n\n        pass\n    return False  # ~~~"
    for name, dress in DRESS.items():
        found = extract_code(dressed(dress, code).replace("\n", ends), "has_close_elements")
        assert "\n".join(map(str.rstrip, found.splitlines())) == code, name


def test_a_right_answer_passes_in_every_dress(task):
    conversation, function, _ = by_number(task, 0)
    for name, dress in DRESS.items():
        assert extract_code(dressed(dress, function.strip()), "has_close_elements") == function.strip(), name
    for name in ("py", "python3", "Python", "two blocks, the first an example"):  # the same code, so a few are enough
        assert task.evaluate(conversation, dressed(DRESS[name], function.strip())), name
    assert task.evaluate(conversation, dressed(DRESS["no closing fence"], function.strip()).replace("\n", "\r\n"))


def test_which_of_several_blocks_is_taken():
    first, second, other = "def f():\n    return 1", "def f():\n    return 2", "def g():\n    return f()"
    answer = "```\n{}\n```\nor\n```python\n{}\n```".format
    assert extract_code(answer(first, second), "f") == first
    assert extract_code(answer(other, second), "f") == second
    assert extract_code(answer("f = lambda: 1", other), "f") == "f = lambda: 1"
    assert extract_code(answer("x = 1", other), "f") == "x = 1"
    assert extract_code("```c\nint x;\n```\n```python\nx = 1\n```", "f") == "x = 1"
    assert extract_code("```js\nlet x\n```", "f") == "let x"
    assert extract_code("no code at all", "f") == "no code at all"
    without_fence = 'def f():\n    """\n    ```\n    f()\n    ```\n    """\n    return 1'
    assert extract_code(without_fence, "f") == without_fence
    assert extract_code(f"f(x) or\n```\n{first}\n```", "f") == first


def test_what_is_no_fence():
    assert fenced_blocks("a ``` b\n`` c ``\n```d```\nx ~~~ y\n") == []
    assert fenced_blocks("```\na\n``\n~~~\n```") == [("", "a\n``\n~~~")]
    assert fenced_blocks("```x = '\u2028'\n") == [("x = '\u2028'", "")]  # one line, though str.splitlines splits it
    assert fenced_blocks("") == []


def test_the_level_of_the_sandbox_is_said_once(data_dir, capsys):
    humaneval.announce.cache_clear()
    for _ in range(2):
        HumanEval("test", data_dir)
    line = f"HumanEval: programs run {sandbox.describe()}\n"
    assert capsys.readouterr().out == line and sandbox.LEVELS[sandbox.strongest_level()] in line


@pytest.mark.slow
def test_every_canonical_solution_passes_and_an_empty_function_fails(data_dir, task):
    with gzip.open(data_dir / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as rows:
        assert sum(1 for row in rows if json.loads(row)) == len(task) == 164
    for conversation in task:
        prompt, solution = (message["content"] for message in conversation["messages"])
        function = solution[solution.index(f"def {conversation['entry_point']}(") :]
        assert task.evaluate(conversation, solution), conversation["entry_point"]
        assert task.evaluate(conversation, f"```py\n{function}\n```"), conversation["entry_point"]
        assert not task.evaluate(conversation, prompt + "\n    return None\n"), conversation["entry_point"]
