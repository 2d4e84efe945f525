"""Multiple choice: MMLU (57 subjects of school and university) and ARC (school science), scored by the answer's letter.

The letter stands after its choice, right behind ` =>`, where the tokenizer cuts: so it is the very token with which the
reply begins, and a small model binds a choice to a token that it has seen in the question.

Source: Hendrycks et al., 2021, arXiv 2009.03300; Clark et al., 2018, arXiv 1803.05457; letters after the choices:
karpathy/nanochat tasks/common.py@92d63d4. Files: huggingface.co cais/mmlu and allenai/ai2_arc; also MMLU as folders of
CSV files with a header, and ARC's test split as CORE has it.
Not covered: few-shot prompts (CORE has them).
"""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from glob import escape, glob
from statistics import fmean
from string import ascii_uppercase
from typing import Any

from nanochat import storage
from nanochat.data.conversations import Conversation, exchange
from nanochat.errors import DataError, excerpt
from nanochat.tasks.task import ListedTask, TaskFiles, of_split, read_lines, read_table, text_of

MMLU_HOME = "https://huggingface.co/datasets/cais/mmlu/resolve/main/all"
ARC_HOME = "https://huggingface.co/datasets/allenai/ai2_arc/resolve/main"
LABELS = "0123"


class MultipleChoice(ListedTask):
    """Questions to answer with a letter; `facts` have `letters`, `answer` and `subject`."""

    kind = "choose"

    def __init__(self, name: str, split: str, conversations: Sequence[Conversation]) -> None:
        super().__init__(name, split, conversations)
        self.chance = fmean(1 / len(conversation.facts["letters"]) for conversation in conversations)

    @staticmethod
    def reward(conversation: Conversation, reply: str) -> float:
        """Return 1 if the reply's first word is the right letter, else 0."""
        first = re.search(r"\w+", reply)
        return float(first is not None and first[0] == conversation.facts["answer"])


def load_mmlu(split: str, files: TaskFiles) -> MultipleChoice:
    """Return MMLU's auxiliary_train (99,842 questions), validation (1,531) or test (14,042).

    Folders of CSV files bear these names; val may also be called val, or be dev (285).
    Raises: DataError naming file and line or row of a question that is malformed.
    """
    parts = of_split(
        "mmlu", split, {"train": ["auxiliary_train"], "val": ["validation", "val", "dev"], "test": ["test"]}
    )
    file = f"{parts[0]}-00000-of-00001.parquet"
    found = files.find("mmlu", file, MMLU_HOME, [file, *parts])
    return _task("mmlu", split, found, _csv_rows(found) if os.path.isdir(found) else _mmlu_rows(found))


def load_arc_easy(split: str, files: TaskFiles) -> MultipleChoice:
    """Return ARC-Easy's train (2,251 questions), validation (570) or test (2,376). Raises: DataError as `load_mmlu`."""
    return _load_arc("arc_easy", "ARC-Easy", split, files)


def load_arc_challenge(split: str, files: TaskFiles) -> MultipleChoice:
    """Return ARC-Challenge's train (1,119), validation (299) or test (1,172). Raises: DataError as `load_mmlu`."""
    return _load_arc("arc_challenge", "ARC-Challenge", split, files)


def _load_arc(name: str, config: str, split: str, files: TaskFiles) -> MultipleChoice:
    part = of_split(name, split, {"train": "train", "val": "validation", "test": "test"})
    file = f"{part}-00000-of-00001.parquet"
    core = [f"{name}.jsonl"] if split == "test" else []
    found = files.find(name, file, f"{ARC_HOME}/{config}", [f"{config}/{file}", *core])
    return _task(name, split, found, (_core_rows if found.endswith(".jsonl") else _arc_rows)(found, name))


def _task(name: str, split: str, found: str, conversations: Iterator[Conversation]) -> MultipleChoice:
    listed = list(conversations)
    if not listed:
        raise DataError(f"{name}={found}: has no question. Name another.")
    return MultipleChoice(name, split, listed)


def _mmlu_rows(path: str) -> Iterator[Conversation]:
    for number, row in enumerate(read_table(path, ["question", "subject", "choices", "answer"]).to_pylist()):
        yield _conversation(f"{path}: row {number}", row, row["choices"], LABELS, row["answer"], row["subject"])


def _csv_rows(folder: str) -> Iterator[Conversation]:
    """Read SUBJECT_PART.csv files with the header question,choice0,...,choice3,answer."""
    for path in sorted(glob(storage.join(escape(folder), "*.csv"))):
        subject = storage.name_of(path).rpartition("_")[0]
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, strict=True)
                for row in reader:
                    choices = [row.get(f"choice{label}") for label in LABELS]
                    yield _conversation(f"{path}:{reader.line_num}", row, choices, LABELS, row.get("answer"), subject)
        except (OSError, ValueError, csv.Error) as err:
            raise DataError(f"{path}: cannot be read as CSV ({excerpt(err)}). Replace it.") from err


def _arc_rows(path: str, name: str) -> Iterator[Conversation]:
    for number, row in enumerate(read_table(path, ["question", "choices", "answerKey"]).to_pylist()):
        choices = row["choices"] or {}
        where = f"{path}: row {number}"
        yield _conversation(where, row, choices.get("text"), choices.get("label"), row["answerKey"], name)


def _core_rows(path: str, name: str) -> Iterator[Conversation]:
    for where, row in read_lines(path):
        question, choices = text_of(row, "query", where).removeprefix("Question: "), row.get("choices")
        labels = [str(number) for number in range(len(choices))] if isinstance(choices, list) else None
        yield _conversation(where, {"question": question}, choices, labels, row.get("gold"), name)


def _conversation(
    where: str, row: dict[str, Any], choices: object, labels: Sequence[str] | None, right: object, subject: str
) -> Conversation:
    """Return a question as a conversation; `right` is one of the labels. Raises: DataError if it is malformed."""
    question, labels = text_of(row, "question", where), list(labels or ())
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: choices={excerpt(choices)}: must be a list of texts. Mend or drop the row.")
    if len(choices) != len(labels) or not 2 <= len(choices) <= len(ascii_uppercase):
        raise DataError(
            f"{where}: choices={excerpt(choices)}: must be 2 to 26, with a label each. Mend or drop the row."
        )
    if str(right) not in labels:
        raise DataError(f"{where}: answer={excerpt(right)}: must be one of {excerpt(labels)}. Mend or drop the row.")
    letters = tuple(ascii_uppercase[: len(choices)])
    lines = "\n".join(f"{choice.strip()} =>{letter}" for choice, letter in zip(choices, letters))
    prompt = f"{question.strip()}\n\n{lines}\n\nWhich one is right? Answer with its letter only."
    answer = letters[labels.index(str(right))]
    return exchange(prompt, answer, letters=letters, answer=answer, subject=subject)
