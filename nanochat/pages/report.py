"""A run directory to report.html: what was trained, its curves and samples, the data, the config and the machine.

Reads only what the stages wrote (metrics.jsonl, samples.jsonl, config.json, manifest.json, report.json), so it can be
made at any moment, also of a run that still goes on or was never started: a part that is not there is said to be
missing.
"""

import dataclasses
import statistics
from typing import Any

from markupsafe import Markup

from nanochat import storage
from nanochat.config.corpus import CorpusConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.rl import RLConfig, RolloutsConfig
from nanochat.config.sft import SftConfig
from nanochat.config.shards import ShardsConfig
from nanochat.config.tokenizer import TokenizerConfig
from nanochat.data.token_shards import MANIFEST
from nanochat.pages.charts import Series, line_chart, smooth
from nanochat.pages.page import write_page
from nanochat.pages.report_chat import chat_values
from nanochat.pages.report_rl import rl_values
from nanochat.storage import RunFolder

CONFIGS: dict[str, type[Any]] = {
    "corpus": CorpusConfig,
    "tokenizer": TokenizerConfig,
    "shards": ShardsConfig,
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "rl": RLConfig,
    "rollouts": RolloutsConfig,
}

Record = dict[str, Any]
USAGE = ("elapsed_s", "waiting_s", "working_s", "idle_s", "cost")
"""Of a stage: time, and how much of it no node worked; time of nodes that worked, and that were only there; dollars."""


def write_report(run_dir: str) -> str:
    """Write the run's report.html from what is there, atomically, and return its path; `run_dir` may be a URI."""
    folder = RunFolder(run_dir)
    records = storage.read_jsonl(folder.pretrain.metrics)
    prepared = _read(storage.join(folder.shards, "config.json"))
    trained = _read(folder.pretrain.config)
    machines = [stage.machine for stage in (folder.pretrain, folder.sft, folder.rl)]
    configs = (prepared, trained, _read(folder.sft.config), _read(folder.rl.config))
    values = {
        "title": storage.name_of(run_dir),
        "model": {"parameters": None, "num_steps": None} | trained.get("resolved", {}),
        "training": training_figures(records),
        "charts": charts(records),
        "samples": storage.read_jsonl(folder.pretrain.samples)[::-1],
        "data": data_figures(_read(storage.join(folder.shards, MANIFEST)), prepared),
        "compression": _read(storage.join(folder.tokenizer, "report.json")),
        "config": [row for config in configs for row in config_rows(config)],
        "machine": machine_rows(trained or prepared, next(filter(None, map(_read, machines)), {})),
        "starts": [record.get("note", "") for record in storage.read_jsonl(folder.pretrain.notes)],
    }
    values |= chat_values(folder) | rl_values(folder) | {"usage": usage_rows(storage.read_jsonl(folder.usage))}
    return write_page(folder.report, "report.html", values)


def usage_rows(records: list[Record]) -> list[Record]:
    """Return what each stage took of the cluster, summed up, then a row for all; none without an account.

    What a stage cost is None if a part of it ran on nodes without a price.
    """
    sums: dict[str, Record] = {}
    for record in records:
        for stage in (record["stage"], "all"):
            row = sums.setdefault(stage, {"stage": stage} | dict.fromkeys(USAGE, 0.0))
            for name in ("elapsed_s", "waiting_s"):
                row[name] += record[name]
            row["cost"] = None if None in (row["cost"], record["cost"]) else row["cost"] + record["cost"]
            for name in ("working_s", "idle_s"):
                row[name] += sum(record[name].values())
    rows = list(sums.values())
    return [row for row in rows if row["stage"] != "all"] + [row for row in rows if row["stage"] == "all"]


