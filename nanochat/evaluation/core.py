"""A bundle of in-context tasks to the CORE metric: accuracies, each centred on its random baseline, and their mean.

A bundle is a folder: one `*.yaml` whose `icl_tasks` are DCLM's list, `eval_meta_data.csv` with the baselines in
percent, and `eval_data/`. Tasks and baselines are data, so another language's CORE is another folder. An example is
shown after solved ones of its task and ends in the options of a group (`nanochat.evaluation.scoring`). Multiple choice
compares ends of one context; schema compares contexts by one end; language modelling asks for the exact continuation.

    centred = (accuracy - baseline) / (1 - baseline)

Sources: DCLM, arXiv:2406.11794, and mlfoundations/dclm eval/; order, examples and prompts are those of
karpathy/nanochat core_eval.py@92d63d4, whose scores the README compares with.
Not covered: DCLM's 53-task EXTENDED metric, generated answers, categories within a task.
"""

import csv
import io
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from nanochat import storage
from nanochat.errors import DataError, excerpt
from nanochat.evaluation.scoring import Option, Score, Scorer, common_prefix
from nanochat.evaluation.statistics import centered, mean_of_centered, standard_error

TABLE_NAME = "eval_meta_data.csv"
NOT_CORE = "mmlu_fewshot"
"""The task that DCLM's list has beside the CORE tasks."""
SHUFFLE_SEED = 1337
FEWSHOT_SEED = 1234
"""Plus the example's place in the shuffled file."""
EXAMPLES_AT_ONCE = 512
"""Prompts held in memory while they are scored."""

FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
"""Of an example, by kind of task: lists of texts, the place of the right one from 0, and texts."""

BASELINES_1 = {
    "hellaswag_zeroshot": 25, "jeopardy": 0, "bigbench_qa_wikidata": 0, "arc_easy": 25, "arc_challenge": 25, "copa": 50,
    "commonsense_qa": 20, "piqa": 50, "openbook_qa": 25, "lambada_openai": 0, "hellaswag": 25, "winograd": 50,
    "winogrande": 50, "bigbench_dyck_languages": 0, "agi_eval_lsat_ar": 20, "bigbench_cs_algorithms": 0,
    "bigbench_operators": 0, "bigbench_repeat_copy_logic": 0, "squad": 0, "coqa": 0, "boolq": 62,
    "bigbench_language_identification": 9.1,
}  # fmt: skip
"""DCLM's first table, in percent: the one of GPT-2's 0.256525. boolq's is that of always saying yes."""
BASELINES_2 = BASELINES_1 | {"commonsense_qa": 40.3, "agi_eval_lsat_ar": 25, "bigbench_language_identification": 25}
"""DCLM's table since September 2025; a model's CORE comes out about 0.025 lower by it."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class CoreTask:
    """One task with its examples in the order in which they are scored."""

    label: str
    kind: str
    """multiple_choice, schema or language_modeling."""
    num_fewshot: int
    """Solved examples before the one to solve."""
    delimiter: str
    """Between question and answer."""
    baseline: float
    """Accuracy without knowledge, in [0, 1)."""
    is_sample: bool
    """The file is a sample of the task's (STEM_<rows>.jsonl)."""
    rows: tuple[Row, ...]

    def prompts(self, index: int) -> list[str]:
        """Return the whole text of every option; for language modelling the text without and with continuation."""
        others = len(self.rows) - 1
        picks = random.Random(FEWSHOT_SEED + index).sample(range(others), min(self.num_fewshot, others))
        head = "".join(self._solved(self.rows[pick + (pick >= index)]) + "\n\n" for pick in picks)
        row = self.rows[index]
        if self.kind == "multiple_choice":
            return [head + row["query"] + self.delimiter + choice for choice in row["choices"]]
        if self.kind == "schema":
            return [head + context + self.delimiter + row["continuation"] for context in row["context_options"]]
        # A space at the end would be part of the continuation's first token.
        return [(head + row["context"].strip() + self.delimiter).rstrip(), head + self._solved(row)]

    def groups(self, scorer: Scorer, indices: Iterable[int]) -> list[list[Option]]:
        """Return the options of each example, BOS in front, as the scorer's tokenizer has them.

        Scored are: after what all choices share; what all contexts are followed by; after the text without
        continuation. Where that leaves an option no token (it begins the others), all are scored from its last one.
        """
        return [self._group(scorer, self.prompts(index)) for index in indices]

    def is_right(self, index: int, scores: Sequence[Score]) -> bool:
        """Tell whether the gold option has the lowest mean nats (the first wins a tie), or all tokens are greedy."""
        if self.kind == "language_modeling":
            return scores[0].is_greedy
        return self.rows[index]["gold"] == min(range(len(scores)), key=lambda option: scores[option].mean_nats)

    def _group(self, scorer: Scorer, prompts: list[str]) -> list[Option]:
        sequences = [(scorer.bos, *scorer.encode(prompt)) for prompt in prompts]
        if self.kind == "schema":
            shared = common_prefix([sequence[::-1] for sequence in sequences])
            return [Option(tokens, max(1, len(tokens) - shared)) for tokens in sequences]
        shared = common_prefix(sequences)
        compared = sequences[1:] if self.kind == "language_modeling" else sequences
        return [Option(tokens, min(shared, min(map(len, compared)) - 1)) for tokens in compared]

    def _solved(self, row: Row) -> str:
        if self.kind == "multiple_choice":
            return row["query"] + self.delimiter + row["choices"][row["gold"]]
        if self.kind == "schema":
            return row["context_options"][row["gold"]] + self.delimiter + row["continuation"]
        return row["context"].strip() + self.delimiter + row["continuation"]


