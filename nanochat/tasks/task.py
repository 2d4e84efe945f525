"""A dataset to conversations and rewards: the one shape that training, evaluation and RL ask of a task.

A task is a sequence of conversations that end with the right answer. It is scored in one of two ways: `generate` lets
the model reply and judges the text, `choose` compares the probabilities of the answer letters.
"""

import gzip
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np

from nanochat import storage
from nanochat.data.conversations import Conversation
from nanochat.data.download import download
from nanochat.errors import DataError, excerpt

Split = Literal["train", "val", "test"]


class Task(Sequence[Conversation], ABC):
    """A split of a dataset."""

    name: str
    split: str
    """train may be trained on; every other split is for scores alone."""
    kind: Literal["generate", "choose"] = "generate"
    """choose: `facts` have `letters`, the answers to choose from, and `answer`, the right one of them."""
    chance: float = 0.0
    """Expected accuracy of a guess."""

    @abstractmethod
    def conversation(self, index: int) -> Conversation:
        """Return one conversation, 0 <= index < len."""

    def reward(self, conversation: Conversation, reply: str) -> float:
        """Return how good a reply's text is, from 0 to 1."""
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

    def __len__(self) -> int:
        return len(self.indices)

    def conversation(self, index: int) -> Conversation:
        """Return the conversation that stands there."""
        return self.task.conversation(self.indices[index])

    def reward(self, conversation: Conversation, reply: str) -> float:
        """Judge as the whole task does."""
        return self.task.reward(conversation, reply)


@dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """Where the files of tasks are: a folder of one's own, or the run's folder of downloads."""

    folder: str
    """Downloads go to folder/TASK/."""
    path: str | None = None
    """A local folder or file that has the task's files already; nothing is downloaded then."""
    mirror: str | None = None
    """Base URL that stands for the public homes of all tasks; files are asked for as MIRROR/TASK/FILE."""

    def find(self, task: str, file: str, base_url: str, names: Sequence[str] = ()) -> str:
        """Return the local path of a task's file: downloaded as base_url/file, or the first of `names` below `path`.

        Raises: DataError if it is not there or cannot be fetched.
        """
        if self.path is not None:
            if os.path.isfile(self.path):
                return self.path
            for name in names or [file]:
                if os.path.exists(found := os.path.join(self.path, name)):
                    return found
            raise DataError(
                f"{task}={self.path}: has none of {', '.join(names or [file])}. Name the folder that has it, or leave "
                "the path out to download it."
            )
        target = storage.join(self.folder, task, storage.name_of(file))
        home = base_url if self.mirror is None else storage.join(self.mirror, task)
        download(storage.join(home, file), target)
        return target


def read_lines(path: str) -> Iterator[tuple[str, Any]]:
    """Yield (FILE:LINE, JSON value) of each line of a JSONL file, gzipped or not; empty lines are passed over.

    Raises: DataError naming file and line.
    """
    opened = gzip.open if path.endswith(".gz") else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
    except (ValueError, OSError, EOFError, RecursionError) as err:
        raise DataError(f"{path}:{number}: is no JSON line ({excerpt(err)}). Mend or drop it.") from err
