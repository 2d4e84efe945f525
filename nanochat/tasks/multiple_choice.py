"""Multiple choice: MMLU (57 subjects of school and university) and ARC (school science), scored by the answer's letter.

The letter stands after its choice, right behind ` =>`, where the tokenizer cuts: so it is the very token with which the
reply begins, and a small model binds a choice to a token that it has seen in the question.

Source: Hendrycks et al., 2021, arXiv 2009.03300; Clark et al., 2018, arXiv 1803.05457; letters after the choices:
karpathy/nanochat tasks/common.py@92d63d4. Files: huggingface.co cais/mmlu and allenai/ai2_arc; also MMLU as folders of
CSV files with a header, and ARC's test split as CORE has it.
Not covered: few-shot prompts (CORE has them).
"""

import csv
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from glob import escape, glob
from statistics import fmean
from string import ascii_uppercase
from typing import Any

from nanochat import storage
from nanochat.data.conversations import Conversation, exchange
from nanochat.errors import DataError, excerpt
from nanochat.tasks.task import ListedTask, TaskFiles, of_split, parsed, raw_lines, read_table, text_of

MMLU_HOME = "https://huggingface.co/datasets/cais/mmlu/resolve/main/all"
ARC_HOME = "https://huggingface.co/datasets/allenai/ai2_arc/resolve/main"
LABELS = "0123"


class MultipleChoice(ListedTask):
    """Questions to answer with a letter; `facts` have `letters`, `answer` and `subject`."""

    kind = "choose"

    def __init__(
        self, name: str, split: str, found: str, conversations: Sequence[Conversation], dropped: Mapping[str, int]
    ) -> None:
        super().__init__(name, split, conversations, dropped)
        if not conversations:
            raise DataError(f"{name}={found}: has no question. Name another.")
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
    rows = _csv_rows(found) if os.path.isdir(found) else _mmlu_rows(found)
    return MultipleChoice("mmlu", split, found, *parsed(rows, _conversation, files))


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
    if found.endswith(".jsonl"):
        return MultipleChoice(name, split, found, *parsed(raw_lines(found), functools.partial(_of_core, name), files))
    return MultipleChoice(name, split, found, *parsed(_arc_rows(found, name), _conversation, files))


Row = tuple[object, object, Sequence[str] | None, object, str]
"""Question, choices, their labels, the right label, subject."""


def _mmlu_rows(path: str) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(read_table(path, ["question", "subject", "choices", "answer"]).to_pylist()):
        yield f"{path}: row {number}", (row["question"], row["choices"], LABELS, row["answer"], row["subject"])


def _csv_rows(folder: str) -> Iterator[tuple[str, Row]]:
    """Read SUBJECT_PART.csv files with the header question,choice0,...,choice3,answer."""
    for path in sorted(glob(storage.join(escape(folder), "*.csv"))):
        subject = storage.name_of(path).rpartition("_")[0]
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, strict=True)
                for row in reader:
                    choices = [row.get(f"choice{label}") for label in LABELS]
                    where = f"{path}:{reader.line_num}"
                    yield where, (row.get("question"), choices, LABELS, row.get("answer"), subject)
        except (OSError, ValueError, csv.Error) as err:
            raise DataError(f"{path}: cannot be read as CSV ({excerpt(err)}). Replace it.") from err


def _arc_rows(path: str, name: str) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(read_table(path, ["question", "choices", "answerKey"]).to_pylist()):
        choices = row["choices"] or {}
        where = f"{path}: row {number}"
        yield where, (row["question"], choices.get("text"), choices.get("label"), row["answerKey"], name)


def _of_core(name: str, row: Any, where: str) -> Conversation:
    """Return a question of CORE's files as a conversation. Raises: DataError if it is malformed."""
    question, choices = text_of(row, "query", where).removeprefix("Question: "), row.get("choices")
    labels = [str(number) for number in range(len(choices))] if isinstance(choices, list) else None
    return _conversation((question, choices, labels, row.get("gold"), name), where)


def _conversation(row: Row, where: str) -> Conversation:
    """Return a question as a conversation. Raises: DataError if it is malformed."""
    choices, right, subject = row[1], row[3], row[4]
    question, labels = text_of({"question": row[0]}, "question", where), list(row[2] or ())
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
