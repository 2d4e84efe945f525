"""Grade-school maths: word problems, solved in steps with a calculator, scored by the number after `####`.

A step's `<<48/2=24>>` becomes a call of the python tool and its output; the text around it and the final `#### 24` stay
as they are. GSM8K has no split to choose settings by, so val is the last 500 rows of its train file (the last half of a
file with fewer than 1,000), train is the rest, and test is for the score alone.

Source: Cobbe et al., 2021, arXiv 2110.14168; what a scorer forgives (`$`, commas, a final point): lm-eval-harness.
Not covered: answers in words, as fractions or with a decimal comma; replies that give a number without `####`.
"""

import re
from decimal import Decimal, InvalidOperation
from itertools import cycle

from nanochat.data.conversations import Conversation, Part, PartKind, exchange
from nanochat.errors import DataError, excerpt
from nanochat.tasks.task import ListedTask, TaskFiles, of_split, parsed, raw_lines, text_of

HOME = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
VAL_ROWS = 500
KINDS: tuple[PartKind, ...] = ("text", "python", "python_output")
CALL = re.compile(r"<<([^<>=]+)=([^<>=]*)>>")
ANSWER = re.compile(r"####\s*([-$]*+[.,]*+\d[\d.,]*+)(?!/\d)", re.ASCII)


class GSM8K(ListedTask):
    """Maths problems; `facts` have `number`, the right answer."""

    @staticmethod
    def reward(conversation: Conversation, reply: str) -> float:
        """Return 1 if the last `####` number is the right one, else 0."""
        found = extract_answer(reply)
        return float(found is not None and same_number(found, conversation.facts["number"]))


def load_gsm8k(split: str, files: TaskFiles) -> GSM8K:
    """Return a split: train (6,973 problems), val (500) or test (1,319).

    Raises: DataError naming file and line of a row that is malformed.
    """
    file = of_split("gsm8k", split, {"train": "train.jsonl", "val": "train.jsonl", "test": "test.jsonl"})
    rows, dropped = parsed(raw_lines(files.find("gsm8k", file, HOME)), _conversation, files)
    cut = len(rows) - min(VAL_ROWS, len(rows) // 2)
    return GSM8K("gsm8k", split, {"train": rows[:cut], "val": rows[cut:], "test": rows}[split], dropped)


def _conversation(row: object, where: str) -> Conversation:
    solution = text_of(row, "answer", where)
    number = extract_answer(solution)
    if number is None:
        raise DataError(f"{where}: answer={excerpt(solution)}: must end with '#### NUMBER'. Mend or drop it.")
    pieces = zip(cycle(KINDS), CALL.split(solution))  # text, expression, result, text, ..., text
    parts = [Part(kind, piece) for kind, piece in pieces if piece or kind == "python_output"]
    return exchange(text_of(row, "question", where), parts, number=number)


def extract_answer(text: str) -> str | None:
    """Return the number after the last `####` that has one, without `$`, commas and a final point."""
    found = ANSWER.findall(text)
    return _bare(found[-1]) if found else None


def same_number(a: str, b: str) -> bool:
    """Tell whether two texts are the same number, whatever their `$`, commas, final points and zeros."""
    try:
        return Decimal(_bare(a)) == Decimal(_bare(b))
    except InvalidOperation:
        return False


def _bare(number: str) -> str:
    return re.sub(r"[$,]", "", number).rstrip(".")
