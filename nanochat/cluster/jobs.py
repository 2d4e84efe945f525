"""The stages as jobs: each takes its configs, a run directory and a terminal, and runs on the current Ray session."""

import time
from typing import Any

from nanochat import storage
from nanochat.cluster.session import ray_context
from nanochat.cluster.terminal import Terminal, on_interrupt
from nanochat.cluster.trainer import pretrain_on_ray
from nanochat.config.cluster import ClusterConfig
from nanochat.config.corpus import CorpusConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.shards import ShardsConfig
from nanochat.config.tokenizer import TokenizerConfig
from nanochat.data.corpora import prepare_corpus
from nanochat.data.token_shards import TokenShards, write_token_shards
from nanochat.data.tokenizer import Tokenizer, compression_report, train_tokenizer
from nanochat.provenance import begin_stage, check_stage
from nanochat.storage import RunFolder, StageFolder
from nanochat.training import plan as planning
from nanochat.training.checkpoint import Checkpoint
from nanochat.training.metrics import progress_line

REMOTE_LOOK_S = 10.0
BYTES_PER_TOKEN = 4.8
"""Text that a token stands for, to plan downloads. Source: nanochat's tokenizer of 32,768 on FineWeb-Edu."""


def prepare_data(
    run_dir: str,
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    shards: ShardsConfig,
    train_tokens: int | None,
    terminal: Terminal,
) -> TokenShards:
    """Fetch the corpus, train the tokenizer and pack token shards; what is there already is kept.

    `train_tokens` says how much a named corpus must provide.
    """
    folder = RunFolder(run_dir)
    run = ray_context(terminal.live)
    configs = {"corpus": corpus, "tokenizer": tokenizer, "shards": shards}
    check_stage(folder.shards, configs)
    text = prepare_corpus(
        corpus, run, folder.text, None if train_tokens is None else int(train_tokens * BYTES_PER_TOKEN)
    )
    begin_stage(folder.shards, configs)  # not before: a mistyped corpus is no identity
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


def pretrain_base(run_dir: str, config: PretrainConfig, cluster: ClusterConfig, terminal: Terminal) -> Checkpoint:
    """Pretrain on the run's shards until the horizon. Resumes by itself.

    Raises: KeyboardInterrupt if it was asked to stop before, after a checkpoint.
    """
    folder = RunFolder(run_dir)
    shards = TokenShards.load(folder.shards)
    tokenizer = Tokenizer.load(folder.tokenizer)
    plan = planning.resolve(config, tokenizer.vocab_size, shards.sequence_len)
    begin_stage(folder.pretrain.root, {"pretrain": config}, plan.as_json() | {"shards": shards.manifest_hash})
    terminal.line(
        f"pretrain   {plan.as_json()['parameters']['total']:,} parameters, {plan.num_steps} steps of "
        f"{plan.tokens_per_step:,} tokens; Ctrl-C leaves with a checkpoint, the same command goes on"
    )
    view = _MetricsView(folder.pretrain, plan.num_steps, terminal)

    def stop() -> None:
        terminal.line("stopping after this step, with a checkpoint; press Ctrl-C again to leave at once")
        with storage.atomic_write(folder.pretrain.stop) as file:
            file.write(b"stop\n")

    with on_interrupt(stop):
        checkpoint = pretrain_on_ray(config, cluster, shards, folder.tokenizer, folder.pretrain, view.update)
    view.update(at_once=True)
    if checkpoint is None:
        terminal.line("stopped; run the same command to go on")
        raise KeyboardInterrupt
    terminal.line(f"base model {checkpoint.folder}, validation {view.val_bpb:.4f} bits per byte")
    return checkpoint


class _MetricsView:
    """Follows metrics.jsonl and shows what is new."""

    def __init__(self, folder: StageFolder, num_steps: int, terminal: Terminal) -> None:
        self.folder, self.num_steps, self.terminal = folder, num_steps, terminal
        self.val_bpb: float | None = None
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
            if any("starts at step" in note for note in new):
                self.terminal.live("           compiling kernels: about a minute, the first time")
            return
        self._seen = size
        records = storage.read_jsonl(self.folder.metrics)
        scores = [record["val_bpb"] for record in records if "val_bpb" in record]
        self.val_bpb = scores[-1] if scores else None
        steps = [record for record in records if "loss" in record]
        if steps:
            self.terminal.live(progress_line(steps[-1], self.num_steps, self.val_bpb))
        elif self.val_bpb is not None:
            self.terminal.live(f"validation {self.val_bpb:.3f} bits per byte before training")


def summary(run_dir: str) -> dict[str, Any]:
    """Return the run's scores, as summary.json has them."""
    scores = [
        record["val_bpb"] for record in storage.read_jsonl(RunFolder(run_dir).pretrain.metrics) if "val_bpb" in record
    ]
    return {"val_bpb": scores[-1] if scores else None}
