"""Models and tasks to scores: the work cut into items, each scored by whoever has the model, the results joined.

An item is some problems of one task for one model. Its result depends on nothing but itself, so any number of actors,
and any that die on the way, give the same scores. They stay in evaluation/MODEL.json, task by task: a later call adds
to them, as long as it is about the same weights.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from nanochat import storage
from nanochat.config.evaluation import EvaluationConfig
from nanochat.config.training import LearnerConfig
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import CheckpointError, ConfigError, DamagedFileError, refuse_credentials
from nanochat.evaluation import core
from nanochat.evaluation.bits_per_byte import bits_per_byte, count_nats_and_bytes
from nanochat.evaluation.chat import Verdict, judge
from nanochat.evaluation.hf_model import HFScorer, weights_of
from nanochat.evaluation.scoring import GPTScorer, Scorer
from nanochat.evaluation.statistics import centered, mean_of_centered, pass_at_k, standard_error
from nanochat.inference.load import load_model
from nanochat.model.gpt import GPT
from nanochat.provenance import file_identity
from nanochat.run_context import RunContext
from nanochat.storage import RunFolder
from nanochat.tasks.registry import UNSCORED, files_of, load_named
from nanochat.tasks.task import Task
from nanochat.training.checkpoint import Checkpoint
from nanochat.training.hardware import choose_hardware

CHAT_CORE = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling")
"""ChatCORE is the mean of their centred accuracies. Source: karpathy/nanochat chat_eval.py@92d63d4."""
SETTINGS = ("max_per_task", "seed", "dtype", "samples", "temperature", "max_new_tokens")
"""Of a config: kept beside each score, the first three where letters are compared; scores that differ in them are no
mean together."""
PROBLEMS_OF_ITEM = 128
ROWS_OF_BATCH = 16
SHOWN_PROBLEMS = 6


@dataclass(frozen=True)
class Model:
    """One model that is scored."""

    name: str
    """pretrain, sft, rl, or the name of a folder."""
    checkpoint: str | None
    """Its checkpoint folder; None for a `transformers` model."""


@dataclass(frozen=True)
class Item:
    """A piece of work: problems first .. first + count of a task, of CORE, or the validation text."""

    model: str
    kind: str
    """chat, core or bits_per_byte."""
    task: str
    first: int = 0
    count: int = 0

    @property
    def result(self) -> tuple[str, str, str]:
        """Which result it is a part of: a chat task's score, all of CORE, the bits per byte."""
        return self.model, self.kind, self.task if self.kind == "chat" else ""


