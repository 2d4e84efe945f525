"""A dataset to conversations and rewards: the one shape that training, evaluation and RL ask of a task.

A task is a sequence of conversations that end with the right answer. It is scored in one of two ways: `generate` lets
the model reply and judges the text, `choose` compares the probabilities of the answer letters.
"""

import gzip
import json
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat import storage
from nanochat.data.conversations import Conversation
from nanochat.data.download import download
from nanochat.errors import AbsentFileError, ConfigError, DataError, escaped, excerpt

T = TypeVar("T")


class Task(Sequence[Conversation], ABC):
    """A split of a dataset."""

    name: str
    split: str
    """train may be trained on; every other split is for scores alone."""
    kind: Literal["generate", "choose", "unscored"] = "generate"
    """choose: `facts` have `letters`, the answers to choose from, and `answer`, the right one of them.
    unscored: conversations to learn from, without a right answer."""
    chance: float = 0.0
    """Expected accuracy of a guess."""
    dropped: Mapping[str, int] = MappingProxyType({})
    """Malformed conversations that were left out, by reason."""

    @abstractmethod
    def conversation(self, index: int) -> Conversation:
        """Return one conversation, 0 <= index < len."""

    @staticmethod
    def reward(conversation: Conversation, reply: str) -> float:
        """Return how good a reply's text is, from 0 to 1; the conversation's facts say what is right."""
        return float(reply.strip() == conversation.messages[-1].text.strip())

    def evaluate(self, conversation: Conversation, reply: str) -> bool:
        """Tell whether a reply is right."""
        return self.reward(conversation, reply) == 1.0

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> "Task": ...
    def __getitem__(self, index: int | slice) -> "Conversation | Task":
        """Return a conversation, or for a slice the task of those conversations."""
        if isinstance(index, slice):
            return Selection(self, range(len(self))[index])
        return self.conversation(range(len(self))[index])

    def shuffled(self, seed: int) -> "Task":
        """Return the task in another order, the same for a seed on every machine."""
        raw = np.random.PCG64(np.random.SeedSequence([seed, len(self)])).random_raw(len(self))
        return Selection(self, np.argsort(raw, kind="stable").tolist())


class Selection(Task):
    """Some conversations of a task, in an order of its own."""

    def __init__(self, task: Task, indices: Sequence[int]) -> None:
        self.task, self.indices = task, indices
        self.name, self.split, self.kind, self.chance = task.name, task.split, task.kind, task.chance
        self.dropped, self.reward = task.dropped, task.reward

    def __len__(self) -> int:
        return len(self.indices)

    def conversation(self, index: int) -> Conversation:
        """Return the conversation that stands there."""
        return self.task.conversation(self.indices[index])


class ListedTask(Task):
    """A task whose conversations are all in memory."""

    def __init__(
        self, name: str, split: str, conversations: Sequence[Conversation], dropped: Mapping[str, int] | None = None
    ) -> None:
        self.name, self.split, self.conversations = name, split, conversations
        self.dropped = dropped or {}

    def __len__(self) -> int:
        return len(self.conversations)

    def conversation(self, index: int) -> Conversation:
        """Return the conversation that stands there."""
        return self.conversations[index]


class Excerpt(ListedTask):
    """The first conversations of a task without the rest of it, to be sent to other processes."""

    def __init__(self, task: Task, count: int) -> None:
        super().__init__(task.name, task.split, list(task[:count]))
        self.kind, self.chance, self.reward = task.kind, task.chance, task.reward


def of_split(task: str, split: str, choices: Mapping[str, T]) -> T:
    """Return a split's choice. Raises: ConfigError naming the splits that the task has."""
    if split not in choices:
        raise ConfigError(f"split={split}: {task} has {' and '.join(choices)} alone. Choose among those.")
    return choices[split]


@dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """Where the files of tasks are: a folder of one's own, or the run's folder of downloads."""

    folder: str
    """Downloads go to folder/TASK/."""
    path: str | None = None
    """A local folder or file that has the task's files already; nothing is downloaded then."""
    mirror: str | None = None
    """Base URL that stands for the public homes of all tasks; files are asked for as MIRROR/TASK/FILE."""
    malformed: Literal["error", "drop"] = "error"
    """What a conversation in a file does that breaks the form: end the work, or be left out and counted."""

    def find(self, task: str, file: str, base_url: str, names: Sequence[str] = ()) -> str:
        """Return the local path of a task's file: downloaded as base_url/file, or the first of `names` below `path`.

        A `path` that is a file must bear one of the names, so that one split's file never passes for another's.
        Raises: AbsentFileError if it is not there, DataError if it cannot be fetched.
        """
        if self.path is not None:
            names = names or [file]
            if os.path.isfile(self.path) and storage.name_of(self.path) in map(storage.name_of, names):
                return self.path
            for name in names:
                if os.path.exists(found := os.path.join(self.path, name)):
                    return found
            raise AbsentFileError(
                f"{task}={self.path}: is or has none of {', '.join(names)}. Name the folder that has it, or leave the "
                "path out to download it."
            )
        target = storage.join(self.folder, task, storage.name_of(file))
        home = base_url if self.mirror is None else storage.join(self.mirror, task)
        download(storage.join(home, file), target)
        return target


@contextmanager
def dropping(dropped: Counter[str], where: str, *, drop: bool) -> Iterator[None]:
    """Count a malformed record by the field that is wrong, instead of stopping at it."""
    try:
        yield
    except DataError as err:
        if not drop:
            raise
        reason = re.split(r"=|: |\. | \(", str(err).removeprefix(f"{escaped(where)}: "))[0]
        dropped[re.sub(r"\[\d+\]", "", reason)] += 1


def parsed(
    records: Iterable[tuple[str, Any]], parse: Callable[[Any, str], Conversation], files: TaskFiles
) -> tuple[list[Conversation], Counter[str]]:
    """Return the conversations of (where, line or value) and how many malformed ones were left out, by reason.

    A line, in bytes, is JSON. Raises: DataError naming `where` of a malformed one if files.malformed says so.
    """
    conversations, dropped = [], Counter[str]()
    for where, record in records:
        with dropping(dropped, where, drop=files.malformed == "drop"):
            value = parse_json(record, where) if isinstance(record, bytes) else record
            conversations.append(parse(value, where))
    return conversations, dropped


def raw_lines(path: str) -> Iterator[tuple[str, bytes]]:
    """Yield (FILE:LINE, line) of each line of a file, gzipped or not; empty lines are passed over.

    Raises: DataError naming the file.
    """
    opened = gzip.open if path.endswith(".gz") else open
    number = 0
    if not os.path.exists(path):
        raise AbsentFileError(f"file={path}: there is no such file. Mend the path.")
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (OSError, EOFError, zlib.error) as err:
        raise DataError(f"{path}: cannot be read after line {number} ({excerpt(err)}). Replace the file.") from err


def parse_json(content: bytes, where: str) -> Any:
    """Return the value of JSON in UTF-8, with or without a byte order mark. Raises: DataError naming `where`."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as err:
        raise DataError(f"{where}: is no UTF-8 ({excerpt(err)}). Save the file as UTF-8.") from err
    except (ValueError, RecursionError) as err:
        raise DataError(f"{where}: is no JSON ({excerpt(err)}). Mend or drop it.") from err


def text_of(record: object, key: str, where: str) -> str:
    """Return a record's text. Raises: DataError naming `where` and key if it is none, or empty."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key}={excerpt(value)}: must be a text that is not empty. Mend or drop it.")
    return value


def read_table(path: str, columns: Sequence[str]) -> pa.Table:
    """Read columns of a parquet file. Raises: DataError naming the file if it is damaged or lacks one."""
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if not set(columns) <= set(names):
                raise DataError(
                    f"{path}: has the columns {excerpt(', '.join(names))}, and needs {', '.join(columns)}. Replace it."
                )
            return file.read(columns=list(columns))
    except (pa.ArrowException, OSError) as err:
        raise DataError(f"{path}: cannot be read as parquet ({excerpt(err)}). Replace it.") from err
