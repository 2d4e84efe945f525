"""The whole line, small: text to a base model, a chat model, a better one, scores, pages, an endpoint. It resumes."""

import os
import sys
import time
from dataclasses import dataclass, replace

import tyro

from nanochat import storage
from nanochat.cluster.environment import set_ray_environment
from nanochat.config.cluster import ClusterConfig
from nanochat.config.corpus import CorpusConfig
from nanochat.config.evaluation import EvaluationConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.replicas import ReplicasConfig
from nanochat.config.rl import RLConfig, RolloutsConfig
from nanochat.config.serving import ServingConfig
from nanochat.config.sft import SftConfig
from nanochat.config.shards import ShardsConfig
from nanochat.config.tokenizer import TokenizerConfig


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What a laptop without a GPU trains in a few minutes."""

    corpus: str = "pydocs"
    """pydocs (inside every Python), or a path, glob or URI of .parquet / .jsonl files."""
    text_column: str = "text"
    """Column or JSON key that holds the document."""
    depth: int = 4
    """The dial; 4 layers train in minutes on two cores."""
    num_steps: int = 360
    """Steps of 4,096 tokens."""
    sft_steps: int = 200
    """Steps of fine-tuning, of 2,048 tokens."""
    rl_steps: int = 12
    """Updates of reinforcement learning, of 128 answers or more."""
    problems: int = 200
    """Problems of each task that the chat model is scored on."""
    identity: str | None = None
    """TOML file that gives the model a character: name, maker, facts, tone; see nanochat/tasks/identity.toml."""
    run_dir: str = "runs/demo"
    """Where everything goes."""
    port: int = 0
    """Port of the chat page; 0 = 8000, or any where that is taken."""


def demo(config: DemoConfig) -> int:
    """Train a tokenizer, a small base model and a chat model on this machine, let it practise, score, show and serve.

    It serves until Ctrl-C; where the variable CI is set, until one answer has come.
    """
    set_ray_environment()
    from nanochat.cluster.terminal import run_job

    log_path = storage.RunFolder(config.run_dir).ray_log
    return run_job(lambda: _run(config), log_path)


def _run(config: DemoConfig) -> None:
    from nanochat.cluster.jobs import evaluate_models, finetune_chat, prepare_data, pretrain_base
    from nanochat.cluster.rl_job import practise, prepare_practice
    from nanochat.cluster.session import session
    from nanochat.cluster.terminal import Terminal
    from nanochat.pages.report import write_report
    from nanochat.pages.walk import write_walk

    start_s = time.monotonic()
    terminal = Terminal()
    cluster = ClusterConfig(num_workers=1, cpus_per_worker=0.5)
    with storage.claimed(config.run_dir), session(cluster, config.run_dir):
        prepare_data(
            config.run_dir, CorpusConfig(corpus=config.corpus, text_column=config.text_column),
            TokenizerConfig(vocab_size=4096), ShardsConfig(sequence_len=512), None, cluster, terminal,
        )  # fmt: skip
        pretrain_base(config.run_dir, demo_pretraining(config), cluster, terminal)
        finetune_chat(config.run_dir, demo_sft(config), cluster, terminal)
        practice = prepare_practice(config.run_dir, demo_rl(config), terminal)
        practise(config.run_dir, practice, RolloutsConfig(), cluster, terminal)
        for evaluation in demo_evaluations(config):
            evaluate_models(config.run_dir, evaluation, cluster, terminal)
    terminal.line(f"report     {write_report(config.run_dir)}")
    terminal.line(f"walk       {write_walk(config.run_dir)}")
    terminal.line(f"done in {(time.monotonic() - start_s) / 60:.1f} minutes; now it is served")
    from nanochat.cluster.endpoint_session import free_or_any, run_endpoint

    serving = ServingConfig(
        run_dir=config.run_dir, models=("rl", "sft", "pretrain"), port=config.port or free_or_any(8000)
    )
    replicas = ReplicasConfig(replica_cpus=1)
    run_endpoint(serving, replicas, cluster, terminal, is_check=bool(os.environ.get("CI")))


def demo_pretraining(config: DemoConfig) -> PretrainConfig:
    """Return the demo's pretraining: small batches, so that few tokens are enough to read like documentation."""
    return PretrainConfig(
        depth=config.depth, head_dim=64, window_pattern="L", global_batch_tokens=4096, num_steps=config.num_steps,
        evaluate_every=180, sample_every=180, checkpoint_every=120, log_every=5,
    )  # fmt: skip


def demo_sft(config: DemoConfig) -> SftConfig:
    """Return the demo's fine-tuning: word problems with the calculator, a character, and spelling.

    Uncompiled: for 400,000 tokens compiling (35 s) costs more than it saves (2 cores, AMD EPYC, 2026-11-25).
    """
    return SftConfig(
        mixture=("arithmetic*0.5", "identity*3", "spelling*0.5"), identity=config.identity, num_steps=config.sft_steps,
        joined=0.2, global_batch_tokens=2048, evaluate_every=0, sample_every=75, checkpoint_every=75, log_every=10,
        chat_problems=16, compile="off",
    )  # fmt: skip


def demo_rl(config: DemoConfig) -> RLConfig:
    """Return the demo's practice: problems of two steps, of which fine-tuning saw one in twenty."""
    from nanochat.cluster.rl_benchmark import word_problems

    return replace(word_problems(config.rl_steps), held_out_problems=config.problems, checkpoint_every=6)


def demo_evaluations(config: DemoConfig) -> list[EvaluationConfig]:
    """Return what is scored: the base model on word problems, the chat models on everything that they were taught."""
    tasks = ("arithmetic", "arithmetic:test_templates", "identity", "spelling")
    return [
        EvaluationConfig(models=("pretrain",), tasks=("arithmetic",), max_per_task=config.problems, max_new_tokens=64),
        EvaluationConfig(
            models=("sft", "rl"), tasks=tasks, max_per_task=config.problems, max_new_tokens=96, identity=config.identity
        ),
    ]


if __name__ == "__main__":
    sys.exit(demo(tyro.cli(DemoConfig)))