class Evaluator:
    """Scores items; models, tasks and bundle are loaded when an item first asks for them. It travels without them."""

    def __init__(self, config: EvaluationConfig, run: RunContext, run_dir: str, models: Sequence[Model]) -> None:
        refuse_credentials(**vars(config))
        self.config, self.run, self.folder = config, run, RunFolder(run_dir)
        self.models = {model.name: model for model in models}
        if len(self.models) < len(models):
            raise ConfigError(f"models={' '.join(config.models)}: two have the same name. Score them in two calls.")

    def __reduce__(self) -> tuple[Any, ...]:
        run = replace(self.run, map=map, progress=RunContext().progress, note=RunContext().note)
        return Evaluator, (self.config, run, self.folder.root, list(self.models.values()))

    def __call__(self, item: Item) -> Any:
        """Return the verdicts, outcomes or counts of an item."""
        if item.kind == "bits_per_byte":
            return self._count_bits(item)
        problems = range(item.first, item.first + item.count)
        if item.kind == "core":
            return core.score_examples(self.bundle.tasks[item.task], problems, self.scorer(item.model))
        config = self.config
        return judge(
            self.model(item.model), self.tokenizer, self.tasks[item.task], problems, samples=config.samples,
            max_new_tokens=config.max_new_tokens, seed=config.seed, temperature=config.temperature,
            batch_tokens=config.batch_tokens,
        )  # fmt: skip

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return Tokenizer.load(self.folder.tokenizer)

    @functools.cached_property
    def bundle(self) -> core.Bundle:
        """The tasks of CORE."""
        assert self.config.core is not None, "a bundle was named"
        return core.load_bundle(self.config.core)

    @functools.cached_property
    def tasks(self) -> dict[str, Task]:
        """The tasks by their labels, each the problems that are scored."""
        found = {}
        for text in self.config.tasks:
            label, task = self._task(text)
            if label in found:
                raise ConfigError(f"tasks={text}: {label} is there twice. Score them in two run directories.")
            found[label] = task if self.config.max_per_task is None else task.shuffled(self.config.seed)[
                : self.config.max_per_task
            ]  # fmt: skip
        return found

    def model(self, name: str) -> GPT:
        """Return a model with its weights, loaded once and kept until another is asked for."""
        if getattr(self, "_loaded", (None, None))[0] != name:
            folder = self.models[name].checkpoint
            assert folder is not None, "transformers models are scored on CORE only"
            self._loaded = (name, load_model(Checkpoint(folder), self.tokenizer, self.run, self.config.dtype))
        return self._loaded[1]

    def scorer(self, name: str) -> Scorer:
        """Return what compares a model's options."""
        if self.models[name].checkpoint is None:
            assert self.config.hf is not None, "its folder was named"
            return _hf_scorer(self.config.hf, self.config.batch_tokens, self.run)
        return GPTScorer(self.model(name), self.tokenizer, self.config.batch_tokens)

    def _task(self, text: str) -> tuple[str, Task]:
        name, task = load_named("tasks", text, "test", self.folder.tasks, self.config.task_mirror, self.config.identity)
        if name in UNSCORED:
            raise ConfigError(f"tasks={text}: has no right answers to score. It can be trained on alone.")
        return name if task.split == "test" else f"{name}:{task.split}", task

    @torch.no_grad()
    def _count_bits(self, item: Item) -> list[float]:
        shards, model = TokenShards.load(self.folder.shards), self.model(item.model)
        bytes_V = torch.from_numpy(self.tokenizer.token_bytes()).to(model.lm_head.weight.device)
        batches = shards.validation_batches(
            rows=ROWS_OF_BATCH, limit=shards.rows("validation"), padding=self.tokenizer.bos, rank=item.first,
            world_size=item.count,
        )  # fmt: skip
        checkpoint = self.models[item.model].checkpoint
        assert checkpoint is not None
        masked = Checkpoint(checkpoint).state["document_masking"]
        return count_nats_and_bytes(model, batches, bytes_V, self.tokenizer.bos if masked else None).tolist()


@functools.lru_cache(maxsize=1)
def _hf_scorer(path: str, batch_tokens: int | None, run: RunContext) -> HFScorer:
    return HFScorer(path, batch_tokens, choose_hardware(LearnerConfig(dtype="float32"), run).device)


def items_of(evaluator: Evaluator) -> Iterator[Item]:
    """Yield the work, model by model."""
    config = evaluator.config
    sizes = [("core", label, len(task.rows[: config.max_per_task])) for label, task in
             (evaluator.bundle.tasks if config.core else {}).items()]  # fmt: skip
    for model in evaluator.models.values():
        chat = [("chat", label, len(task)) for label, task in evaluator.tasks.items() if model.checkpoint is not None]
        for kind, label, size in chat + sizes:
            for first in range(0, size, PROBLEMS_OF_ITEM):
                yield Item(model.name, kind, label, first, min(PROBLEMS_OF_ITEM, size - first))
        if config.bits_per_byte and model.checkpoint is not None:
            yield from (Item(model.name, "bits_per_byte", "validation", part, 4) for part in range(4))


def evaluate(evaluator: Evaluator, run: RunContext) -> dict[str, dict[str, Any]]:
    """Score everything and return each model's results, which are in evaluation/MODEL.json as soon as they are there.

    Raises: DamagedFileError, before anything is scored, if such a file is there and damaged.
    """
    kept = {name: _earlier(evaluator, name) for name in evaluator.models}
    asked = _asked(evaluator.config)
    for scores in kept.values():  # what is scored again in another way is complete no more
        scores["complete"] = [one for one in scores.get("complete", []) if not _overlap(one, asked)]
    items = list(items_of(evaluator))
    if not items:
        raise ConfigError("tasks=(): there is nothing to score. Name tasks, a --core bundle, or --bits-per-byte.")
    found: dict[str, list[Any]] = {}
    for number, (item, outcome) in enumerate(zip(items, run.map(evaluator, items), strict=True), start=1):
        found.setdefault(item.task, []).extend(outcome)
        run.progress(f"evaluation {number}/{len(items)}: {item.model}, {item.task}")
        following = items[number] if number < len(items) else None
        if following is None or following.result != item.result:
            kept[item.model] = _keep(evaluator, kept[item.model], item, found)
            found = {}
    for name, scores in kept.items():
        scores["complete"].append(asked)
        storage.write_json(scores_path(evaluator.folder, name), scores)
    return kept


