"""Tasks with epochs or shares to one shuffled list of conversations, the same on every machine.

`gsm8k*4` takes every conversation four times, `smoltalk~0.5` as many as make up half of the whole. Only training splits
may enter. A task is validated on its val split, or without one on a share of train, which stays out before anything is
repeated; so does every conversation that asks the same in any turn (of tasks of up to COMPARED conversations; of those
without right answers, such as one's own chats, just copies). With `joined` a share of them goes on with another one in
the same conversation, where both fit into a row.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanochat import storage
from nanochat.config.sft import SftConfig
from nanochat.data.conversations import Conversation
from nanochat.errors import AbsentFileError, ConfigError
from nanochat.tasks.registry import absolute_path_in, load_task
from nanochat.tasks.task import Selection, Task, TaskFiles

VALIDATION_SHARE = 20
COMPARED = 50_000
"""Conversations of a task up to which each is compared with those held out: generated tasks repeat themselves."""
_PART = re.compile(r"(?P<task>\w+)(=(?P<path>.+?))?(\*(?P<epochs>[0-9.]+)|~(?P<share>[0-9.]+))?")


@dataclass(frozen=True, kw_only=True)
class MixturePart:
    """One task of a mixture, by epochs or by its share of the whole."""

    task: str
    path: str | None = None
    epochs: float = 1.0
    share: float | None = None


@dataclass(frozen=True)
class MixtureSource:
    """All that decides a mixture's conversations; another process can load it."""

    config: SftConfig
    folder: str
    """Where tasks are downloaded to."""

    @functools.cached_property
    def parts(self) -> tuple[MixturePart, ...]:
        """The mixture's parts. Raises: ConfigError naming one that cannot be read."""
        parts = tuple(parse_part(text, self.config.identity) for text in self.config.mixture)
        total = sum(part.share or 0.0 for part in parts)
        if total >= 1:
            raise ConfigError(
                f"mixture={' '.join(self.config.mixture)}: its shares are {total:g} in all. Leave room below 1 for a "
                "task with epochs, from which the size of the whole follows."
            )
        return parts

    def files(self) -> list[str]:
        """Return the files of one's own that are mixed: their content decides the numbers, too."""
        paths = [part.path for part in self.parts if part.path is not None]
        return [file for path in paths for file in storage.list_files(path)]

    def tasks(self, part: MixturePart) -> tuple[Task, Task | None]:
        """Return a part's training split, and its val split if it has one."""
        files = TaskFiles(
            folder=self.folder, path=part.path, mirror=self.config.task_mirror, malformed=self.config.malformed
        )
        train = load_task(part.task, "train", files)
        try:
            return train, load_task(part.task, "val", files)
        except (ConfigError, AbsentFileError):
            return train, None


def parse_part(text: str, identity: str | None = None) -> MixturePart:
    """Return what NAME[=PATH][*EPOCHS or ~SHARE] says; `identity` is the identity task's path where it has none."""
    found = _PART.fullmatch(text)
    try:
        if found is None:
            raise ValueError(text)
        epochs, share = float(found["epochs"] or 1), float(found["share"]) if found["share"] else None
        if epochs <= 0 or (share is not None and not 0 < share < 1):
            raise ValueError(text)
    except ValueError as err:
        raise ConfigError(
            f"mixture={text}: must be NAME, NAME=PATH, and then *EPOCHS above 0 or ~SHARE between 0 and 1. For example "
            "gsm8k*4 or smoltalk~0.5."
        ) from err
    path = found["path"] or (identity if found["task"] == "identity" else None)
    return MixturePart(task=found["task"], path=path, epochs=epochs, share=share)


def with_absolute_paths(config: SftConfig) -> SftConfig:
    """Return a config whose paths mean the same in every folder."""
    mixture = tuple(absolute_path_in(text, parse_part(text).path) for text in config.mixture)
    identity = None if config.identity is None else storage.absolute(config.identity)
    return replace(config, mixture=mixture, identity=identity)


