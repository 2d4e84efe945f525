"""An expression that a model wrote to its result as text: a calculator that cannot be made to do anything else.

Only characters of arithmetic come as far as Python's parser, which makes a tree and runs nothing; the tree's numbers
are exact fractions, so that 0.1+0.2 is 0.3 and 1000000.1-1000000 is 0.1. Numbers (also 1,234), + - * / // % **,
signs and parentheses count, and one question about letters: "strawberry".count("r"). Every size is bounded before
anything is computed, so no call needs a signal or a clock to end, and any thread may make it.

Source: the calculator calls of GSM8K (Cobbe et al. 2021, arXiv 2110.14168) and of nanochat (karpathy/nanochat).
Not covered: functions, constants, units, percentages, exponents of ten (1e5), other methods of strings.
"""

import ast
import operator
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

MAX_CHARS = 200
"""Of an expression; bounds the tree and what parsing it takes, too."""
MAX_NESTING = 30
"""Of parentheses."""
MAX_MAGNITUDE = 10**15
"""Of a result and of every number on the way to it."""
MAX_BITS = 20_000
"""Of a fraction's denominator: enough for (1+0.05/12)**360."""
DIGITS = 10
"""Of a result that is no integer, before and after the point."""

_STRING = r"""("[^"\\]*"|'[^'\\]*')"""
_COUNT = re.compile(rf"{_STRING}\.count\( *{_STRING} *\)")
_ARITHMETIC = re.compile(r"[0-9.+\-*/%() ]+")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(,[0-9]{3})+(?![0-9,])")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str | None:
    """Return an expression's result as text, None where it is not one that this calculator knows; never raises.

    Integers come whole ("24", also for 48/2), others rounded to ten digits without an exponent ("0.2", "3.333333333").
    """
    if len(expression) > MAX_CHARS:
        return None
    source = _COUNT.sub(lambda call: f"({call[1][1:-1].count(call[2][1:-1])})", expression)
    source = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), source).strip(" ")
    if not _ARITHMETIC.fullmatch(source) or _nesting(source) > MAX_NESTING:
        return None
    try:
        return _text(_value(ast.parse(source, mode="eval").body))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _nesting(source: str) -> int:
    depth = deepest = 0
    for char in source:
        depth += (char == "(") - (char == ")")
        deepest = max(deepest, depth)
    return deepest


def _value(node: ast.expr) -> Fraction:
    """Return a tree's value. Raises: ValueError at anything but arithmetic within the bounds."""
    match node:
        case ast.Constant(value=int() | float() as number):
            value = Fraction(repr(number))  # the digits as written: 0.1 is a tenth
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
            value = _value(operand) if isinstance(sign, ast.UAdd) else -_value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            value = _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            value = Fraction(_OPERATORS[type(sign)](_value(left), _value(right)))
        case _:
            raise ValueError("no arithmetic")
    if abs(value) > MAX_MAGNITUDE or value.denominator.bit_length() > MAX_BITS:
        raise ValueError("too large")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """Return base**exponent, exact where the exponent is an integer. Raises: ValueError before it becomes too long."""
    if exponent.denominator == 1:
        bits = max(abs(base.numerator), base.denominator).bit_length()
        if bits * abs(exponent) > MAX_BITS:
            raise ValueError("too large")
        return base ** int(exponent)
    if base < 0:
        raise ValueError("no real root")
    return Fraction(repr(float(base) ** float(exponent)))


def _text(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value)
    whole = abs(int(value))
    decimals = max(0, DIGITS - len(str(whole or "")))
    text = f"{Decimal(round(value * 10**decimals)).scaleb(-decimals):f}"
    return text.rstrip("0").rstrip(".") if decimals else text
