"""Word problems of one or two steps, made up: question to calls of the calculator to `#### answer`, as in GSM8K.

What is held out: a hash of the two numbers of a call, whatever their order, says whether the pair belongs to train, val
or test, and all calls of a problem belong to its split. So no pair of numbers that is scored was ever trained on, in
any wording. `test_templates` has wordings, too, that no other split has.

    train            one step; TRAIN_TWO_STEP_SHARE of it two steps, so that RL has something to start from
    val, test        one step, the wordings of train, unseen numbers
    test_templates   one step, unseen wordings, unseen numbers
    two_step         two steps, numbers of train: for RL
    two_step_test    two steps, unseen numbers

Source: the form of the answers: GSM8K, Cobbe et al. 2021 (arXiv 2110.14168).
Not covered: negative numbers, results above LARGEST, questions with numbers that do not matter.
"""

import functools
import hashlib
import random
import tomllib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from nanochat.data.conversations import Conversation, Part, exchange
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.task import Task, of_split

T = TypeVar("T")

TRAIN_TWO_STEP_SHARE = 0.05
LARGEST = 9_999
LEADS = {"+": "Add", "-": "Subtract", "*": "Multiply", "/": "Divide"}


class Draws:
    """Random choices that depend on a key alone, on every machine and Python version."""

    def __init__(self, *key: object) -> None:
        # Only seeding and random() are promised to stay the same between versions of Python.
        self._uniform = random.Random(" ".join(map(str, key))).random

    def between(self, low: int, high: int) -> int:
        """Return an integer, low <= it <= high."""
        return low + int(self._uniform() * (high - low + 1))

    def choice(self, options: Sequence[T]) -> T:
        """Return one of the options."""
        return options[self.between(0, len(options) - 1)]

    def chance(self, probability: float) -> bool:
        """Return True with a probability."""
        return self._uniform() < probability


@functools.cache
def wording(task: str) -> dict[str, Any]:
    """Return the section of wording.toml that is a generated task's."""
    return tomllib.loads(Path(__file__).with_name("wording.toml").read_text(encoding="utf-8"))[task]


class GeneratedTask(Task):
    """A task without data: a conversation is a function of the task's name, the split and the index alone."""

    sizes: ClassVar[Mapping[str, int]]
    """The splits it has and their lengths; `conversation` takes indices beyond them, too."""

    def __init__(self, split: str) -> None:
        """Take one of the splits. Raises: ConfigError naming those that there are."""
        self.split, self._size = split, of_split(self.name, split, self.sizes)

    def __len__(self) -> int:
        return self._size

    def draws(self, index: int) -> Draws:
        """Return the choices that make one conversation."""
        return Draws(self.name, self.split, index)


class Arithmetic(GeneratedTask):
    """Word problems for the calculator."""

    name = "arithmetic"
    sizes: ClassVar[Mapping[str, int]] = {
        "train": 20_000, "val": 500, "test": 1_000, "test_templates": 1_000, "two_step": 20_000, "two_step_test": 1_000
    }  # fmt: skip

    def conversation(self, index: int) -> Conversation:
        """Return a problem and how it is solved; facts["number"] is its answer."""
        draws, texts = self.draws(index), wording(self.name)
        templates = texts["unseen" if self.split == "test_templates" else "one_step"]
        if self.split.startswith("two_step") or (self.split == "train" and draws.chance(TRAIN_TWO_STEP_SHARE)):
            templates = texts["two_step"]
        question, program, unit = draws.choice(templates.splitlines()).split(" | ")
        group = "train" if self.split == "two_step" else self.split.removeprefix("two_step_").removesuffix("_templates")
        prices: set[str] = {name for name in "ab" if f"${{{name}}}" in question}
        while True:
            numbers, calls = _draw_numbers(draws, program.split(), prices)
            if all(call.fits and group_of(call.left, call.right) == group for call in calls):
                break
        names, things = texts["names"].split(), texts["things"].split()
        person = draws.between(0, len(names) - 1)
        words = {
            "A": names[person],
            "B": names[person - draws.between(1, len(names) - 1)],
            "n": draws.choice(things),
            "gains": draws.choice(texts["gains"]),
            "loses": draws.choice(texts["loses"]),
        }
        parts: list[Part] = []
        before = ""
        for call in calls:
            parts.append(Part("text", f"{before}{LEADS[call.sign]}:"))
            parts.append(Part("python", f"{call.left}{call.sign}{call.right}"))
            parts.append(Part("python_output", call.result))
            before = f" {call.result}. "
        answer = calls[-1].result
        parts.append(Part("text", f" {answer} {unit.format(**words)}.\n#### {answer}"))
        return exchange(question.format(**words, **numbers), parts, number=answer)

    reward = staticmethod(GSM8K.reward)


def group_of(left: str, right: str) -> str:
    """Return which of train, val and test a pair of numbers belongs to, whatever their order."""
    low, high = sorted((float(left), float(right)))
    tenth = hashlib.sha256(f"{low:g} {high:g}".encode()).digest()[0] % 10
    return {0: "val", 1: "test"}.get(tenth, "train")


@dataclass(frozen=True)
class _Call:
    """A call of the calculator, as text."""

    left: str
    sign: str
    right: str
    result: str
    fits: bool
    """The result is neither too small nor too large."""


def _draw_numbers(draws: Draws, program: Sequence[str], prices: Set[str]) -> tuple[dict[str, str], list[_Call]]:
    """Return the numbers of a question as text, and the calls that answer it."""
    values = {"a": _draw_left(draws, program[0][1])}
    values["b"] = _draw_right(draws, program[0][1], values["a"])
    calls: list[_Call] = []
    prices = {*prices, "r"} if prices else prices

    def shown(name: str) -> str:
        if name not in prices:
            return str(values[name])
        price = f"{values[name] / 4:.2f}"  # counted in quarters
        return price.rstrip("0").rstrip(".") if name == "r" else price  # the calculator's form

    for first, sign, second in program:
        if first == "c":
            values["c"] = values["r"] + _draw_left(draws, "+")
        elif second == "c":
            values["c"] = _draw_right(draws, sign, values["r"])
        left, right, left_text, right_text = values[first], values[second], shown(first), shown(second)
        values["r"] = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]
        fits = 2 <= values["r"] <= LARGEST
        calls.append(_Call(left_text, sign, right_text, shown("r"), fits))
    return {name: shown(name) for name in values if name != "r"}, calls


def _draw_left(draws: Draws, sign: str) -> int:
    """Return a first number, of one to three digits."""
    if sign == "*":
        return draws.between(2, 99)
    if sign == "/":
        return draws.between(2, 49) * draws.between(2, 20)
    return draws.between(2, draws.choice((19, 99, 999)))


def _draw_right(draws: Draws, sign: str, left: int) -> int:
    """Return a second number that goes with the first one; a division has no remainder."""
    if sign == "*":
        return draws.between(2, 20)
    if sign == "/":
        return draws.choice([divisor for divisor in range(2, 21) if left % divisor == 0] or [left])
    return draws.between(2, max(2, left - 2)) if sign == "-" else _draw_left(draws, "+")
