"""The stages as jobs: each takes its configs, a run directory and a terminal, and runs on the current Ray session."""

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from nanochat import storage
from nanochat.cluster.nodes import training_gpus
from nanochat.cluster.session import actor_map, ray_context, start_ray
from nanochat.cluster.terminal import Terminal, on_interrupt
from nanochat.cluster.trainer import (
    pretrain_worker,
    sft_worker,
    train_on_ray,
)
from nanochat.config.cluster import ClusterConfig
from nanochat.config.corpus import CorpusConfig
from nanochat.config.evaluation import EvaluationConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.sft import SftConfig
from nanochat.config.shards import ShardsConfig
from nanochat.config.tokenizer import TokenizerConfig
from nanochat.data.corpora import prepare_corpus
from nanochat.data.document_shards import write_token_shards
from nanochat.data.token_shards import MANIFEST, TokenShards
from nanochat.data.tokenizer import Tokenizer, compression_report, train_tokenizer
from nanochat.errors import ConfigError
from nanochat.evaluation.evaluate import Evaluator, Model, evaluate, score_table, scored_before
from nanochat.provenance import begin_stage, check_stage, file_identity
from nanochat.run_context import RunContext
from nanochat.storage import RunFolder, StageFolder
from nanochat.tasks.mixture import Mixture, MixtureSource, load_mixture, parse_part, with_absolute_paths
from nanochat.tasks.mixture_shards import write_mixture_shards
from nanochat.tasks.task import Excerpt
from nanochat.training import plan as planning
from nanochat.training.checkpoint import STAGES, Checkpoint, named_checkpoint, problem_with, step_folder, tokenizer_of
from nanochat.training.metrics import held_out_text, progress_line
from nanochat.training.sft import resolve_sft

Record = dict[str, Any]
REMOTE_LOOK_S = 10.0
BYTES_PER_TOKEN = 4.8
"""Text that a token stands for, to plan downloads. Source: nanochat's tokenizer of 32,768 on FineWeb-Edu."""


def prepare_data(
    run_dir: str,
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    shards: ShardsConfig,
    train_tokens: int | None,
    cluster: ClusterConfig,
    terminal: Terminal,
) -> TokenShards:
    """Fetch the corpus, train the tokenizer and pack token shards; what is there already is kept.

    `train_tokens` says how much a named corpus must provide.
    """
    folder = RunFolder(run_dir)
    run = ray_context(terminal.live, cluster)
    configs = {"corpus": corpus, "tokenizer": tokenizer, "shards": shards}
    check_stage(folder.shards, configs)
    text = prepare_corpus(
        corpus, run, folder.text, None if train_tokens is None else int(train_tokens * BYTES_PER_TOKEN)
    )
    begin_stage(folder.shards, configs, {"train_tokens": train_tokens})  # not before: a mistyped corpus is no identity
    terminal.line(f"corpus     {text.name}: {len(text.sources('train'))} training shards")
    report = storage.join(folder.tokenizer, "report.json")
    if storage.exists(storage.join(folder.tokenizer, "tokenizer.json")):
        trained = Tokenizer.load(folder.tokenizer)
    else:
        storage.remove(report)
        trained = train_tokenizer(tokenizer, run, text)
        trained.save(folder.tokenizer)
    if not storage.exists(report):
        storage.write_json(report, compression_report(trained, text))
    terminal.line(f"tokenizer  {trained.vocab_size} tokens, {trained.hash[:12]}")
    packed = write_token_shards(shards, run, text, trained, folder.shards)
    terminal.line(
        f"shards     {packed.rows('train')} training and {packed.rows('validation')} validation rows of "
        f"{packed.sequence_len} tokens"
    )
    return packed


def prepared_before(
    run_dir: str, corpus: CorpusConfig, tokenizer: TokenizerConfig, shards: ShardsConfig, train_tokens: int | None
) -> TokenShards | None:
    """Return the run's token shards if they were made from just this and all files have their size; else None.

    `prepare_data` looks at every byte of corpus and shards, which for a large corpus takes a cluster and minutes.
    """
    folder = RunFolder(run_dir)
    config = storage.join(folder.shards, "config.json")
    if not storage.exists(config) or not storage.exists(storage.join(folder.shards, MANIFEST)):
        return None
    made = storage.read_json(config)
    asked = {name: asdict(one) for name, one in (("corpus", corpus), ("tokenizer", tokenizer), ("shards", shards))}
    if made["config"] != asked or made["resolved"] != {"train_tokens": train_tokens}:
        return None
    packed = TokenShards.load(folder.shards)
    packed.check_tokenizer(Tokenizer.load(folder.tokenizer))
    paths = [(storage.join(folder.shards, shard.name), shard.size_bytes) for shard in packed.shards]
    return packed if all(storage.exists(path) and storage.size_bytes(path) == size for path, size in paths) else None


