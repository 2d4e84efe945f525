"""A base model of two steps and conversations of bytes: rows of 160 tokens, 265 words."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_pretraining import tiny_config

from nanochat.config.corpus import CorpusConfig
from nanochat.config.sft import SftConfig
from nanochat.config.shards import ShardsConfig
from nanochat.data.corpora import prepare_corpus
from nanochat.data.document_shards import write_token_shards
from nanochat.data.row_order import RowReader, StepRows
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.run_context import RunContext
from nanochat.storage import StageFolder, read_jsonl
from nanochat.tasks.mixture import MixtureSource, load_mixture
from nanochat.tasks.mixture_shards import write_mixture_shards
from nanochat.training.checkpoint import Checkpoint, newest_checkpoint
from nanochat.training.loop import TrainingInputs, local_stream
from nanochat.training.plan import resolve
from nanochat.training.pretrain import pretrain
from nanochat.training.sft import SftInputs, finetune, resolve_sft

SEQUENCE_LEN = 160
TOKENIZER = Tokenizer([], SPLIT_PATTERNS["nanochat"])


def prepare_base(root: Path) -> Checkpoint:
    """Pretrain two steps on text below a folder."""
    draw = random.Random(0)
    words = ["red", "green", "apple", "pear", "runs", "sleeps", "under", "the", "a", "quick"]
    for number in range(2):
        texts = [" ".join(draw.choices(words, k=100)) for _ in range(20)]
        (root / f"text_{number}.jsonl").write_text("".join('{"text": "' + text + '"}\n' for text in texts))
    run = RunContext()
    corpus = prepare_corpus(CorpusConfig(corpus=str(root / "text_*.jsonl")), run, str(root / "text"), None)
    shards = write_token_shards(ShardsConfig(sequence_len=SEQUENCE_LEN), run, corpus, TOKENIZER, str(root / "shards"))
    config = tiny_config(
        num_steps=2, global_batch_tokens=4 * SEQUENCE_LEN, evaluate_every=0, sample_every=0, checkpoint_every=0
    )
    stream = local_stream(
        RowReader(shards, "train", 0), resolve(config, TOKENIZER.vocab_size, SEQUENCE_LEN).rows_per_step
    )
    checkpoint = pretrain(config, run, TrainingInputs(TOKENIZER, shards, stream, StageFolder(str(root / "pretrain"))))
    assert checkpoint is not None
    return checkpoint


def write_conversations(path: Path, count: int = 80) -> Path:
    """Write questions and answers of different lengths as `messages`."""
    draw = random.Random(1)
    with open(path, "w") as file:
        for number in range(count):
            question, answer = f"{number} " + "x" * draw.randint(1, 40), "y" * draw.randint(1, 40)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@dataclass
class SftRun:
    """Fine-tuning in this process, in one folder."""

    root: Path
    base: Checkpoint
    conversations: Path

    def config(self, **changes: Any) -> SftConfig:
        fields = {
            "mixture": (f"messages={self.conversations}",), "num_steps": 6, "dtype": "float32", "compile": "off",
            "evaluate_every": 3, "sample_every": 3, "checkpoint_every": 2, "sample_tokens": 4, "log_every": 1,
            "micro_batch_rows": 2, "chat_problems": 4, "log_row_ids": True, "keep_checkpoints": 9,
        }  # fmt: skip
        return SftConfig(**(fields | changes))

    def shards(self, config: SftConfig) -> TokenShards:
        source = MixtureSource(config, str(self.root / "tasks"))
        return write_mixture_shards(source, RunContext(), TOKENIZER, SEQUENCE_LEN, str(self.root / "shards"))

    def __call__(self, config: SftConfig, rank: int = 0, world_size: int = 1) -> Checkpoint | None:
        source = MixtureSource(config, str(self.root / "tasks"))
        shards = self.shards(config) if world_size == 1 else TokenShards.load(str(self.root / "shards"))
        folder = StageFolder(str(self.root / "sft"))
        rows = resolve_sft(config, self.base, shards.rows("train")).plan.rows_per_step
        first = newest_checkpoint(folder.checkpoints, lambda why: None) or 0
        mine = slice(rank * rows // world_size, (rank + 1) * rows // world_size)
        stream = (
            StepRows(step.step, step.row_ids[mine], step.rows_BT1[mine])
            for step in local_stream(RowReader(shards, "train", config.seed), rows, first)
        )
        run = RunContext(rank=rank, world_size=world_size, local_world_size=world_size, use_gpu=False)
        held_out = load_mixture(source).held_out
        return finetune(config, run, SftInputs(TOKENIZER, shards, stream, folder, self.base, held_out))

    def records(self) -> list[dict[str, Any]]:
        return read_jsonl(str(self.root / "sft" / "metrics.jsonl"))

    def losses(self) -> dict[int, float]:
        return {record["step"]: record["loss"] for record in self.records() if "loss" in record}


def finetune_as_worker(
    rank: int, world_size: int, folder: str, root: str, base: str, conversations: str
) -> dict[int, float]:
    """Fine-tune as one of several workers; returns the losses that the first one wrote."""
    run = SftRun(Path(root), Checkpoint(base), Path(conversations))
    run(run.config(sample_every=0, checkpoint_every=0), rank, world_size)
    return run.losses()
