"""The whole line, small: text, tokenizer, shards, a base model, and pages that show them. Run again, it resumes."""

import sys
import time
from dataclasses import dataclass

import tyro

from nanochat import storage
from nanochat.cluster.environment import set_ray_environment
from nanochat.config.cluster import ClusterConfig
from nanochat.config.corpus import CorpusConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.shards import ShardsConfig
from nanochat.config.tokenizer import TokenizerConfig


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What a laptop without a GPU trains in about five minutes."""

    corpus: str = "pydocs"
    """pydocs (inside every Python), or a path, glob or URI of .parquet / .jsonl files."""
    text_column: str = "text"
    """Column or JSON key that holds the document."""
    depth: int = 4
    """The dial; 4 layers train in minutes on two cores."""
    num_steps: int = 360
    """Steps of 4,096 tokens."""
    run_dir: str = "runs/demo"
    """Where everything goes."""


def demo(config: DemoConfig) -> int:
    """Train a tokenizer and a small base model on this machine and show them."""
    set_ray_environment()
    from nanochat.cluster.terminal import run_job

    log_path = storage.RunFolder(config.run_dir).ray_log
    return run_job(lambda: _run(config, log_path), log_path)


def _run(config: DemoConfig, log_path: str) -> None:
    from nanochat.cluster.jobs import prepare_data, pretrain_base, summary
    from nanochat.cluster.session import session
    from nanochat.cluster.terminal import Terminal
    from nanochat.pages.report import write_report
    from nanochat.pages.walk import write_walk

    start_s = time.monotonic()
    terminal = Terminal()
    cluster = ClusterConfig(num_workers=1, cpus_per_worker=0.5)
    with storage.claimed(config.run_dir), session(cluster, log_path):
        prepare_data(
            config.run_dir, CorpusConfig(corpus=config.corpus, text_column=config.text_column),
            TokenizerConfig(vocab_size=4096), ShardsConfig(sequence_len=512), None, terminal,
        )  # fmt: skip
        pretrain_base(config.run_dir, demo_pretraining(config), cluster, terminal)
    storage.write_json(storage.RunFolder(config.run_dir).summary, summary(config.run_dir))
    terminal.line(f"report     {write_report(config.run_dir)}")
    terminal.line(f"walk       {write_walk(config.run_dir)}")
    terminal.line(f"done in {(time.monotonic() - start_s) / 60:.1f} minutes")


def demo_pretraining(config: DemoConfig) -> PretrainConfig:
    """Return the demo's pretraining: small batches, so that few tokens are enough to read like documentation."""
    return PretrainConfig(
        depth=config.depth, head_dim=64, window_pattern="L", global_batch_tokens=4096, num_steps=config.num_steps,
        evaluate_every=90, sample_every=120, checkpoint_every=120, log_every=5,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(demo(tyro.cli(DemoConfig)))