def scored_before(evaluator: Evaluator) -> dict[str, dict[str, Any]] | None:
    """Return each model's results if all that is asked for was scored before, of these weights and files; else None.

    Raises: DamagedFileError as `evaluate`.
    """
    found, asked = {}, _asked(evaluator.config)
    for name, model in evaluator.models.items():
        path = scores_path(evaluator.folder, name)
        if model.checkpoint is None or not storage.exists(path):
            return None
        found[name] = read_scores(path)
        same = found[name]["weights"] == Checkpoint(model.checkpoint).weights_sha256
        if not same or asked not in found[name].get("complete", []):
            return None
    return found


def _overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two configs have a score in common."""
    both = [one[name] and other[name] for name in ("core", "bits_per_byte")]
    return any(both) or bool(set(one["tasks"]) & set(other["tasks"]))


def _asked(config: EvaluationConfig) -> dict[str, Any]:
    """Return what a config asks for, as JSON has it, without who does it, and what is in the files that it names."""
    asked = asdict(replace(config, models=(), actors=None, batch_tokens=None, task_mirror=None))
    files = [file for text in config.tasks for file in files_of(text)]
    files += [file for path in (config.identity, config.core) if path is not None for file in storage.list_files(path)]
    return asked | {"tasks": list(config.tasks), "models": []} | file_identity(files)


def _keep(evaluator: Evaluator, before: dict[str, Any], item: Item, found: dict[str, list[Any]]) -> dict[str, Any]:
    """Add the result that ends with an item, from its outcomes by task, to what a model's file has; return it all."""
    config = evaluator.config
    new: dict[str, Any] = {}
    if item.kind == "core":
        new["core"] = core.core_result(evaluator.bundle, found)
    elif item.kind == "bits_per_byte":
        counts = found[item.task]
        new["bits_per_byte"] = bits_per_byte(sum(counts[0::2]), sum(counts[1::2]))
        if not math.isfinite(new["bits_per_byte"]):
            raise CheckpointError(
                f"bits_per_byte={new['bits_per_byte']}: {item.model} computes no numbers. Its weights are damaged."
            )
    else:
        score = chat_score(evaluator.tasks[item.task], found[item.task], config.samples)
        matter = SETTINGS[:3] if evaluator.tasks[item.task].kind == "choose" else SETTINGS
        score["settings"] = {name: getattr(config, name) for name in matter}
        new["chat"] = before["chat"] | {item.task: score}
        new["chat_core"] = chat_core(new["chat"], score["settings"])
    kept = before | new | {"config": asdict(config)}
    storage.write_json(scores_path(evaluator.folder, item.model), kept)
    return kept


def _earlier(evaluator: Evaluator, name: str) -> dict[str, Any]:
    """Return what evaluation/MODEL.json has of the same weights."""
    path, place = scores_path(evaluator.folder, name), evaluator.models[name].checkpoint
    weights = Checkpoint(place).weights_sha256 if place else weights_of(place := str(evaluator.config.hf))
    model: dict[str, Any] = {"chat": {}, "weights": weights, "checkpoint": place}
    before = read_scores(path) if storage.exists(path) else model
    if before["weights"] != model["weights"]:
        aside = storage.join(evaluator.folder.evaluation.root, "earlier", f"{name}_{before['weights'][:12]}.json")
        storage.write_json(aside, before)
        evaluator.run.note(f"{name}: earlier scores are of other weights ({before['checkpoint']}) and go to {aside}")
        return model
    return before | {"checkpoint": model["checkpoint"]}


def scores_path(folder: RunFolder, name: str) -> str:
    """Return where a model's scores lie."""
    return storage.join(folder.evaluation.root, f"{name}.json")


