"""HumanEval: Python functions to write from signature and docstring, scored by running their tests.

A reply's code runs behind the prompt, so it may be the whole function or just its body; the prompt's imports and the
functions beside the one asked for, which some tests call, are there in any case.

Source: Chen et al., 2021, arXiv 2107.03374.
Not covered: prompts for base models, which would go on writing the function itself.
"""

import re
import secrets

from nanochat.data.conversations import Conversation, exchange
from nanochat.inference.sandbox import run_python
from nanochat.tasks.task import ListedTask, TaskFiles, of_split, parsed, raw_lines, text_of

HOME = "https://raw.githubusercontent.com/openai/human-eval/master/data"
FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


class HumanEval(ListedTask):
    """Functions to write; `facts` have `task_id`, `prompt`, `entry_point` and `test`."""

    @staticmethod
    def reward(conversation: Conversation, reply: str) -> float:
        """Return 1 if the reply's code passes the tests in the sandbox, else 0."""
        proof = secrets.token_hex(16)  # a reply that calls exit() ends well, too, but before this is printed
        outcome = run_python(f"{program(conversation, reply)}print('{proof}')\n")
        return float(outcome.stdout.endswith(f"{proof}\n"))


def load_humaneval(split: str, files: TaskFiles) -> HumanEval:
    """Return the 164 problems; there is only test. Raises: DataError naming file and line of a malformed row."""
    name = of_split("humaneval", split, {"test": "HumanEval.jsonl"})
    found = files.find("humaneval", f"{name}.gz", HOME, [name, f"{name}.gz"])
    return HumanEval("humaneval", split, *parsed(raw_lines(found), _conversation, files))


def _conversation(row: object, where: str) -> Conversation:
    facts = {key: text_of(row, key, where) for key in ("task_id", "prompt", "entry_point", "test")}
    prompt = facts["prompt"].strip("\n")
    solution = text_of(row, "canonical_solution", where)
    question = (
        f"Complete this Python function. Reply with the whole function in one block of code.\n```python\n{prompt}\n```"
    )
    return exchange(question, f"```python\n{prompt}\n{solution.rstrip()}\n```", **facts)


def program(conversation: Conversation, reply: str) -> str:
    """Return the program that fails unless a reply's code passes the tests.

    The code is the fenced block that defines the function, or the first one, or all of a reply without blocks.
    """
    facts = conversation.facts
    blocks = FENCED.findall(reply) or [reply]
    code = next((block for block in blocks if f"def {facts['entry_point']}(" in block), blocks[0])
    return f"{facts['prompt']}\n{code}\n{facts['test']}\ncheck({facts['entry_point']})\n"
