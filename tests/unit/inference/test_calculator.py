"""Expressions to results: by hand, against exact fractions and Python's own arithmetic, attacked, and on GSM8K."""

import json
import math
import re
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nanochat
from nanochat.inference.calculator import DIGITS, MAX_CHARS, MAX_MAGNITUDE, calculate

ROOT = Path(nanochat.__file__).parent.parent

BY_HAND = {
    "12*2": "24",
    "48/2": "24",
    "12/60": "0.2",
    "0.1+0.2": "0.3",
    "1000000.1-1000000": "0.1",
    "0.3-0.1*3": "0",
    "10/3": "3.333333333",
    "-2/3": "-0.6666666667",
    "99999999.99999": "100000000",
    "123456789012.4": "123456789012",
    "1/10**7": "0.0000001",
    "-1/10**11": "0",
    "-0.0": "0",
    "10**15": "1000000000000000",
    " 2 + 3*4 ": "14",
    "(2+3)*4": "20",
    "2-3-4": "-5",
    "-2**2": "-4",
    "2**3**2": "512",
    "2**-2": "0.25",
    "9**0.5": "3",
    "2**0.5": "1.414213562",
    "(1+0.05/12)**360": "4.467744314",
    "+-+5": "-5",
    "7//2": "3",
    "-7//2": "-4",
    "-7%3": "2",
    "5.5%2": "1.5",
    "0.3//0.1": "3",
    ".5+5.": "5.5",
    "1,234+1": "1235",
    "2*1,234,567.5": "2469135",
    '"strawberry".count("r")': "3",
    "'strawberry'.count('r') * 2": "6",
    '"it\'s".count("\'")': "1",
    '"na\u00efve".count("\u00ef")+"aa".count( "a" )': "3",
    '"import os".count("o")': "2",
}

REFUSED = [
    "", " ", "()", "1+", "1 2", "x", "12*x", "True", "None", "...", "1e5", "1_000", "0x10", "0b1", "1j", "08", "1,2",
    "1,23", "12,3456", "1234,567", "1,234,56", "0.5,000", "1, 234", ",1", "max(1,2)", "(1)(2)", "1 if 1 else 2",
    "1<2", "1==1", "1&1", "1|1", "1^1", "~1", "1<<9", "1@2", "not 1", "1 and 2", "[1]", "{1}", "{1:2}", "(1,)",
    "[1][0]", "[x for x in (1,)]", "(x:=1)", "lambda: 1", "lambda:1", "f'{1}'", "f\"{'a'}\".count('a')", "await 1",
    "yield", "().__class__", "(1).__class__", "1..real", "__import__('os').getpid()", "open('/etc/passwd').read()",
    "print(1)", "'a'", "'a'*3", "'a'+'b'", "len('a')", "'a'.upper()", "'a'.count", "'a'.count('a','b')",
    "'a' 'b'.count('b')", "'{}'.format(1)", "'a'.count('a').real", "'a'.__class__", "'\\x61'.count('a')",
    "2'aa'.count('a')", "b'a'.count(b'a')", '"""a""".count("a")', "'a'.count(chr(97))", "1/0", "1//0", "1%0", "0**-1",
    "0**-0.5", "(-8)**(1/3)", "(-1)**0.5", "9**9**9", "10**10**10", "9**-9**9", "0.5**99999", "2**99999", "10**15+1",
    "10**16/10", "-10**15*2", "1e999", "1000000000000000**1.5", "9" * 199, "0." + "9" * 250, "1" * 400,
    "+" * 201 + "1", "(" * 99 + "1" + ")" * 99, "(" * 250, ")" * 50, "-(" * 66 + "1" + ")" * 66, "[" * 199, "1+1\n",
    "1\n+1", "1;1", "1#comment", "1 #", "1\\\n+1", "1\0+1", "\0", "1\t+1", "\uff11+\uff11", "\u0661+1", "1\u00d72",
    "1\u2212 1", "\u00b2", "\ud800", "$5+5", "20%", "%",
]  # fmt: skip


@pytest.mark.parametrize(("expression", "result"), BY_HAND.items())
def test_by_hand(expression, result):
    assert calculate(expression) == result


@pytest.mark.parametrize("expression", REFUSED, ids=ascii)
def test_everything_else_is_refused_at_once_and_quietly(expression):
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calculate(expression) is None
    assert time.monotonic() - started < 2