def read_scores(path: str) -> dict[str, Any]:
    """Read a model's scores. Raises: DamagedFileError if the file is none of ours."""
    found = storage.read_json(path)
    scores = found.get("chat") if isinstance(found, dict) and {"weights", "checkpoint"} <= found.keys() else None
    known = isinstance(scores, dict) and all(
        isinstance(score, dict) and {"settings", "examples"} <= score.keys() for score in scores.values()
    )
    if not known:
        raise DamagedFileError(f"scores={path}: has not what evaluate.py writes. Delete it, or put it back.")
    return found


def chat_score(task: Task, verdicts: Sequence[Verdict], samples: int) -> dict[str, Any]:
    """Return accuracy, n, standard error and centred accuracy, pass@k, and some problems right and wrong."""
    samples = 1 if task.kind == "choose" else samples  # a letter is chosen once
    groups = [verdicts[first : first + samples] for first in range(0, len(verdicts), samples)]
    rights = [sum(verdict.is_right for verdict in group) for group in groups]
    n = len(groups)
    accuracy = sum(rights) / (n * samples)
    by_k = {
        f"pass_at_{k}": sum(pass_at_k(samples, right, k) for right in rights) / n
        for k in (2**power for power in range(samples.bit_length()))
    }
    shown = {
        name: [asdict(one) for one in verdicts if one.is_right == is_right][:SHOWN_PROBLEMS]
        for name, is_right in (("right", True), ("wrong", False))
    }
    return {
        "accuracy": accuracy, "n": n, "stderr": standard_error(accuracy, n), "chance": task.chance,
        "centered": centered(accuracy, task.chance),
    } | (by_k if samples > 1 else {}) | {"examples": shown}  # fmt: skip


def chat_core(scores: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return ChatCORE, the mean centred accuracy of its tasks, named by how many of them are there; None of none.

    Scores of other settings stay out.
    """

    def agrees(other: dict[str, Any]) -> bool:
        return all(settings[name] == other[name] for name in settings.keys() & other.keys())

    there = [scores[task] for task in CHAT_CORE if task in scores and agrees(scores[task]["settings"])]
    if not there:
        return None
    title = "ChatCORE" if len(there) == len(CHAT_CORE) else f"ChatCORE on {len(there)} of {len(CHAT_CORE)} tasks"
    return {"title": title} | mean_of_centered([(score["accuracy"], score["n"], score["chance"]) for score in there])


def score_rows(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each score: its name, what chance gives, and each model's accuracy or value, n and error."""
    rows: dict[str, dict[str, Any]] = {}

    def put(label: str, model: str, value: dict[str, Any], chance: float | None) -> None:
        rows.setdefault(label, {"name": label, "chance": chance, "values": {}})["values"][model] = value

    for model, found in results.items():
        for label, score in found["chat"].items():
            put(label, model, score, score["chance"])
            for name in (name for name in score if name.startswith("pass_at_")):
                put(f"{label} {name.replace('_', ' ')}", model, {"accuracy": score[name], "n": score["n"]}, None)
        if found.get("chat_core"):
            put(found["chat_core"]["title"], model, found["chat_core"], 0.0)
        if "core" in found:
            put(f"{found['core']['title']}, baselines {found['core']['table_version']}", model, found["core"], 0.0)
            for label, score in found["core"]["tasks"].items():
                put(f"CORE {label}", model, score, score["baseline"])
        if "bits_per_byte" in found:
            put("bits per byte", model, {"value": found["bits_per_byte"]}, None)
    return list(rows.values())


def score_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return lines for the terminal: a row for each score, columns for chance and each model."""

    def text(score: dict[str, Any] | None) -> str:
        if score is None:
            return "-"
        form = "{:.1%}" if "accuracy" in score else "{:.4f}"
        error = f" +- {form.format(score['stderr'])}" if "stderr" in score else ""
        count = f" (n={score['n']})" if "n" in score else ""
        return form.format(score.get("accuracy", score.get("value"))) + error + count

    rows = score_rows(results)
    first = max((len(row["name"]) for row in rows), default=0) + 2
    lines = ["".ljust(first) + "chance".ljust(9) + "".join(name.ljust(26) for name in results)]
    for row in rows:
        chance = "-" if row["chance"] is None else f"{row['chance']:.1%}"
        values = "".join(text(row["values"].get(name)).ljust(26) for name in results)
        lines.append(row["name"].ljust(first) + chance.ljust(9) + values)
    return lines
