"""The line for machines that people have, from a laptop to several nodes of eight H100.

Each is a LineConfig that any flag overrides. Sources: `speedrun` is the recipe of nanochat's run of 1.65 hours (depth
24, 8 tokens a parameter, FP8, ClimbMix; dev/LEADERBOARD.md, run 6) with this project's fine-tuning; the two of one GPU
follow from `training/plan.py`: their weights, optimiser and one row fit, the micro-batch from free memory.
"""

from dataclasses import replace

from nanochat.config.cluster import ClusterConfig
from nanochat.config.corpus import CorpusConfig
from nanochat.config.evaluation import EvaluationConfig
from nanochat.config.line import STAGES, LineConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.replicas import ReplicasConfig
from nanochat.config.rl import RLConfig, RolloutsConfig
from nanochat.config.sft import SftConfig
from nanochat.config.shards import ShardsConfig
from nanochat.config.tokenizer import TokenizerConfig

WORD_PROBLEMS = RLConfig(
    task="arithmetic:two_step", held_out="arithmetic:two_step_test", num_steps=12, groups_per_step=16,
    samples_per_group=8, max_new_tokens=96, temperature=0.8, first_lr_factor=0.4, evaluate_every=0,
    held_out_problems=200, sample_every=4, checkpoint_every=6,
)  # fmt: skip
"""Problems of two steps, of which the demo's fine-tuning saw one in twenty."""

DEMO = LineConfig(
    run_dir="runs/demo",
    stages=STAGES,
    corpus=CorpusConfig(corpus="pydocs"),
    tokenizer=TokenizerConfig(vocab_size=4096),
    shards=ShardsConfig(sequence_len=512),
    pretrain=PretrainConfig(  # small batches: few tokens are enough to read like documentation
        depth=4, head_dim=64, window_pattern="L", global_batch_tokens=4096, num_steps=360,
        evaluate_every=180, sample_every=180, checkpoint_every=120, log_every=5,
    ),
    sft=SftConfig(  # uncompiled: for 400,000 tokens compiling (35 s) costs more than it saves (2 cores, 2026-11-25)
        mixture=("arithmetic*0.5", "identity*3", "spelling*0.5"), num_steps=200, joined=0.2, global_batch_tokens=2048,
        evaluate_every=0, sample_every=75, checkpoint_every=75, log_every=10, chat_problems=16, compile="off",
    ),
    rl=WORD_PROBLEMS,
    score_base=EvaluationConfig(tasks=("arithmetic",), max_per_task=200, max_new_tokens=64),
    score_chat=EvaluationConfig(
        tasks=("arithmetic", "arithmetic:test_templates", "identity", "spelling"), max_per_task=200, max_new_tokens=96
    ),
    cluster=ClusterConfig(num_workers=1, cpus_per_worker=0.5),
    replicas=ReplicasConfig(replica_cpus=1),
)  # fmt: skip

CHAT = SftConfig(mixture=("smoltalk", "gsm8k*4", "mmlu*3", "identity*10", "spelling"), malformed="drop")
CHAT_TASKS = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling")

SPEEDRUN = LineConfig(
    run_dir="runs/speedrun",
    stages=("data", "pretrain", "sft", "evaluate"),
    corpus=CorpusConfig(corpus="climbmix"),
    pretrain=PretrainConfig(depth=24, tokens_per_parameter=8.0, fp8=True, evaluate_every=250, sample_every=0),
    sft=CHAT,
    rl=RLConfig(task="gsm8k"),
    score_base=EvaluationConfig(tasks=(), bits_per_byte=True),
    score_chat=EvaluationConfig(tasks=CHAT_TASKS),
    cluster=ClusterConfig(use_gpu=True, num_workers=8),
    rl_workers=2,
    rollouts=RolloutsConfig(actors=6),
)

ONE_GPU = replace(
    SPEEDRUN,
    stages=("data", "pretrain", "sft", "rl", "evaluate"),
    cluster=ClusterConfig(use_gpu=True, num_workers=1),
    rl_workers=None,
    rollouts=RolloutsConfig(),
)

PRESETS: dict[str, tuple[str, LineConfig]] = {
    "demo": ("a laptop without a GPU: minutes; serves at its end", DEMO),
    "1x12gb": (
        "one GPU of 12 GB: depth 8",
        replace(ONE_GPU, run_dir="runs/d8", pretrain=PretrainConfig(depth=8, sample_every=0)),
    ),
    "1x24gb": (
        "one GPU of 24 GB: depth 12",
        replace(ONE_GPU, run_dir="runs/d12", pretrain=PretrainConfig(depth=12, sample_every=0)),
    ),
    "speedrun": (
        "one node of 8 H100: depth 24, GPT-2 grade (--score-base.core BUNDLE scores CORE, which says so)",
        SPEEDRUN,
    ),
    "multinode": (
        "several nodes of 8 H100, each kind of work on its own nodes: depth 26",
        replace(
            SPEEDRUN,
            run_dir="runs/multinode",
            stages=("data", "pretrain", "sft", "rl", "evaluate"),
            pretrain=replace(SPEEDRUN.pretrain, depth=26),
            cluster=ClusterConfig(use_gpu=True, num_workers=16, by_label=True),
            rl_workers=8,
            rollouts=RolloutsConfig(actors=8, timeout_s=1800),  # its node is asked for when rl begins
        ),
    ),
}
