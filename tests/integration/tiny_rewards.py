"""Rewards that a random model gets now and then; rollout actors import this file by its name."""

import os

from nanochat.data.conversations import exchange
from nanochat.tasks.humaneval import HumanEval


def odd_length(conversation, reply):
    return float(len(reply) % 2)


def always_the_same(conversation, reply):
    return 1.0


def broken(conversation, reply):
    raise KeyError("no such fact")


def not_a_number(conversation, reply):
    return float("nan")


def deadly(conversation, reply):
    os.kill(os.getpid(), 9)


ESCAPED = f"{os.path.abspath(__file__)}.escaped"
ATTACK = f"""
import os, signal
for harm in (
    lambda: os.kill(os.getppid(), signal.SIGKILL),
    lambda: open({ESCAPED!r}, "w"),
    lambda: os.system("touch {ESCAPED}"),
):
    try:
        harm()
    except OSError:
        pass

def answer():
    return 42 if not os.environ.keys() & {{"HOME", "RAY_AUTH_MODE"}} else "the caller's environment"
"""


def hostile_code(conversation, reply):
    """1 if a program that attacks whoever runs it has come to its end and done nothing."""
    test = "def check(answer):\n    assert answer() == 42"
    problem = exchange("q", "a", prompt="", entry_point="answer", test=test)
    passed = HumanEval.reward(problem, f"```python\n{ATTACK}```")
    return passed if not os.path.exists(ESCAPED) else -1.0
