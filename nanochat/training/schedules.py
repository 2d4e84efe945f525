"""Step number to learning rate, momentum and weight decay: pure functions.

Source: nanochat base_train.py@92d63d4: linear warm-up, constant, linear warm-down; Muon's momentum 0.85 -> 0.97 over
400 steps, then down to 0.90 during the warm-down; Muon's weight decay falls to zero along a cosine.
"""

import math

from nanochat.config.pretrain import PretrainConfig
from nanochat.model.optimizer import StepSchedule

MOMENTUM_WARMUP_STEPS = 400


def schedule_at(config: PretrainConfig, step: int, num_steps: int, weight_decay: float) -> StepSchedule:
    """Return the schedule of update `step` (0-based) of `num_steps`; `weight_decay` is Muon's at the start."""
    return StepSchedule(
        lr_factor=lr_factor(config, step, num_steps),
        muon_momentum=muon_momentum(config, step, num_steps),
        muon_weight_decay=weight_decay * 0.5 * (1 + math.cos(math.pi * step / num_steps)),
    )


def lr_factor(config: PretrainConfig, step: int, num_steps: int) -> float:
    """Return the share of the peak learning rate, in (0, 1]."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    warmdown_steps = round(config.warmdown_fraction * num_steps)
    if step <= num_steps - warmdown_steps:
        return 1.0
    left = (num_steps - step) / warmdown_steps
    return left + (1 - left) * config.final_lr_factor


def muon_momentum(config: PretrainConfig, step: int, num_steps: int) -> float:
    """Return Muon's momentum."""
    if step < MOMENTUM_WARMUP_STEPS:
        share = step / MOMENTUM_WARMUP_STEPS
        return (1 - share) * 0.85 + share * 0.97
    warmdown_steps = round(config.warmdown_fraction * num_steps)
    start = num_steps - warmdown_steps
    if step < start:
        return 0.97
    share = (step - start) / max(warmdown_steps, 1)
    return 0.97 * (1 - share) + 0.90 * share