@dataclass(frozen=True)
class Bundle:
    """The tasks of a folder."""

    folder: str
    tasks: dict[str, CoreTask]
    """By label; those that have data."""
    absent: tuple[str, ...]
    """Labels of the tasks whose data file is not there."""
    table_version: str
    """Of the baselines: 1 or 2 as DCLM published them, else own."""


def score_examples(task: CoreTask, examples: range, scorer: Scorer) -> list[bool]:
    """Return which examples of a task are answered right. Raises: DataError if an option is too long to score."""
    outcomes = []
    for first in range(0, len(examples), EXAMPLES_AT_ONCE):
        indices = examples[first : first + EXAMPLES_AT_ONCE]
        scores = scorer.score(task.groups(scorer, indices))
        outcomes += [task.is_right(index, of_options) for index, of_options in zip(indices, scores, strict=True)]
    return outcomes


def core_result(bundle: Bundle, outcomes: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    """Return the metric's title, value, standard error and table version, and the tasks' accuracies.

    `outcomes` has the results by label, of all items; a task without any is absent. Only all tasks together are CORE.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for label, task in bundle.tasks.items():
        if not (n := len(outcomes.get(label, ()))):
            continue
        accuracy = sum(outcomes[label]) / n
        tasks[label] = {
            "accuracy": accuracy, "n": n, "stderr": standard_error(accuracy, n),
            "centered": centered(accuracy, task.baseline), "baseline": task.baseline,
            "kind": task.kind, "num_fewshot": task.num_fewshot, "rows": len(task.rows), "is_sample": task.is_sample,
        }  # fmt: skip
    if not tasks:
        raise DataError("outcomes: hold no result of any task. Score some examples first.")
    listed = len(bundle.tasks) + len(bundle.absent)
    return {
        "title": _title(len(tasks), max(listed, len(BASELINES_1)), tasks.values()),
        **mean_of_centered([(task["accuracy"], task["n"], task["baseline"]) for task in tasks.values()]),
        "table_version": bundle.table_version,
        "absent": [label for label in (*bundle.tasks, *bundle.absent) if label not in tasks],
        "samples": [label for label, task in tasks.items() if task["is_sample"]],
        "tasks": tasks,
    }


def _title(scored: int, listed: int, tasks: Iterable[Mapping[str, Any]]) -> str:
    """Return CORE where all of it was scored, else what it was on."""
    limits = [f"{scored} of {listed} tasks"] if scored < listed else []
    if any(task["n"] < task["rows"] or task["is_sample"] for task in tasks):
        limits.append("a sample of the examples")
    return "CORE" if not limits else f"CORE on {', '.join(limits)}"


def load_bundle(folder: str) -> Bundle:
    """Read and check a bundle. Raises: DataError with file and line if a part is missing or malformed."""
    entries = _task_list(folder)
    table = _baselines(folder, entries)
    tasks: dict[str, CoreTask] = {}
    for label, entry in entries.items():
        path, is_sample = _data_file(storage.join(folder, "eval_data", entry["dataset_uri"]))
        if path is None:
            continue
        kind = entry["icl_task_type"]
        rows = _read_rows(path, kind)
        random.Random(SHUFFLE_SEED).shuffle(rows)
        delimiter = entry.get("continuation_delimiter", " ")
        num_fewshot = entry["num_fewshot"][0]
        tasks[label] = CoreTask(label, kind, num_fewshot, delimiter, table[label] / 100, is_sample, tuple(rows))
    if not tasks:
        raise DataError(f"bundle={folder}: none of its tasks' files is there. Put them into its folder eval_data.")
    published = {"1": BASELINES_1, "2": BASELINES_2}
    version = next((name for name, baselines in published.items() if baselines == table), "own")
    return Bundle(folder, tasks, tuple(label for label in entries if label not in tasks), version)


def _read_text(path: str) -> str:
    try:
        with storage.open_read(path) as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise DataError(f"file={path}: is not UTF-8 ({excerpt(err)}). Fetch it again.") from err


def _task_list(folder: str) -> dict[str, dict[str, Any]]:
    """Return the checked entries of the CORE tasks by label, dataset_uri relative to eval_data."""
    lists = []
    for name in storage.list_names(folder):
        if name.endswith(".yaml"):
            path = storage.join(folder, name)
            try:
                content = yaml.safe_load(_read_text(path))
            except yaml.YAMLError as err:
                raise DataError(f"tasks={path}: is no YAML ({excerpt(err)}). Correct the line.") from err
            if isinstance(content, dict) and isinstance(content.get("icl_tasks"), list):
                lists.append((path, content["icl_tasks"]))
    if len(lists) != 1:
        raise DataError(
            f"bundle={folder}: must have one *.yaml with icl_tasks, has {len(lists)}. Give the folder of a CORE bundle."
        )
    ((path, listed),) = lists
    entries: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(listed, start=1):
        label = entry.get("label") if isinstance(entry, dict) else None
        if label == NOT_CORE:
            continue
        rule = "needs a label of its own" if not isinstance(label, str) or label in entries else _broken_rule(entry)
        if rule:
            raise DataError(f"tasks={path}: task {number} ({excerpt(label)}) {excerpt(rule)}. Correct the entry.")
        entries[str(label)] = entry | {"dataset_uri": entry["dataset_uri"].removeprefix("local_data/")}
    return entries


def _broken_rule(entry: dict[str, Any]) -> str | None:
    kind, shots, uri = (entry.get(name) for name in ("icl_task_type", "num_fewshot", "dataset_uri"))
    if kind not in tuple(FIELDS):
        return f"has icl_task_type {kind}, known are {', '.join(FIELDS)}"
    if not isinstance(shots, list) or len(shots) != 1 or not isinstance(shots[0], int) or shots[0] < 0:
        return f"has num_fewshot {shots}, must be a list of one number from 0"
    if not isinstance(uri, str) or not uri.endswith(".jsonl") or ".." in uri:
        return f"has dataset_uri {uri}, must be a .jsonl file below eval_data"
    if not isinstance(entry.get("continuation_delimiter", " "), str):
        return "has a continuation_delimiter that is no text"
    return None


def _baselines(folder: str, labels: Iterable[str]) -> dict[str, float]:
    """Return the random baselines of the tasks in percent."""
    path = storage.join(folder, TABLE_NAME)
    if not storage.exists(path):
        raise DataError(f"baselines={path}: there is no such file. Take the one that belongs to the bundle.")
    reader = csv.DictReader(io.StringIO(_read_text(path)))
    try:
        texts = {row.get("Eval Task"): (row.get("Random baseline"), reader.line_num) for row in reader}
    except csv.Error as err:
        raise DataError(f"baselines={path}: line {reader.line_num} is no CSV ({excerpt(err)}). Correct it.") from err
    baselines = {}
    for label in labels:
        text, line = texts.get(label, (None, 0))
        if text is None:
            raise DataError(f"baselines={path}: has no Random baseline of Eval Task {excerpt(label)}. Add the row.")
        baselines[label] = float(text) if re.fullmatch(r"[0-9]{1,2}(\.[0-9]+)?", text.strip()) else -1.0
        if baselines[label] < 0:
            raise DataError(f"baselines={path}: line {line}: {excerpt(text)} is no percentage below 100. Correct it.")
    return baselines


def _data_file(path: str) -> tuple[str | None, bool]:
    """Return the path of a task's file, or of a sample of it (the largest STEM_<rows>.jsonl), and whether it is one."""
    if storage.exists(path):
        return path, False
    folder, _, name = path.rpartition("/")
    pattern = re.compile(re.escape(name.removesuffix(".jsonl")) + r"_([0-9]+)\.jsonl")
    samples = [(int(match[1]), match[0]) for match in map(pattern.fullmatch, storage.list_names(folder)) if match]
    return (storage.join(folder, max(samples)[1]), True) if samples else (None, False)


def _read_rows(path: str, kind: str) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise DataError(f"file={path}: line {number} is no JSON ({excerpt(err)}). Correct it.") from err
        if not isinstance(row, dict) or not all(_is_field(name, row) for name in FIELDS[kind]):
            wanted = ", ".join(FIELDS[kind])
            raise DataError(f"file={path}: line {number} is no {kind} example with {wanted}. Correct or delete it.")
        rows.append(row)
    if not rows:
        raise DataError(f"file={path}: has no example. Fetch it again, or delete it to score without this task.")
    return rows


def _is_field(name: str, row: dict[str, Any]) -> bool:
    value = row.get(name)
    if name == "gold":
        return type(value) is int and 0 <= value < len(row.get("choices", row.get("context_options")))
    if name in ("choices", "context_options"):
        return isinstance(value, list) and len(value) >= 2 and all(_is_text(option) for option in value)
    return _is_text(value) if name == "continuation" else isinstance(value, str)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""