class Mixture(Sequence[Conversation]):
    """The conversations to train on, repeated and shuffled, and those held out from them."""

    def __init__(self, source: MixtureSource, tasks: Sequence[tuple[Task, Task | None]]) -> None:
        """Mix the parts' tasks, (train, val if there is one), in the source's order.

        Raises: ConfigError if one is another split or empty.
        """
        kept: list[Task] = []
        self.held_out: list[Task] = []
        """Of each task the conversations that stay out."""
        for task, val in tasks:
            if task.split != "train" or (val is not None and val.split != "val"):
                split = task.split if val is None or task.split != "train" else val.split
                raise ConfigError(f"mixture={task.name}: its {split} split is for scores. Train on a train split.")
            if len(task) < 2:
                raise ConfigError(
                    f"mixture={task.name}: has {len(task)} conversations, at least 2 are needed. Add some."
                )
            shuffled, most = task.shuffled(source.config.seed), source.config.validation_conversations
            if val is None:
                count = max(1, min(most, len(task) // VALIDATION_SHARE))
                held_out, shuffled = shuffled[len(task) - count :], shuffled[: len(task) - count]
            else:
                held_out = val.shuffled(source.config.seed)[:most]
            kept.append(_without_questions_of(held_out, shuffled))
            self.held_out.append(held_out)
        self.tasks = kept
        self.left_out = sum(len(task) - len(rest) for (task, _), rest in zip(tasks, kept)) - sum(
            len(held_out) for held_out in self.held_out if held_out.split == "train"
        )
        """Conversations that ask what is held out."""
        self._places = _places([len(task) for task in kept], source)
        draws = np.random.PCG64(np.random.SeedSequence([source.config.seed, 1])).random_raw(2 * len(self._places))
        goes_on = draws[::2] < source.config.joined * 2.0**64
        self._next = np.where(goes_on, (draws[1::2] % len(self._places)).astype(np.int64), -1)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Conversation:  # type: ignore[override]
        part, place = self._places[index].tolist()
        return self.tasks[part][place]

    def joined(self, index: int) -> Conversation:
        """Return a conversation with the one that it goes on with, if it does."""
        first, follows = self[index], int(self._next[index])
        return first if follows < 0 else Conversation(first.messages + self[follows].messages, first.facts)

    def validation(self) -> list[Conversation]:
        """Return the conversations held out, task by task."""
        return [conversation for task in self.held_out for conversation in task]

    def dropped(self) -> dict[str, int]:
        """Return how many malformed conversations were left out, by reason."""
        totals: dict[str, int] = {}
        for task in self.tasks:
            for reason, count in task.dropped.items():
                totals[reason] = totals.get(reason, 0) + count
        return totals

    def counts(self) -> dict[str, int]:
        """Return how many conversations of each task are in the mixture, repetitions counted."""
        parts = np.bincount(self._places[:, 0], minlength=len(self.tasks)).tolist()
        totals: dict[str, int] = {}
        for task, count in zip(self.tasks, parts, strict=True):
            totals[task.name] = totals.get(task.name, 0) + count
        return totals


def _without_questions_of(held_out: Task, task: Task) -> Task:
    """Leave out the conversations that ask, in any turn, what is held out; unscored ones only where all is the same."""

    def questions(conversation: Conversation) -> set[str]:
        messages = conversation.messages
        if task.kind == "unscored":
            return {"\n".join(message.text for message in messages)}
        return {message.text.casefold() for message in messages if message.role == "user"}

    if len(task) > COMPARED:
        return task
    asked = set[str]().union(*map(questions, held_out))
    indices = [index for index, one in enumerate(task) if asked.isdisjoint(questions(one))]
    if not indices:
        raise ConfigError(f"mixture={task.name}: asks nothing but what is held out from it. Add other conversations.")
    return Selection(task, indices)


def _places(sizes: Sequence[int], source: MixtureSource) -> np.ndarray:
    """Return (part, conversation) of every conversation of the mixture, shuffled, int64 of shape (conversations, 2)."""
    by_epochs = sum(size * part.epochs for size, part in zip(sizes, source.parts, strict=True) if part.share is None)
    whole = by_epochs / (1 - sum(part.share or 0.0 for part in source.parts))
    places = []
    for number, (size, part) in enumerate(zip(sizes, source.parts, strict=True)):
        count = max(1, round(size * part.epochs if part.share is None else whole * part.share))
        places.append(np.stack([np.full(count, number), np.arange(count) % size], axis=1))
    joined = np.concatenate(places)
    raw = np.random.PCG64(np.random.SeedSequence([source.config.seed, len(joined)])).random_raw(len(joined))
    return joined[np.argsort(raw, kind="stable")]


@functools.lru_cache(maxsize=2)
def load_mixture(source: MixtureSource) -> Mixture:
    """Return the mixture of a source, loaded once in a process."""
    return Mixture(source, [source.tasks(part) for part in source.parts])
