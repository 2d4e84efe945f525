"""The time to a model of GPT-2's grade on 8 H100, on paper: FLOPs, what was measured, what others published.

nanochat's run needed 1.65 h of training (its clock stops for validation and checkpoints). Nothing here has run on 8
GPUs: every assumption is a field of `Assumptions`, to be replaced by what a run measures.
"""

from dataclasses import dataclass

from nanochat.config.pretrain import PretrainConfig
from nanochat.training.cadence import young_daly_s
from nanochat.training.plan import Plan, resolve

NANOCHAT_H = 1.65
"""Depth 24, 8 tokens a parameter, FP8, CORE 0.2626 (GPT-2: 0.2565). Source: its leaderboard, run 6, 2026-03-14."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the estimate rests on; `measured` = by this project, see the README."""

    depth: int = 24
    """As nanochat's run; the same shape and the same tokens are assumed to reach the same score."""
    tokens_per_parameter: float = 8.0
    """As nanochat's run."""
    vocab_size: int = 32_768
    """As nanochat's."""
    gpus: int = 8
    """H100, one worker on each."""
    peak_flops: float = 989e12
    """Dense bf16 of one. Source: NVIDIA's data sheet."""
    mfu_depth_12: float = 0.42
    """Measured: depth 12, one H200 (the H100's peak, more bandwidth), 2026-11-27."""
    mfu_of_depth: float = 50.0 / 41.0
    """Depth 24 on 8 GPUs over depth 12, communication included. Source: nanochat's own, run 1 and dev/LOG.md."""
    fp8_speed: float = 57.8 / 50.0
    """FP8 over bf16. Source: nanochat's run 3, 764,000 tok/s at depth 26, over run 1. Ours has not been measured."""
    ray_speed: float = 1.0
    """Ray Train over a plain process. Measured: 1.00 and 1.01 on CPU."""
    start_s: float = 73.0
    """From the job's start to the end of the first step, nothing compiled before. Measured at depth 4 on 2 cores."""
    copied_bytes_per_s: float = 2.5e9
    """Device to host for a checkpoint. Measured on CPU: 127 MB in 0.05 s; PCIe has more."""
    failures_s: float = 21_600.0
    """Between failures of the node."""


def plan_of(given: Assumptions) -> tuple[PretrainConfig, Plan]:
    """Return the run that is estimated."""
    config = PretrainConfig(depth=given.depth, tokens_per_parameter=given.tokens_per_parameter)
    return config, resolve(config, given.vocab_size, 2048)


def estimate(given: Assumptions) -> dict[str, float]:
    """Return the run's size, its training time in bf16 and FP8, what comes on top, and nanochat's time beside them."""
    config, plan = plan_of(given)
    tokens = plan.num_steps * plan.tokens_per_step
    mfu = given.mfu_depth_12 * given.mfu_of_depth
    rate = given.gpus * given.peak_flops * mfu * given.ray_speed / plan.flops_per_token
    fp8_s = tokens / rate / given.fp8_speed
    validations = plan.num_steps // config.evaluate_every + 1
    validation_s = validations * config.validation_tokens / (3 * rate * given.fp8_speed)  # forward is a third
    parameters = plan.as_json()["parameters"]
    first_worker = 4 * parameters["total"]
    moments = 8 * (parameters["total"] - parameters["matrices"]) + 4 * parameters["matrices"]
    blocked_s = (first_worker + moments / given.gpus) / given.copied_bytes_per_s
    checkpoints_s = fp8_s / young_daly_s(blocked_s, given.failures_s) * blocked_s
    return {
        "tokens": float(tokens),
        "flops": float(tokens * plan.flops_per_token),
        "mfu_bf16": mfu,
        "tokens_per_s_bf16": rate,
        "training_bf16_h": tokens / rate / 3600,
        "training_fp8_h": fp8_s / 3600,
        "nanochat_training_h": NANOCHAT_H,
        "start_s": given.start_s,
        "validation_s": validation_s,
        "checkpoint_blocked_s": blocked_s,
        "checkpoints_s": checkpoints_s,
        "whole_fp8_h": (fp8_s + given.start_s + validation_s + checkpoints_s) / 3600,
    }