def pretrain_base(run_dir: str, config: PretrainConfig, cluster: ClusterConfig, terminal: Terminal) -> Checkpoint:
    """Pretrain on the run's shards until the horizon. Resumes by itself.

    Raises: KeyboardInterrupt if it was asked to stop before, after a checkpoint.
    """
    folder = RunFolder(run_dir)
    shards = TokenShards.load(folder.shards)
    tokenizer = Tokenizer.load(folder.tokenizer)
    plan = planning.resolve(config, tokenizer.vocab_size, shards.sequence_len)
    begin_stage(folder.pretrain.root, {"pretrain": config}, plan.as_json() | {"shards": shards.manifest_hash})

    def train(watch: Callable[[], None]) -> Checkpoint | None:
        terminal.line(
            f"pretrain   {plan.as_json()['parameters']['total']:,} parameters, {plan.num_steps} steps of "
            f"{plan.tokens_per_step:,} tokens; Ctrl-C leaves with a checkpoint, the same command goes on"
        )
        return train_on_ray(
            config, plan, cluster, shards, folder.tokenizer, folder.pretrain, watch, pretrain_worker
        )  # fmt: skip

    made_from = {"tokenizer_hash": tokenizer.hash, "manifest_hash": shards.manifest_hash, "stage": {}}
    checkpoint, view = watched(folder.pretrain, plan.num_steps, terminal, train, made_from)
    terminal.line(f"base model {checkpoint.folder}, validation {view.scored['val_bpb']:.4f} bits per byte")
    return checkpoint


def pack_mixture(
    run_dir: str, config: SftConfig, sequence_len: int, cluster: ClusterConfig, terminal: Terminal
) -> tuple[MixtureSource, Mixture, TokenShards]:
    """Load a mixture, downloads included, and pack it with the run's tokenizer; what is packed is looked over alone."""
    folder = RunFolder(run_dir)
    source = MixtureSource(with_absolute_paths(config), folder.tasks)
    check_stage(folder.sft.root, {"sft": source.config}, source.files())
    terminal.live("loading the mixture; what is not here yet is downloaded")
    mixture = load_mixture(source)
    is_packed = storage.exists(storage.join(folder.sft_shards, MANIFEST))  # then it takes no Ray
    run = RunContext(progress=terminal.live) if is_packed else ray_context(terminal.live, cluster)
    tokenizer = Tokenizer.load(folder.tokenizer)
    return source, mixture, write_mixture_shards(source, run, tokenizer, sequence_len, folder.sft_shards)


def finetune_chat(run_dir: str, config: SftConfig, cluster: ClusterConfig, terminal: Terminal) -> Checkpoint:
    """Fine-tune the run's base model on a mixture until the horizon. Resumes by itself.

    Raises: KeyboardInterrupt if it was asked to stop before, after a checkpoint.
    """
    folder = RunFolder(run_dir)
    base = Checkpoint(str(named_model(run_dir, config.base or "pretrain", terminal.line).checkpoint))
    if (of_base := tokenizer_of(run_dir, base.folder)) != folder.tokenizer:
        Tokenizer.load(of_base).save(folder.tokenizer)
        terminal.line(f"tokenizer  the base model's, from {of_base}")
    tokenizer = Tokenizer.load(folder.tokenizer)
    source, mixture, shards = pack_mixture(run_dir, config, base.state["model"]["sequence_len"], cluster, terminal)
    config = source.config
    sft = resolve_sft(config, base, shards.rows("train"))
    left_out = {
        "longer than a row": sum(shard.skipped["longer_than_a_row"] for shard in shards.shards),
        "asking what is held out": mixture.left_out,
    } | {f"malformed ({reason})": count for reason, count in mixture.dropped().items()}
    resolved = sft.plan.as_json() | {
        "inherited": sft.inherited, "base": base.folder, "base_sha256": base.weights_sha256, "left_out": left_out,
        "shards": shards.manifest_hash,
    }  # fmt: skip
    begin_stage(folder.sft.root, {"sft": config}, resolved, source.files())
    terminal.line(f"mixture    {', '.join(f'{count:,} {name}' for name, count in mixture.counts().items())}")
    if some := [f"{count:,} {reason}" for reason, count in left_out.items() if count]:
        terminal.line(f"           left out: {', '.join(some)}")
    if (rows := shards.rows("train")) < sft.plan.rows_per_step:
        terminal.line(
            f"           fewer rows than a step has: each step sees them {sft.plan.rows_per_step / rows:.1f} times. "
            "--global-batch-tokens makes steps smaller."
        )
    source = "by size    " if "imported" in base.state["stage"] else "inherited  "  # an import has no rates
    terminal.line(source + ", ".join(f"{name} {value:g}" for name, value in sft.inherited.items()))

    def train(watch: Callable[[], None]) -> Checkpoint | None:
        terminal.line(
            f"sft        from {base.folder}: {sft.plan.num_steps} steps of {sft.plan.tokens_per_step:,} tokens, "
            f"{shards.rows('train')} rows; Ctrl-C leaves with a checkpoint, the same command goes on"
        )
        held_out = [Excerpt(task, max(1, config.chat_problems)) for task in mixture.held_out]
        worker = functools.partial(sft_worker, held_out, base)
        return train_on_ray(config, sft.plan, cluster, shards, folder.tokenizer, folder.sft, watch, worker)

    made_from = {
        "tokenizer_hash": tokenizer.hash, "manifest_hash": shards.manifest_hash,
        "stage": {"base_sha256": base.weights_sha256},
    }  # fmt: skip
    checkpoint, view = watched(folder.sft, sft.plan.num_steps, terminal, train, made_from)
    terminal.line(f"chat model {checkpoint.folder}, validation {view.scored['val_bpb']:.4f} bits per byte of answers")
    return checkpoint


