"""A checkpoint and the run that it is of to the README.md of a Hugging Face folder: its model card.

Every number is read from what the stages wrote, up to the checkpoint's step, and from what each stage began from, as
long as that is there with the same weights. What is not there is said to be unknown or not measured. Scores count as
the model's own by the hash of their weights. Every text of a run is escaped as it goes in.

Source: the metadata: huggingface/hub-docs modelcard.md; what a card says: Mitchell et al., 2019, arXiv 1810.03993.
Not covered: a licence of the weights and the languages of the text, which no stage is told.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from nanochat import storage
from nanochat.config.model import ModelConfig
from nanochat.data import corpora
from nanochat.data.token_shards import MANIFEST
from nanochat.errors import ConfigError, excerpt
from nanochat.evaluation.evaluate import score_rows
from nanochat.model.scaling import parameter_counts
from nanochat.pages.page import duration, percent, size
from nanochat.pages.report import data_figures, training_figures, usage_rows
from nanochat.pages.report_chat import read_models
from nanochat.pages.report_rl import rl_figures
from nanochat.storage import RunFolder, StageFolder
from nanochat.tasks import registry
from nanochat.tasks.mixture import parse_part
from nanochat.training.checkpoint import STAGES, Checkpoint, problem_with, step_folder

UNKNOWN = "unknown"
ERRORS = 2.0
"""Standard errors by which a score must be above chance to count as better than a guess."""
LOW = 0.5
"""Centred scores below this are named: on that scale a guess has 0 and knowledge 1."""
PARTS = {
    "value_embeddings": "value embeddings", "residual_scalars": "residual scalars", "backout": "backout",
    "smear": "smear",
}  # fmt: skip
TITLES = {
    "pretrain": Markup("pretraining"), "sft": Markup("fine-tuning"), "rl": Markup("reinforcement learning"),
}  # fmt: skip
_PLACE = re.compile(rf"(?P<run>.+)/(?P<stage>{'|'.join(STAGES)})/checkpoints/step_(?P<step>\d+)")
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
Record = dict[str, Any]


@dataclass(frozen=True)
class TrainedStage:
    """A stage that a checkpoint went through, up to the step that its descendant began from."""

    name: str
    run: RunFolder
    step: int
    origin: str | None = None
    """What it is if it was imported: then its step counts no updates, and its versions made the import."""

    @property
    def folder(self) -> StageFolder:
        """Where the stage wrote."""
        return getattr(self.run, self.name)

    @cached_property
    def config(self) -> Record:
        """What config.json holds, or nothing."""
        return _read(self.folder.config)

    @property
    def resolved(self) -> Record:
        """The values that the stage resolved."""
        return self.config.get("resolved", {})

    @cached_property
    def records(self) -> list[Record]:
        """The metrics of the updates before the step, and of the scores up to it."""
        found = storage.read_jsonl(self.folder.metrics)
        return [record for record in found if record["step"] < self.step + ("loss" not in record)]


def model_card(run_dir: str, checkpoint: Checkpoint, stock: bool) -> str:
    """Return the card of a checkpoint, Markdown under YAML; `stock` says that it became a `NanoChatForCausalLM`.

    Raises: DamagedFileError naming a file of the run that is damaged.
    """
    folder, stages = RunFolder(run_dir), lineage(run_dir, checkpoint)
    config = ModelConfig(**checkpoint.state["model"])
    models = read_models(folder)
    own = {name: found for name, found in models.items() if found["weights"] == checkpoint.weights_sha256}
    runs = {stage.run.root: stage.run for stage in stages}
    trained = [trained_figures(stage) for stage in stages]
    name = "-".join([storage.name_of(folder.root), *(stage.name for stage in stages[-1:])])
    values = {
        "metadata": front_matter(name, checkpoint.is_chat, own),
        "titles": TITLES, "name": name, "stock": stock, "is_chat": checkpoint.is_chat,
        "model": config, "parameters": exported_parameters(config), "parts": parts_of(config),
        "stages": trained, "flops": _sum([stage["flops"] for stage in trained]),
        "sources": [source for stage in stages for source in sources(stage)],
        "sizes": [found for stage in stages if (found := train_split(stage)) is not None],
        "usage": usage_rows([record for run in runs.values() for record in of_lineage(run, stages)]),
        "held_out": held_out(stages),
        "models": list(models), "own": list(own), "scores": score_rows(models), "settings": settings_of(own),
        "weak": weaknesses(own),
    }  # fmt: skip
    return environment().get_template("model_card.md").render(values)


def lineage(run_dir: str, checkpoint: Checkpoint) -> list[TrainedStage]:
    """Return the stages that made a checkpoint, the first one first, as far back as their checkpoints are there.

    A base counts if it has the weights that its stage noted, where it was or in `run_dir`, should that have been moved.
    """
    found: list[TrainedStage] = []
    seen: set[str] = set()
    current: Checkpoint | None = checkpoint
    while current is not None and current.folder not in seen and (place := _PLACE.fullmatch(current.folder)):
        seen.add(current.folder)
        origin = current.state["stage"].get("imported", {}).get("origin")
        found.insert(0, TrainedStage(place["stage"], RunFolder(place["run"]), int(place["step"]), origin))
        current = _base_of(found[0], run_dir)
    return found


def _base_of(stage: TrainedStage, run_dir: str) -> Checkpoint | None:
    place = _PLACE.fullmatch(str(stage.resolved.get("base")))
    if place is None:
        return None
    moved = step_folder(getattr(RunFolder(run_dir), place["stage"]).checkpoints, int(place["step"]))
    for base in map(Checkpoint, (moved, place[0])):  # of a copied run the copy, or what it took would count twice
        try:
            is_whole = problem_with(base.folder, verify=False) is None
        except (ConfigError, OSError):  # an address that cannot be read from here
            continue
        if is_whole and base.weights_sha256 == stage.resolved.get("base_sha256"):
            return base
    return None


def trained_figures(stage: TrainedStage) -> Record:
    """Return what a stage went through: updates, tokens, FLOPs, seconds, validation, machine; None what is unknown.

    Tokens and FLOPs are those of whole rows, padding included; of reinforcement learning those that the learner saw.
    Validation counts if it was at the stage's last step.
    """
    resolved, updates = stage.resolved, [record for record in stage.records if "loss" in record]
    if stage.name == "rl":
        tokens = _sum([record.get("learner_positions") for record in updates])
    else:
        tokens = _product(stage.step, resolved.get("rows_per_step"), resolved.get("model", {}).get("sequence_len"))
    figures = training_figures(updates + [record for record in stage.records if record["step"] == stage.step])
    return {
        "name": stage.name, "origin": stage.origin, "updates": None if stage.origin else stage.step, "tokens": tokens,
        "flops": _product(tokens, resolved.get("flops_per_token")),
        "training_s": figures["training_s"], "val_bpb": figures["val_bpb"],
        "machine": _read(stage.folder.machine), "versions": stage.config.get("versions", {}),
        "commit": stage.config.get("commit"),
    }  # fmt: skip


def sources(stage: TrainedStage) -> list[Record]:
    """Return what a stage was trained on: each source's name, home, licence, and how much of it was gone through.

    Of files of one's own the name is shown and not where they lie.
    """
    config, passes = stage.config.get("config", {}), passes_of(stage)
    if stage.name == "rl":
        task = config.get("rl", {}).get("task")
        samples = rl_figures(stage.records, [])["samples"] or None
        found = {"name": task and _without_path(task), "samples": samples, "licence": registry.licence_of(str(task))}
        rows = [found] if task else []
    elif stage.name == "sft":
        sft = config.get("sft", {})
        rows = [_mixed(text, sft.get("identity"), passes) for text in sft.get("mixture", ())]
    else:
        prepared = _read(storage.join(stage.run.shards, "config.json"))
        corpus = prepared.get("config", {}).get("corpus", {}).get("corpus")
        recipe = corpora.RECIPES.get(corpus)
        home = recipe and recipe.base_url.removesuffix("/resolve/main")
        found = {"home": home, "passes": passes, "licence": corpora.licence_of(str(corpus))}
        rows = [found | {"name": storage.name_of(corpus)}] if corpus else []
    unknown = {"home": None, "passes": None, "share": None, "samples": None, "licence": None}
    return [{"stage": stage.name} | unknown | row for row in rows or [{"name": None}]]


def passes_of(stage: TrainedStage) -> float | None:
    """Return how often a stage went through the rows that it packed; None if that is not known."""
    rows, there = _product(stage.step, stage.resolved.get("rows_per_step")), (train_split(stage) or {}).get("rows")
    return None if rows is None or not there else rows / there


def _mixed(text: str, identity: str | None, passes: float | None) -> Record:
    try:
        part = parse_part(text, identity)
    except ConfigError:  # as another version wrote it
        return {"name": _without_path(text)}
    if part.share is not None:
        amount = {"share": part.share}
    else:
        amount = {"passes": _product(part.epochs, passes)}
    if part.path is not None:
        return {"name": f"{part.task}: {storage.name_of(part.path)}"} | amount
    return {"name": part.task, "licence": registry.licence_of(part.task)} | amount


def _without_path(text: str) -> str:
    return re.sub(r"=.*/", "=", text, flags=re.DOTALL)


def train_split(stage: TrainedStage) -> Record | None:
    """Return the sizes of the training text that a stage packed; None if it packed none, or it is not known."""
    folder = {"pretrain": stage.run.shards, "sft": stage.run.sft_shards}.get(stage.name)
    data = None if folder is None else data_figures(_read(storage.join(folder, MANIFEST)), {})
    splits = [split for split in data["splits"] if split["split"] == "train"] if data else []
    return {"stage": stage.name} | splits[0] if splits else None


def held_out(stages: list[TrainedStage]) -> Record | None:
    """Return what reinforcement learning scored before and after on its held-out problems; None without any."""
    if not stages or stages[-1].name != "rl":
        return None
    config = stages[-1].config.get("config", {}).get("rl", {})
    figures = rl_figures(stages[-1].records, [])
    found = {name: figures[name] for name in ("before", "after") if figures[name] is not None}
    return {"task": _without_path(str(config.get("held_out") or config.get("task"))), "found": found} if found else None


def of_lineage(run: RunFolder, stages: list[TrainedStage]) -> list[Record]:
    """Return what a run's jobs took of the cluster, without the stages that trained other models than a card's."""
    others = set(STAGES) - {stage.name for stage in stages if stage.run.root == run.root}
    return [record for record in storage.read_jsonl(run.usage) if record["stage"] not in others]


def settings_of(models: dict[str, Record]) -> list[Record]:
    """Return the different settings that models were scored with."""
    found: list[Record] = []
    for score in (score for model in models.values() for score in model["chat"].values()):
        if score["settings"] and score["settings"] not in found:
            found.append(score["settings"])
    return found


def weaknesses(models: dict[str, Record]) -> Record:
    """Return the scores that are no better than a guess, within two standard errors, and those that are low."""
    found: Record = {"scored": False, "at_chance": [], "low": []}
    for row in score_rows(models):
        for score in row["values"].values():
            if row["chance"] is None:
                continue
            value, error = score.get("accuracy", score.get("value")), score["stderr"]
            found["scored"] = True
            shown = {"name": row["name"], "chance": row["chance"], "score": score}
            if value - ERRORS * error <= row["chance"]:
                found["at_chance"].append(shown)
            elif value - row["chance"] < LOW * (1 - row["chance"]):
                found["low"].append(shown)
    return found


def front_matter(name: str, is_chat: bool, models: dict[str, Record]) -> Markup:
    """Return the metadata as YAML, with the accuracies of these weights; no licence, since none is stated."""
    scores = {label: score for found in models.values() for label, score in found["chat"].items()}
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"type": excerpt(label), "name": excerpt(label)},
            "metrics": [{
                "type": "accuracy", "name": "accuracy", "value": score["accuracy"],
                "args": {"n": score["n"], "stderr": score["stderr"]},
            }],
        }
        for label, score in scores.items()
    ]  # fmt: skip
    metadata: Record = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nanochat", "nanochat-on-ray", *(["conversational"] if is_chat else [])],
    }
    if results:
        metadata["model-index"] = [{"name": excerpt(name), "results": results}]
    return Markup(yaml.safe_dump(metadata, sort_keys=False, allow_unicode=False))


def exported_parameters(config: ModelConfig) -> int:
    """Return the parameters of an exported model, which lacks the rows that pad the vocabulary."""
    counts = parameter_counts(config)
    rows = sum(counts[kind] for kind in ("embedding", "value_embeddings", "head")) // config.padded_vocab_size
    return counts["total"] - rows * (config.padded_vocab_size - config.vocab_size)


def parts_of(config: ModelConfig) -> list[str]:
    """Return the parts that a model has beyond a plain transformer's."""
    windows = [f"windows {config.window_pattern}"] if set(config.window_pattern) != {"L"} else []
    return [text for part, text in PARTS.items() if getattr(config, part)] + windows


