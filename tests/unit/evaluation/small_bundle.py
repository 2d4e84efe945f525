"""A small bundle of each kind of task, with what real ones have: MMLU in the list, an absent task, a sample."""

import csv
import json
from pathlib import Path

import yaml

COLOURS = ("red", "green", "dark green", "blue", "light blue", "grey")
CHOICE_ROWS = [
    {
        "query": f"Question: Which colour has thing {number}?",
        "choices": [COLOURS[(number + k) % 6] for k in range(2 + number % 3)],
        "gold": number % 2,
    }
    for number in range(11)
]
SCHEMA_ROWS = [
    {
        "context_options": [f"Ann met {name} because Ann", f"Ann met {name} because {name}"],
        "continuation": f"was {mood}.",
        "gold": number % 2,
    }
    for number, (name, mood) in enumerate((name, mood) for name in ("Bob", "Christine") for mood in ("sad", "rich"))
]
COPY_ROWS = [{"context": f"{n} {n + 1}  ", "continuation": f"{n + 2} {n + 3}"} for n in range(7)]

TASKS = [
    {
        "label": "mmlu_fewshot", "dataset_uri": "local_data/a/mmlu.jsonl", "num_fewshot": [5],
        "icl_task_type": "multiple_choice", "has_categories": True,
    },
    {
        "label": "colours", "dataset_uri": "local_data/a/colours.jsonl", "num_fewshot": [2],
        "icl_task_type": "multiple_choice", "continuation_delimiter": "\nAnswer: ",
    },
    {
        "label": "pronouns", "dataset_uri": "local_data/b/pronouns.jsonl", "num_fewshot": [0],
        "icl_task_type": "schema",
    },
    {"label": "counting", "dataset_uri": "b/counting.jsonl", "num_fewshot": [3], "icl_task_type": "language_modeling"},
    {"label": "lost", "dataset_uri": "local_data/b/lost.jsonl", "num_fewshot": [0], "icl_task_type": "schema"},
]  # fmt: skip
BASELINES = {"colours": "40", "pronouns": "50", "counting": "0", "lost": "50", "other": ""}


def write_bundle(folder: Path) -> str:
    """Write the bundle and return its folder."""
    (folder / "eval_data/a").mkdir(parents=True)
    (folder / "eval_data/b").mkdir()
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"seed": 1, "icl_tasks": TASKS}))
    write_baselines(folder, BASELINES)
    for name, rows in (("a/colours", CHOICE_ROWS), ("b/pronouns_4", SCHEMA_ROWS), ("b/counting", COPY_ROWS)):
        (folder / f"eval_data/{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(folder)


def write_baselines(folder: Path, baselines: dict[str, str]) -> None:
    with (folder / "eval_meta_data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Eval Task", "Task Category", "Random baseline", "Description"])
        writer.writerows([label, "any", percent, 'two\nlines, "quoted"'] for label, percent in baselines.items())