def evaluate_models(
    run_dir: str, config: EvaluationConfig, cluster: ClusterConfig, terminal: Terminal
) -> dict[str, dict[str, Any]]:
    """Score models on actors, show a table and write summary.json; returns each model's results.

    Any number of actors gives the same.
    """
    config = replace(config, models=config.models or (() if config.hf else chat_models(run_dir)))
    models = [named_model(run_dir, name, terminal.line) for name in config.models]
    for model in models:
        terminal.line(f"model      {model.name}: {model.checkpoint}")
    if config.identity is None and {"sft", "rl"} & set(config.models) and (character := trained_character(run_dir)):
        config = replace(config, identity=character)
        terminal.line(f"identity   the character that was trained: {character}")
    if config.hf is not None:
        models.append(Model(f"hf_{storage.name_of(config.hf.rstrip('/'))}", None))
    evaluator = Evaluator(config, RunContext(note=terminal.line), run_dir, models)
    results = scored_before(evaluator)
    if results is None:
        start_ray()
        gpus, use_gpu = training_gpus(cluster)
        actors = config.actors or ((gpus or cluster.num_workers or 1) if use_gpu else 1)
        run = RunContext(
            use_gpu=use_gpu, local_world_size=actors, progress=terminal.live, note=terminal.line,
            map=actor_map(actors, 1.0 if use_gpu else 0.0, cluster, terminal.line),
        )  # fmt: skip
        results = evaluate(Evaluator(config, run, run_dir, models), run)
    else:
        terminal.line(f"scored     before; without {RunFolder(run_dir).evaluation.root}/MODEL.json it is done again")
    storage.write_json(RunFolder(run_dir).summary, summary(run_dir))
    for line in score_table(results):
        terminal.line(line)
    return results


def chat_models(run_dir: str) -> tuple[str, ...]:
    """Return the run directory's chat models: before reinforcement learning, wherever that began, and after."""
    folder = RunFolder(run_dir)
    if not storage.exists(folder.rl.checkpoints):
        return ("sft",)
    is_here = storage.exists(folder.sft.checkpoints)
    return ("sft" if is_here else storage.read_json(folder.rl.config)["resolved"]["base"], "rl")


def trained_character(run_dir: str) -> str | None:
    """Return the file of the character that the run's fine-tuning had, None for nanochat's own.

    Raises: ConfigError if it has changed since.
    """
    if not storage.exists(path := RunFolder(run_dir).sft.config):
        return None
    stage = storage.read_json(path)
    parts = (parse_part(text, stage["config"]["sft"]["identity"]) for text in stage["config"]["sft"]["mixture"])
    character = next((part.path for part in parts if part.task == "identity"), None)
    if character is not None and file_identity([character]).items() - stage["identity"].items():
        raise ConfigError(
            f"identity={character}: is not what was trained any more. Put it back, or name a file with --identity."
        )
    return character


def named_model(run_dir: str, name: str, note: Callable[[str], None]) -> Model:
    """Return the newest checkpoint of a stage, or the checkpoint folder of that path; `note` hears of damaged ones."""
    folder = named_checkpoint(run_dir, name, note).folder
    is_stage = name in STAGES
    return Model(name if is_stage else "_".join(p for p in folder.split("/")[-4:] if p != "checkpoints"), folder)


