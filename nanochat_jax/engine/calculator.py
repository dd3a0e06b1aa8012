"""The calculator for the expressions that the model writes. It does arithmetic and counts letters in words.

No expression is run as Python code. Arithmetic is parsed into a syntax tree, and may contain only numbers, + - * / //,
signs and parentheses. A count, such as 'strawberry'.count('r'), is matched by a regular expression. Expressions have a
maximum length, which also limits the size of their results. Therefore no input can hang the process or exhaust the
memory.

Results are written as in the training data: GSM8K says 3, not 3.0. If the calculator answered 3.0, the model would
learn to distrust it.
"""

import ast
import math
import operator
import re
from collections.abc import Callable
from decimal import Decimal

# The maximum number of characters in an expression. This maximum limits the depth of the syntax tree. It also limits
# the size of results, because a product never has more digits than its factors have together.
MAX_CHARS = 256
SIGNIFICANT_DIGITS = 10

_ARITHMETIC = re.compile(r"[0-9+\-*/.() ]+")
_COUNT = re.compile(r"""\s*(['"])([^'"\\\n]*)\1\s*\.count\(\s*(['"])([^'"\\\n]*)\3\s*\)\s*""")
_BINARY: dict[type[ast.operator], Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_UNARY: dict[type[ast.unaryop], Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def use_calculator(expression: str) -> str | None:
    """Returns the result of `expression`, or None if the expression is refused or has no result.

    Examples: "12/4" -> "3", "'strawberry'.count('r')" -> "3", "2**3" -> None.
    """
    if len(expression) > MAX_CHARS:
        return None
    if count := _COUNT.fullmatch(expression):
        return str(count[2].count(count[4]))
    expression = expression.replace(",", "").strip()  # reads 1,000 as 1000
    if not _ARITHMETIC.fullmatch(expression):
        return None
    try:
        return _format(_evaluate(ast.parse(expression, mode="eval").body))
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None  # if parentheses are nested too deeply, the parser raises MemoryError


def _evaluate(node: ast.expr) -> int | float:
    # isinstance alone would accept True and False, because bool is a subclass of int.
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and (binary := _BINARY.get(type(node.op))):
        return binary(_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and (unary := _UNARY.get(type(node.op))):
        return unary(_evaluate(node.operand))
    raise ValueError(f"not arithmetic: {type(node).__name__}")  # for example, a power or a call


def _format(value: int | float) -> str:
    """Formats a number without an exponent: 3.0 -> "3", 0.1 + 0.2 -> "0.3", 1/3 -> "0.3333333333".

    Raises ValueError for infinity and NaN.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(value)
        if not value.is_integer():
            text = f"{Decimal(f'{value:.{SIGNIFICANT_DIGITS}g}'):f}"
            return text.rstrip("0").rstrip(".") if "." in text else text
        value = int(value)
    return str(value)
