"""Fine-tuning and scores to the report's parts: curves, answers, a table of models beside chance, right and wrong."""

import itertools
from typing import Any

from markupsafe import Markup

from nanochat import storage
from nanochat.evaluation.evaluate import read_scores, score_rows, scores_path
from nanochat.pages.charts import Series, line_chart, smooth
from nanochat.storage import RunFolder
from nanochat.training.checkpoint import STAGES

SHOWN_PROBLEMS = 3
Record = dict[str, Any]


def chat_values(folder: RunFolder) -> Record:
    """Return what the report's sections on fine-tuning and scores show; empty where a stage has not run."""
    records = storage.read_jsonl(folder.sft.metrics)
    models = read_models(folder)
    return {
        "sft": storage.read_json(folder.sft.config)["resolved"] if storage.exists(folder.sft.config) else None,
        "sft_charts": sft_charts(records) if records else [],
        "answers": storage.read_jsonl(folder.sft.samples)[::-1],
        "models": list(models),
        "scores": score_rows(models),
        "problems": {name: shown_problems(found) for name, found in models.items() if name != "pretrain"},
    }


def read_models(folder: RunFolder) -> dict[str, Record]:
    """Return each model's evaluation/MODEL.json, the stages in order. Raises: DamagedFileError naming the file."""
    root = folder.evaluation.root
    names = [name.removesuffix(".json") for name in storage.list_names(root) if name.endswith(".json")]
    names.sort(key=lambda name: (STAGES.index(name) if name in STAGES else len(STAGES), name))
    return {name: read_scores(scores_path(folder, name)) for name in names}


def shown_problems(found: Record) -> dict[str, list[Record]]:
    """Return three problems that the model got right and three that it got wrong, from as many tasks as there are."""
    shown = {}
    for outcome in ("right", "wrong"):
        columns = [
            [{"task": label} | problem for problem in score["examples"][outcome]]
            for label, score in found["chat"].items()
        ]
        rounds = itertools.chain.from_iterable(itertools.zip_longest(*columns))
        shown[outcome] = [problem for problem in rounds if problem is not None][:SHOWN_PROBLEMS]
    return shown


def sft_charts(records: list[Record]) -> list[Markup]:
    """Return the pictures of fine-tuning, over steps."""
    loss = [(record["step"], record["loss"]) for record in records if "loss" in record]
    smoothed = list(zip([step for step, _ in loss], smooth([value for _, value in loss]), strict=True))
    bits = [(record["step"], record["val_bpb"]) for record in records if "val_bpb" in record]
    charts = [
        line_chart("Loss (nats per token of the assistant)", [Series("raw", loss, "faint"), Series("loss", smoothed)]),
        line_chart("Held-out answers (bits per byte)", [Series("validation", bits, "dotted")]),
    ]
    tasks = dict.fromkeys(name for record in records for name in record if name.startswith("chat_"))
    return charts + [
        line_chart(
            f"Right on held-out {task.removeprefix('chat_')}",
            [Series(task, [(record["step"], record[task]) for record in records if task in record], "dotted")],
            from_zero=True, y_max=1.0, percent=True,
        )
        for task in tasks
    ]  # fmt: skip