def training_figures(records: list[Record]) -> Record:
    """Return the numbers of the header from a stage's metrics; None where there is no record of one.

    Rates are medians over the records but the first, which holds compilation and warm-up.
    """
    steps = [record for record in records if "loss" in record]
    scores = [record["val_bpb"] for record in records if "val_bpb" in record]
    steady = steps[1:] or steps
    return {
        "steps": steps[-1]["step"] + 1 if steps else None,
        "tokens": _last(steps, "tokens"),
        "loss": _last(steps, "loss"),
        "val_bpb": scores[-1] if scores else None,
        "training_s": _last(steps, "training_s"),
        "tokens_per_s": _median(steady, "tokens_per_s"),
        "flops_per_s": _median(steady, "flops_per_s"),
        "mfu": _median(steady, "mfu"),
        "data_wait_share": _median(steady, "data_wait_share"),
        "peak_memory_bytes": max(_column(steps, "peak_memory_bytes"), default=None),
    }


def charts(records: list[Record]) -> list[Markup]:
    """Return the pictures of training, over steps."""
    loss = _points(records, "loss")
    smoothed = list(zip([step for step, _ in loss], smooth([value for _, value in loss]), strict=True))
    return [
        line_chart("Training loss (nats per token)", [Series("raw", loss, "faint"), Series("smoothed", smoothed)]),
        line_chart("Validation (bits per byte)", [Series("validation", _points(records, "val_bpb"), "dotted")]),
        line_chart("Tokens per second", [Series("tokens/s", _points(records, "tokens_per_s"))], from_zero=True),
        line_chart(
            "Waiting for data (share of the time)", [Series("waiting", _points(records, "data_wait_share"))],
            from_zero=True, y_max=0.01, percent=True,
        ),
    ]  # fmt: skip


def data_figures(manifest: Record, config: Record) -> Record | None:
    """Return the corpus's name and one row of figures for each split; None without a manifest."""
    if not manifest:
        return None
    shards = manifest["shards"]
    splits = [
        {"split": split, "files": sum(shard["split"] == split for shard in shards)}
        | totals
        | {"bytes_per_token": totals["text_bytes"] / max(totals["tokens"], 1)}
        for split, totals in manifest["totals"].items()
    ]
    skipped: dict[str, int] = {}
    for shard in shards:
        for reason, count in shard["skipped"].items():
            skipped[reason.replace("_", " ")] = skipped.get(reason.replace("_", " "), 0) + count
    skipped.pop("other split", None)  # these are documents of the other split, not lost ones
    corpus = config.get("config", {}).get("corpus", {}).get("corpus")
    return {
        "corpus": corpus,
        "name": corpus and storage.name_of(corpus),
        "sequence_len": manifest["recipe"]["sequence_len"],
        "vocab_size": manifest["recipe"]["vocab_size"],
        "splits": splits,
        "skipped": {reason: count for reason, count in skipped.items() if count},
    }


def config_rows(config: Record) -> list[tuple[str, Any, bool]]:
    """Return (name, value, whether it is another than the default) of every field of a stage's config.json."""
    rows = []
    for name, fields in config.get("config", {}).items():
        defaults = _defaults(CONFIGS[name]) if name in CONFIGS else {}
        rows += [(f"{name}.{field}", value, value != defaults.get(field, value)) for field, value in fields.items()]
    return rows


def machine_rows(config: Record, machine: Record) -> list[tuple[str, Any]]:
    """Return what made the run: the machine where it was noted, the versions, the commit."""
    rows = list(machine.items())
    rows += [(f"{name} version", version) for name, version in config.get("versions", {}).items()]
    return rows + ([("commit", config["commit"])] if config.get("commit") else [])


def _read(path: str) -> Record:
    return storage.read_json(path) if storage.exists(path) else {}


def _points(records: list[Record], name: str) -> list[tuple[float, float]]:
    return [(record["step"], record[name]) for record in records if record.get(name) is not None]


def _column(records: list[Record], name: str) -> list[Any]:
    return [record[name] for record in records if record.get(name) is not None]


def _last(records: list[Record], name: str) -> Any:
    return next(iter(_column(records, name)[::-1]), None)


def _median(records: list[Record], name: str) -> float | None:
    values = _column(records, name)
    return statistics.median(values) if values else None


def _defaults(config: type[Any]) -> Record:
    return {
        field.name: field.default for field in dataclasses.fields(config) if field.default is not dataclasses.MISSING
    }
