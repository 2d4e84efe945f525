"""Names of tasks to tasks: where a new one is entered, and nowhere else."""

import difflib
import re
from collections.abc import Callable

from nanochat import storage
from nanochat.errors import ConfigError
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.tasks.conversation_files import load_messages, load_smoltalk
from nanochat.tasks.gsm8k import load_gsm8k
from nanochat.tasks.humaneval import load_humaneval
from nanochat.tasks.identity import load_identity
from nanochat.tasks.multiple_choice import load_arc_challenge, load_arc_easy, load_mmlu
from nanochat.tasks.spelling import Spelling
from nanochat.tasks.task import Task, TaskFiles

Loader = Callable[[str, TaskFiles], Task]

LOADERS: dict[str, Loader] = {
    "arithmetic": lambda split, files: Arithmetic(split),
    "identity": lambda split, files: load_identity(split, files.path),
    "spelling": lambda split, files: Spelling(split),
    "gsm8k": load_gsm8k,
    "mmlu": load_mmlu,
    "arc_easy": load_arc_easy,
    "arc_challenge": load_arc_challenge,
    "humaneval": load_humaneval,
    "smoltalk": load_smoltalk,
    "messages": load_messages,
}

LICENCES = {
    "arithmetic": "MIT", "identity": "MIT", "spelling": "MIT",  # made by this project's code from its own words
    "gsm8k": "MIT", "humaneval": "MIT",  # github.com openai/grade-school-math, openai/human-eval
    "mmlu": "MIT", "arc_easy": "CC-BY-SA-4.0", "arc_challenge": "CC-BY-SA-4.0",  # huggingface.co cais/mmlu, ai2_arc
    "smoltalk": "Apache-2.0",  # huggingface.co HuggingFaceTB/smol-smoltalk
}  # fmt: skip
"""What the publishers of the tasks' files state."""

UNSCORED = ("smoltalk", "messages")
"""Those that can only be trained on."""


_NAMED = re.compile(r"(?P<name>\w+)(=(?P<path>.+?))?(:(?P<split>\w+))?")


def load_named(
    field: str, text: str, split: str, folder: str, mirror: str | None, identity: str | None = None
) -> tuple[str, Task]:
    """Return the name and the task that NAME[=PATH][:SPLIT] says; `split` and `identity`, its path, where none is said.

    Raises: ConfigError naming the field it is from, and as `load_task`.
    """
    found = _NAMED.fullmatch(text)
    if found is None:
        raise ConfigError(f"{field}={text}: must be NAME, NAME=PATH and then :SPLIT. For example arithmetic:val.")
    name = found["name"]
    _check_known(field, name)
    path = found["path"] or (identity if name == "identity" else None)
    try:
        return name, load_task(name, found["split"] or split, TaskFiles(folder=folder, path=path, mirror=mirror))
    except ConfigError as err:
        raise ConfigError(f"{field}={text}: {err}") from err


def with_absolute_path(text: str) -> str:
    """Return NAME[=PATH][:SPLIT] with a path that means the same in every folder; what cannot be read stays."""
    found = _NAMED.fullmatch(text)
    return absolute_path_in(text, found["path"] if found else None)


def absolute_path_in(text: str, path: str | None) -> str:
    """Return a text that has =PATH with it absolute."""
    return text if path is None else text.replace(f"={path}", f"={storage.absolute(path)}", 1)


def files_of(text: str) -> list[str]:
    """Return the files of one's own that NAME[=PATH][:SPLIT] names."""
    found = _NAMED.fullmatch(text)
    return storage.list_files(found["path"]) if found and found["path"] else []


def licence_of(text: str) -> str | None:
    """Return the licence of what NAME[=PATH][:SPLIT] names; None of files of one's own."""
    found = _NAMED.fullmatch(text)
    return LICENCES.get(found["name"]) if found and not found["path"] else None


def load_task(name: str, split: str, files: TaskFiles) -> Task:
    """Return a split of a task. Raises: ConfigError if there is no such task or split, DataError if its files fail."""
    _check_known("task", name)
    return LOADERS[name](split, files)


def _check_known(field: str, name: str) -> None:
    if name not in LOADERS:
        meant = "".join(f" Did you mean {near}?" for near in difflib.get_close_matches(name, LOADERS, 1))
        raise ConfigError(f"{field}={name}: must be one of {', '.join(LOADERS)}.{meant}")
