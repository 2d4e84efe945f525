"""A run small enough to be made in a moment, by the functions that make real ones; its model is random, not trained."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nanochat import storage
from nanochat.config.corpus import CorpusConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.rl import RLConfig, RolloutsConfig
from nanochat.config.sft import SftConfig
from nanochat.config.shards import ShardsConfig
from nanochat.config.tokenizer import TokenizerConfig
from nanochat.data.corpora import Corpus, SourceShard
from nanochat.data.document_shards import write_token_shards
from nanochat.data.tokenizer import train_tokenizer
from nanochat.model.gpt import GPT
from nanochat.provenance import begin_stage
from nanochat.run_context import RunContext
from nanochat.training import plan as planning
from nanochat.training.checkpoint import CheckpointWriter

HOSTILE = '</p><script>alert(1)</script> " onmouseover="alert(2)" \'><img src=x onerror=alert(3)> &lt;b&gt; '
LONG = HOSTILE + " ".join(f"The {number}. extraordinary sentence says strawberry;\n" for number in range(60))
CONFIG = PretrainConfig(
    depth=2, head_dim=16, n_embd=32, n_kv_head=1, window_pattern="SL", num_steps=10, global_batch_tokens=2 * 192,
    warmup_steps=2, seed=3,
)  # fmt: skip
STEP = 6
METRICS = [
    {"step": 0, "val_bpb": 8.0625},
    *(
        {
            "step": step, "loss": 6.0 - step / 4, "lr_factor": 1.0, "tokens": 384 * (step + 1), "step_s": 0.5,
            "tokens_per_s": 100.0 + step, "flops_per_s": 1e9 * (7 + step), "mfu": None, "data_wait_s": 0.0,
            "data_wait_share": 0.003, "training_s": 30.0 * (step + 1), "peak_memory_bytes": 10**8 * (3 - step % 2),
        }
        for step in range(STEP)
    ),
    {"step": STEP, "val_bpb": 4.4375},
]  # fmt: skip
SAMPLES = [
    {"step": 3, "samples": {"An early prompt": " gave this"}},
    {"step": 6, "samples": {"A prompt <b>": HOSTILE, "Half a pair": " \ud800 and \u202e"}},
]


SFT_METRICS = [
    {"step": 0, "val_bpb": 5.5, "chat_arithmetic": 0.03125},
    {"step": 0, "loss": 3.25},
    {"step": 1, "loss": 1.25},
    {"step": 2, "val_bpb": 0.625, "chat_arithmetic": 0.96875},
]

RL_METRICS = [
    {"step": 0, "held_out_reward": 0.25, "held_out_pass_at_1": 0.25, "held_out_n": 48},
    *(
        {
            "step": step, "loss": -0.1, "entropy": 0.5 - step / 8, "mismatch_kl": step / 1024,
            "reward": 0.25 + step / 8, "completion_tokens": 40.0 + step, "truncated_share": 0.25 - step / 16,
            "zero_variance_share": step / 4, "staleness": step / 4, "staleness_max": float(step > 0),
            "pass_at_1": 0.25 + step / 8, "pass_at_2": 0.5, "pass_at_4": 0.75, "rollout_idle_share": 0.125,
            "rollout_deaths": 0.0, "learner_idle_share": 0.5 - step / 8, "samples": 24 + 4 * step,
            "tokens_per_s": 500.0 + 100 * step, "training_s": 60.0 * (step + 1),
        }
        for step in range(3)
    ),
    {"step": 3, "held_out_reward": 0.75, "held_out_pass_at_1": 0.75, "held_out_n": 48},
]  # fmt: skip


def rollout(which: str, group: int, reward: float, reply: str) -> dict[str, object]:
    return {"which": which, "group": group, "question": f"How many of {group}?", "reply": reply, "reward": reward,
            "tokens": 30 + group, "truncated": which == "worst"}  # fmt: skip


RL_SAMPLES = [
    {"step": 0, "samples": [rollout("best", 1, 1.0, "early yes"), rollout("worst", 1, 0.0, "early no")]},
    {"step": 1, "samples": [rollout("best", 7, 1.0, "later yes"), rollout("worst", 7, 0.125, HOSTILE)]},
    {"step": 2, "samples": [rollout("best", 8, 1.0, "two yes"), rollout("worst", 9, 0.0, "two no")]},
]


def problem(question: str, reply: str, is_right: bool) -> dict[str, object]:
    return {"index": 0, "question": question, "expected": "42", "reply": reply, "is_right": is_right}


def score(accuracy: float, n: int, right: list[dict[str, object]], wrong: list[dict[str, object]]) -> dict[str, object]:
    return {"accuracy": accuracy, "n": n, "stderr": 0.0125, "chance": 0.25, "centered": 0.5, "settings": {},
            "examples": {"right": right, "wrong": wrong}}  # fmt: skip


SCORES = {
    "pretrain": {
        "weights": "a", "checkpoint": "x", "chat_core": None,
        "chat": {"arithmetic": score(0.0125, 80, [], [problem("base?", "mumble", False)])},
    },
    "sft": {
        "weights": "b",
        "checkpoint": "y",
        "chat": {
            "arithmetic": score(0.9375, 80, [problem(f"sum {n}?", f"[{n}+1 = {n + 1}]", True) for n in range(5)],
                                [problem("hard?", HOSTILE, False)]),
            "spelling": score(0.5, 64, [problem("spell?", "s p", True)], [problem("count?", "none", False)]),
        },
        "chat_core": {"title": "ChatCORE on 1 of 6 tasks", "value": 0.3125, "stderr": 0.01},
        "core": {"title": "CORE on 20 of 22 tasks", "value": 0.0625, "stderr": 0.001, "table_version": "1",
                 "tasks": {"boolq": {"accuracy": 0.5625, "n": 32, "stderr": 0.0875, "baseline": 0.62}}},
        "bits_per_byte": 2.0625,
    },
}  # fmt: skip


def write_source(path: Path, texts: list[str], split: str) -> SourceShard:
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)
    return SourceShard(str(path), path.stat().st_size, split)


def write_tiny_run(run_dir: str, elsewhere: Path) -> None:
    """Write a tokenizer, shards, config, metrics, samples, starts, a checkpoint; the text is in a folder `sayings`."""
    source = elsewhere / "sayings"
    source.mkdir()
    shorts = [f"A short document, number {number}." for number in range(40)]
    train = write_source(source / "train.parquet", [*shorts, LONG], "train")
    held_out = write_source(source / "held_out.parquet", [LONG, *shorts], "validation")
    corpus = Corpus("tiny", (train, held_out), "text", 0.1)
    tokenizer_config, shards_config = TokenizerConfig(vocab_size=300), ShardsConfig(sequence_len=192)
    tokenizer = train_tokenizer(tokenizer_config, RunContext(), corpus)
    tokenizer.save(run_dir + "/tokenizer")
    configs = {"corpus": CorpusConfig(corpus=str(source)), "tokenizer": tokenizer_config, "shards": shards_config}
    begin_stage(run_dir + "/shards", configs)
    write_token_shards(shards_config, RunContext(), corpus, tokenizer, run_dir + "/shards")
    write_pretraining(run_dir + "/pretrain", tokenizer.vocab_size)
    write_chat(run_dir)
    write_rl(run_dir)


def write_pretraining(folder: str, vocab_size: int) -> None:
    plan = planning.resolve(CONFIG, vocab_size, 192)
    begin_stage(folder, {"pretrain": CONFIG}, plan.as_json())
    model = GPT(plan.model)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    writer = CheckpointWriter(folder + "/checkpoints", rank=0, world_size=1, keep=1, attempt="first")
    writer.save(STEP, dict(model.named_parameters()), {}, {"plan": plan.as_json(), "model": plan.as_json()["model"]})
    writer.wait()
    for record in METRICS:
        storage.append_jsonl(folder + "/metrics.jsonl", record)
    # A lone surrogate can stand in JSON, though not in UTF-8.
    Path(folder, "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in SAMPLES))
    storage.append_jsonl(folder + "/notes.jsonl", {"note": "a worker group starts at step 4"})


def write_chat(run_dir: str) -> None:
    """Write what fine-tuning and evaluation leave, without their checkpoint."""
    resolved = {"base": "runs/x/step_000006", "num_steps": 2, "rows_per_step": 3, "inherited": {"matrix_lr": 0.0375}}
    begin_stage(run_dir + "/sft", {"sft": SftConfig(mixture=("arithmetic", "identity*2"))}, resolved)
    for record in SFT_METRICS:
        storage.append_jsonl(run_dir + "/sft/metrics.jsonl", record)
    storage.append_jsonl(run_dir + "/sft/samples.jsonl", {"step": 2, "samples": {"Who are you?": HOSTILE}})
    for name, scores in SCORES.items():
        storage.write_json(f"{run_dir}/evaluation/{name}.json", scores)


def write_rl(run_dir: str) -> None:
    """Write what reinforcement learning leaves, without its checkpoint."""
    config = RLConfig(task="arithmetic:two_step", num_steps=3, groups_per_step=6, samples_per_group=4)
    resolved = {"base": "runs/x/step_000002", "num_steps": 3}
    begin_stage(run_dir + "/rl", {"rl": config, "rollouts": RolloutsConfig(running=8)}, resolved)
    for record in RL_METRICS:
        storage.append_jsonl(run_dir + "/rl/metrics.jsonl", record)
    for record in RL_SAMPLES:
        storage.append_jsonl(run_dir + "/rl/samples.jsonl", record)
    storage.append_jsonl(run_dir + "/rl/notes.jsonl", {"note": "a worker group starts at step 0"})