def test_the_longest_expression_and_one_longer():
    longest = "1+" * (MAX_CHARS // 2 - 1) + "10"
    assert calculate(longest) == str(MAX_CHARS // 2 + 9)
    assert calculate(longest + "0") is None


def decimals_of(value):
    """How many digits after the point the rule leaves."""
    return max(0, DIGITS - (len(str(int(abs(value)))) if abs(value) >= 1 else 0))


numbers = st.one_of(
    st.integers(0, 200).map(lambda n: (str(n), Fraction(n))),
    st.decimals(0, 1000, places=3).map(lambda d: (str(d), Fraction(d))),
    st.integers(1000, 9_999_999).map(lambda n: (f"{n:,}", Fraction(n))),
)
SIGNS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: Fraction(math.floor(a / b)),
    "%": lambda a, b: a - b * math.floor(a / b),
}


def combined(left, sign, right):
    try:
        value = SIGNS[sign](left[1], right[1])
    except (ZeroDivisionError, TypeError):
        return f"({left[0]}) {sign} ({right[0]})", None  # by zero, or of what has no value itself
    value = None if abs(value) > MAX_MAGNITUDE else value
    return f"({left[0]}) {sign} ({right[0]})", value


expressions = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.builds(combined, inner, st.sampled_from(list(SIGNS)), inner),
        inner.map(lambda one: (f"-({one[0]})", None if one[1] is None else -one[1])),
    ),
    max_leaves=6,
)


@given(expressions)
def test_results_are_exact_to_the_last_digit_shown(pair):
    expression, value = pair
    result = calculate(expression)
    if value is None or len(expression) > MAX_CHARS:
        assert result is None
    else:
        assert result is not None
        assert re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]*[1-9])?", result)
        assert result != "-0"
        if value.denominator == 1:
            assert result == str(value)
        assert abs(Fraction(result) - value) <= Fraction(1, 2 * 10 ** decimals_of(value))


@given(st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(1, 99)), max_size=5), st.integers(-99, 99))
def test_signs_bind_as_in_python(tail, first):
    expression = str(first) + "".join(f"{sign}{number}" for sign, number in tail)
    result = calculate(expression)
    assert result is not None
    assert math.isclose(float(result), eval(expression), rel_tol=1e-8, abs_tol=1e-9)  # noqa: S307 - Python is the reference


@given(st.integers(-30, 30), st.integers(-12, 12))
def test_powers_are_exact(base, exponent):
    result = calculate(f"({base})**({exponent})")
    if (exponent < 0) if base == 0 else abs(Fraction(base) ** exponent) > MAX_MAGNITUDE:
        assert result is None
    else:
        assert result is not None
        assert abs(Fraction(result) - Fraction(base) ** exponent) <= Fraction(1, 2 * 10**DIGITS)


@given(st.text(alphabet="0123456789.,+-*/%() '\"count", max_size=MAX_CHARS + 5) | st.text(max_size=40))
def test_no_text_makes_it_raise_or_hang(text):
    started = time.monotonic()
    result = calculate(text)
    assert result is None or Fraction(result) is not None
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "expression",
    ["+".join([".999**2000"] * 18), "*".join(["(1/3)**12000"] * 15), "%".join(["(2/3)**9999"] * 16), "-" * 199 + "1"],
)
def test_the_heaviest_that_are_allowed_take_little_time(expression):
    started = time.monotonic()
    calculate(expression)
    assert time.monotonic() - started < 2


def test_any_thread_calculates():
    expressions = list(BY_HAND) * 20
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(calculate, expressions)) == list(BY_HAND.values()) * 20


SMALL_STACK = """
import threading
from nanochat.inference.calculator import calculate
deep = ["(" * 30 + "1" + ")" * 30, "(" * 99 + "1" + ")" * 99, "-" * 199 + "1", "-(" * 66 + "1" + ")" * 66]
threading.stack_size(128 * 1024)
thread = threading.Thread(target=lambda: print(*map(calculate, deep)))
thread.start()
thread.join()
"""


def test_a_small_stack_is_enough():
    """128 KiB is what a thread gets from the smallest C libraries; without the bound on nesting it would crash."""
    done = subprocess.run([sys.executable, "-c", SMALL_STACK], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == ["1", "None", "-1", "None"], done.stderr


def test_deep_in_a_recursion_it_still_does_not_raise():
    def descend():
        try:
            return descend()
        except RecursionError:
            return calculate("((((1+2)*3)-4)/5)")

    assert descend() in (None, "1")


def test_gsm8k(test_data):
    """All 27,998 calls of both splits agree with what is written there but one, whose result is a fraction: 3/4."""
    calls = []
    for split in ("train", "test"):
        lines = (test_data / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        calls += [call for line in lines for call in re.findall(r"<<([^<>=]+)=([^<>]+)>>", json.loads(line)["answer"])]
    others = []
    for expression, written in calls:
        result = calculate(expression)
        if result is None or "/" in written or not math.isclose(float(result), float(written), rel_tol=1e-8):
            others.append((expression, written, result))
    assert len(calls) == 27_998
    assert others == [("3/4", "3/4", "0.75")]