def environment() -> jinja2.Environment:
    """Return the template with its filters: texts are escaped, numbers written out, None is said to be unknown."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("nanochat", "exchange"), autoescape=True, finalize=inert,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    forms: dict[str, Callable[[Any], str]] = {
        "count": "{:,.0f}".format, "flops": "{:.3g}".format, "number": "{:.3g}".format, "decimals": "{:.4f}".format,
        "dollars": "{:.2f} dollars".format, "bytes": size, "percent": percent, "duration": duration,
    }  # fmt: skip
    found.filters |= {name: _known(form) for name, form in forms.items()}
    return found


def inert(value: object) -> Markup:
    """Return a value as Markdown that shows it and does nothing: in one line, every punctuation mark escaped.

    Source: CommonMark 0.31, section 2.4: what a backslash stands before has no meaning, in HTML and tables neither.
    """
    if isinstance(value, Markup):
        return value
    return Markup(UNKNOWN if value is None else _PUNCTUATION.sub(r"\\\1", excerpt(value)))


def _known(form: Callable[[Any], str]) -> Callable[[Any], Markup]:
    return lambda value: Markup(UNKNOWN if value is None else form(value))


def _read(path: str) -> Record:
    return storage.read_json(path) if storage.exists(path) else {}


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _product(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return math.prod(known) if len(known) == len(values) else None