def watched(
    folder: StageFolder,
    num_steps: int,
    terminal: Terminal,
    train: Callable[[Callable[[], None]], Checkpoint | None],
    made_from: Record,
    score: str = "val_bpb",
    line: Callable[[Record, int, Record], str] = progress_line,
) -> tuple[Checkpoint, "_MetricsView"]:
    """Train while the terminal follows; Ctrl-C stops with a checkpoint, which raises KeyboardInterrupt here.

    So it does where it came too late to stop before the end: what would come next is not begun.
    Nothing is started if the last checkpoint is whole and scored, and its state says that it was `made_from` the same.
    """
    view = _MetricsView(folder, num_steps, terminal, score, line)
    last = step_folder(folder.checkpoints, num_steps)
    if view.scored.get("step") == num_steps and problem_with(last) is None:
        checkpoint = Checkpoint(last)
        if made_from.items() <= checkpoint.state.items():
            view.update(at_once=True)
            return checkpoint, view

    is_asked = False

    def stop() -> None:
        nonlocal is_asked
        is_asked = True
        terminal.line("stopping after this step, with a checkpoint; press Ctrl-C again to leave at once")
        with storage.atomic_write(folder.stop) as file:
            file.write(b"stop\n")

    terminal.live("starting workers")
    with on_interrupt(stop):
        checkpoint = train(view.update)
    view.update(at_once=True)
    if checkpoint is None or is_asked:
        terminal.line("stopped; run the same command to go on")
        raise KeyboardInterrupt
    return checkpoint, view


class _MetricsView:
    """Follows metrics.jsonl and shows what is new."""

    def __init__(
        self,
        folder: StageFolder,
        num_steps: int,
        terminal: Terminal,
        of_score: str,
        line: Callable[[Record, int, Record], str],
    ) -> None:
        self.folder, self.num_steps, self.terminal = folder, num_steps, terminal
        self.of_score, self.line = of_score, line
        records = storage.read_jsonl(folder.metrics)
        self.scored = self._newest_scored(records)
        """The newest record with a score, {} = none."""
        self._seen = storage.size_bytes(folder.metrics) if storage.exists(folder.metrics) else 0
        self._notes = len(storage.read_jsonl(folder.notes))
        self._looked_s = 0.0

    def update(self, at_once: bool = False) -> None:
        """Show new notes and the newest record; a folder in an object store is looked at every ten seconds."""
        often = at_once or storage.is_local(self.folder.root)
        if not often and time.monotonic() - self._looked_s < REMOTE_LOOK_S:
            return
        self._looked_s = time.monotonic()
        notes = [record["note"] for record in storage.read_jsonl(self.folder.notes)]
        new, self._notes = notes[self._notes :], len(notes)
        for note in new:
            self.terminal.line(f"           {note}")
        size = storage.size_bytes(self.folder.metrics) if storage.exists(self.folder.metrics) else 0
        if size == self._seen and not at_once:
            if any("starts at step" in note for note in new) and self.of_score == "val_bpb":
                self.terminal.live("           validation, then steps; where kernels are compiled, about a minute once")
            return
        self._seen = size
        records = storage.read_jsonl(self.folder.metrics)
        self.scored = self._newest_scored(records)
        steps = [record for record in records if "loss" in record]
        if steps:
            self.terminal.live(self.line(steps[-1], self.num_steps, self.scored))
        elif self.scored:
            bits = self.scored.get("val_bpb")
            shown = f"held out {held_out_text(self.scored)}" if bits is None else f"validation {bits:.3f} bits per byte"
            self.terminal.live(f"{shown} before training")

    def _newest_scored(self, records: list[Record]) -> Record:
        return next((record for record in reversed(records) if self.of_score in record), {})


def summary(run_dir: str) -> dict[str, Any]:
    """Return the run's scores, as summary.json has them."""
    folder = RunFolder(run_dir)
    bits = [record["val_bpb"] for record in storage.read_jsonl(folder.pretrain.metrics) if "val_bpb" in record]
    found: dict[str, Any] = {"val_bpb": bits[-1] if bits else None}
    scores = [record for record in storage.read_jsonl(folder.rl.metrics) if "held_out_n" in record]
    if scores and scores[-1]["step"] > 0:
        for when, record in (("before", scores[0]), ("after", scores[-1])):
            found[f"rl_pass1_{when}"] = {"accuracy": record["held_out_pass_at_1"], "n": record["held_out_n"]}
    for model, label in (("pretrain", "base"), ("sft", "sft"), ("rl", "rl")):
        path = storage.join(folder.evaluation.root, f"{model}.json")
        for task, score in (storage.read_json(path)["chat"] if storage.exists(path) else {}).items():
            found[f"{task}_{label}"] = {"accuracy": score["accuracy"], "n": score["n"]}
    return found
