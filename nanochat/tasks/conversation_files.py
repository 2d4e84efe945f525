"""Files of conversations to train on: one's own (`messages` or Alpaca), and SmolTalk.

`messages` is OpenAI's form, one JSON object a line. Alpaca is instruction, input and output, one object a line or a
.json list of them. The first record that is in either form says which it is. A malformed record is an error that names
file and line, or with TaskFiles.malformed="drop" it is left out and counted.

Source: messages: nanochat/data/conversations.py. Alpaca: Taori et al., 2023, github.com/tatsu-lab/stanford_alpaca.
SmolTalk: Ben Allal et al., 2025, arXiv 2502.02737, in its edition for small models: HuggingFaceTB/smol-smoltalk.
Not covered: Alpaca's fields history and system; ShareGPT's form.
"""

import os
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from glob import escape, glob
from itertools import accumulate
from typing import Any

import pyarrow as pa

from nanochat import storage
from nanochat.data.conversations import Conversation, exchange, parse_conversation
from nanochat.errors import AbsentFileError, ConfigError, DataError, excerpt
from nanochat.tasks.task import (
    ListedTask,
    Task,
    TaskFiles,
    dropping,
    of_split,
    parse_json,
    parsed,
    raw_lines,
    read_table,
    text_of,
)

SMOLTALK_HOME = "https://huggingface.co/datasets/HuggingFaceTB/smol-smoltalk/resolve/main/data"
ENDINGS = (".jsonl", ".jsonl.gz", ".json")


class Messages(ListedTask):
    """The conversations of a file."""

    kind = "unscored"

    def __init__(self, split: str, path: str, files: TaskFiles) -> None:
        """Read a file whole. Raises: DataError naming file and line or record if one is malformed and not dropped."""
        form: list[Callable[[Any, str], Conversation]] = []

        def parse(value: Any, where: str) -> Conversation:
            form[:] = form or [_form_of(value, where)]
            return form[0](value, where)

        super().__init__("messages", split, *parsed(_records(path), parse, files))
        if not self.conversations:
            raise DataError(f"{path}: has no conversation; dropped: {dict(self.dropped)}. Name another file.")


class SmolTalk(Task):
    """Rows of parquet files; each becomes a conversation when it is asked for, since they are many."""

    name = "smoltalk"
    kind = "unscored"

    def __init__(self, split: str, paths: list[str], *, drop: bool) -> None:
        """Read the files; all rows are parsed only to drop those that are malformed."""
        self.split, self.paths = split, paths
        columns = [read_table(path, ["messages"]).column("messages") for path in paths]
        self.ends = list(accumulate(len(column) for column in columns))
        self.rows = pa.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type)
        self.dropped = dropped = Counter[str]()
        self.kept = [row for row in range(self.ends[-1]) if not drop or self._is_well_formed(row, dropped)]

    def __len__(self) -> int:
        return len(self.kept)

    def conversation(self, index: int) -> Conversation:
        """Return a row's conversation. Raises: DataError naming file and row if it is malformed."""
        row = self.kept[index]
        return parse_conversation({"messages": self.rows[row].as_py()}, self._where(row))

    def _where(self, row: int) -> str:
        file = bisect(self.ends, row)
        return f"{self.paths[file]}: row {row - [0, *self.ends][file]}"

    def _is_well_formed(self, row: int, dropped: Counter[str]) -> bool:
        with dropping(dropped, where := self._where(row), drop=True):
            parse_conversation({"messages": self.rows[row].as_py()}, where)
            return True
        return False


def load_messages(split: str, files: TaskFiles) -> Messages:
    """Return the conversations of files.path: a file is train; a folder has train.jsonl and perhaps val and test.

    Raises: DataError naming file and line of a malformed record; ConfigError if there is no path or no such split.
    """
    path = files.path
    if path is None:
        raise ConfigError("path=None: messages are files of your own. Name a file, or a folder that has train.jsonl.")
    has = {"train": path}
    if os.path.isdir(path):
        there = [(name, storage.join(path, name + ending)) for name in ("train", "val", "test") for ending in ENDINGS]
        has = {name: file for name, file in there if os.path.isfile(file)}
        if not has:
            raise AbsentFileError(f"messages={path}: has no train{', train'.join(ENDINGS)}. Name the file itself.")
    return Messages(split, of_split(path, split, has), files)


def load_smoltalk(split: str, files: TaskFiles) -> SmolTalk:
    """Return SmolTalk's train (460,341 conversations) or test (24,229), or those of files SPLIT-*.parquet in a folder.

    Raises: DataError naming the file if it is damaged.
    """
    count = of_split("smoltalk", split, {"train": 4, "test": 1})
    names = [f"{split}-{number:05}-of-{count:05}.parquet" for number in range(count)]
    if files.path is not None:
        names = [storage.name_of(path) for path in sorted(glob(storage.join(escape(files.path), f"{split}-*.parquet")))]
    paths = [files.find("smoltalk", name, SMOLTALK_HOME) for name in names or [f"{split}-*.parquet"]]
    return SmolTalk(split, paths, drop=files.malformed == "drop")


def _records(path: str) -> Iterator[tuple[str, Any]]:
    """Yield (where, line) of a file of lines, or (where, value) of a .json list."""
    if not path.endswith(".json"):
        yield from raw_lines(path)
        return
    values = parse_json(b"".join(line for _, line in raw_lines(path)), path)
    if not isinstance(values, list):
        raise DataError(f"{path}: must be a list of records. Name a file of one record a line .jsonl.")
    for number, value in enumerate(values):
        yield f"{path}: record {number}", value


def _form_of(record: object, where: str) -> Callable[[Any, str], Conversation]:
    """Return what parses records of this one's form."""
    for key, parse in (("messages", parse_conversation), ("instruction", _alpaca)):
        if isinstance(record, dict) and key in record:
            return parse
    found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
    raise DataError(
        f"{where}: must be an object with messages or instruction, and is {excerpt(found)}. Mend or drop it."
    )


def _alpaca(record: object, where: str) -> Conversation:
    instruction, output = text_of(record, "instruction", where), text_of(record, "output", where)
    assert isinstance(record, dict)
    for key in ("history", "system"):
        if record.get(key):
            raise DataError(f"{where}: {key}={excerpt(record[key])}: is not read. Write the conversation as messages.")
    given = text_of(record, "input", where) if record.get("input") else ""
    return exchange(f"{instruction}\n\n{given}" if given else instruction, output)
