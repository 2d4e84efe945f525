"""A tokenizer and token shards of a few sentences, made once: 300 tokens, rows of 32, about 300 training rows."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat import storage
from nanochat.config.corpus import CorpusConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.shards import ShardsConfig
from nanochat.config.tokenizer import TokenizerConfig
from nanochat.data.corpora import prepare_corpus
from nanochat.data.document_shards import write_token_shards
from nanochat.data.row_order import RowReader
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import Tokenizer, train_tokenizer
from nanochat.run_context import RunContext
from nanochat.storage import StageFolder
from nanochat.training import loop
from nanochat.training import pretrain as pretraining
from nanochat.training.checkpoint import Checkpoint, newest_checkpoint
from nanochat.training.plan import resolve

WORDS = ["red", "green", "apple", "pear", "runs", "sleeps", "under", "the", "a", "quick", "caf\u00e9"]


@dataclass(frozen=True)
class Prepared:
    tokenizer: Tokenizer
    shards: TokenShards


@dataclass
class Run:
    """Pretraining in this process, in one folder."""

    prepared: Prepared
    folder: StageFolder
    said: list[str] = field(default_factory=list)
    seconds_left: Callable[[], float | None] = lambda: None

    def inputs(self, config: PretrainConfig, rows_per_step: int) -> loop.TrainingInputs:
        shards = self.prepared.shards
        first = newest_checkpoint(self.folder.checkpoints, self.said.append) or 0
        stream = loop.local_stream(RowReader(shards, "train", config.seed), rows_per_step, first)
        return loop.TrainingInputs(self.prepared.tokenizer, shards, stream, self.folder)

    def __call__(self, config: PretrainConfig) -> Checkpoint | None:
        plan = resolve(config, self.prepared.tokenizer.vocab_size, self.prepared.shards.sequence_len)
        context = RunContext(progress=self.said.append, seconds_left=self.seconds_left)
        return pretraining.pretrain(config, context, self.inputs(config, plan.rows_per_step))


def pretrain_as_worker(
    rank: int, world_size: int, folder: str, tokenizer_folder: str, shards_folder: str, config: PretrainConfig
) -> list[dict[str, Any]]:
    """Pretrain on the CPU as one of several workers, each on its rows of a step; returns the records in the metrics."""
    tokenizer, shards = Tokenizer.load(tokenizer_folder), TokenShards.load(shards_folder)
    rows = resolve(config, tokenizer.vocab_size, shards.sequence_len).rows_per_step
    mine = slice(rank * rows // world_size, (rank + 1) * rows // world_size)
    stream = (
        loop.StepRows(all_rows.step, all_rows.row_ids[mine], all_rows.rows_BT1[mine])
        for all_rows in loop.local_stream(RowReader(shards, "train", config.seed), rows)
    )
    run = RunContext(rank=rank, world_size=world_size, local_world_size=world_size, use_gpu=False)
    inputs = loop.TrainingInputs(tokenizer, shards, stream, StageFolder(folder))
    pretraining.pretrain(config, run, inputs)
    return storage.read_jsonl(inputs.folder.metrics)


def tiny_config(**changes: Any) -> PretrainConfig:
    """Three layers of width 32, eight rows of 32 tokens a step, twelve steps, float32, a short validation."""
    fields = {
        "depth": 3, "head_dim": 16, "n_embd": 32, "global_batch_tokens": 256, "lr_batch_tokens": 2**17, "num_steps": 12,
        "warmup_steps": 2, "dtype": "float32", "compile": "off", "micro_batch_rows": 4, "evaluate_every": 4,
        "sample_every": 3, "checkpoint_every": 3, "sample_tokens": 4, "validation_tokens": 256, "log_every": 1,
        "log_row_ids": True,
    }  # fmt: skip
    return PretrainConfig(**(fields | changes))


def prepare(root: Path) -> Prepared:
    """Write the text, learn the tokenizer and pack the shards below a folder."""
    draw = random.Random(0)
    for number in range(3):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(80)]
        lines = "".join('{"text": "' + text + '"}\n' for text in texts)
        (root / f"text_{number}.jsonl").write_text(lines, encoding="utf-8")
    run = RunContext()
    corpus = prepare_corpus(CorpusConfig(corpus=str(root / "*.jsonl")), run, str(root / "text"), None)
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300), run, corpus)
    return Prepared(
        tokenizer, write_token_shards(ShardsConfig(sequence_len=32), run, corpus, tokenizer, str(root / "s"))
    )
