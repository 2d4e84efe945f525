"""How a training loop runs, whatever it trains: precision, memory, and how often it looks up from its work."""

import math
from dataclasses import dataclass
from typing import Literal

from nanochat.config.identity import Identity
from nanochat.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """The knobs of whatever has a model, an optimiser and checkpoints."""

    seed: Identity[int] = 0
    """Seed of initialisation, order and draws."""

    dtype: Identity[Literal["auto", "bfloat16", "float32"]] = "auto"
    """Compute dtype; auto = bfloat16 where the hardware multiplies it, else float32."""
    fp8: Identity[bool] = False
    """Multiply linear layers in FP8 (torchao, Hopper or newer only)."""
    compile: Literal["auto", "off"] = "auto"
    """torch.compile; auto = where a C++ compiler or CUDA is there."""
    micro_batch_rows: int | None = None
    """Rows of one forward and backward pass on a worker; none = from free memory. The global batch stays."""
    recompute: bool = False
    """Recompute activations in the backward pass: a third more time, far less memory."""

    checkpoint_every: int | None = None
    """Steps between checkpoints; 0 = only at the end, none = as many as lose least time, by what the first costs."""
    node_failure_s: float = 21_600.0
    """checkpoint_every none: how long a node runs until it fails, in the mean; of n nodes one fails n times as soon."""
    keep_checkpoints: int = 2
    """Complete checkpoints kept beside the one being written."""
    wandb: bool = False
    """Log to Weights & Biases as well (needs the extra `wandb`; WANDB_MODE=offline works)."""

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ConfigError(" ".join(problems))

    def problems(self) -> list[str]:
        """Return a message for each field whose value breaks its rule."""
        return below_least(self, seed=0, micro_batch_rows=1, checkpoint_every=0, keep_checkpoints=1, node_failure_s=1.0)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(LearnerConfig):
    """The knobs of training on rows of tokens."""

    evaluate_every: int = 250
    """Steps between validations; 0 = only at the end."""
    validation_tokens: Identity[int] = 80 * 2**19
    """Validate on at most this many tokens, the first of the validation split."""
    sample_every: int = 1000
    """Steps between samples; 0 = only at the end."""
    sample_tokens: int = 48
    """New tokens of a sample."""
    log_every: int = 10
    """Steps between records in metrics.jsonl."""
    log_row_ids: bool = False
    """Write the row ids of every step to rows_RR.jsonl, to prove which rows were trained on."""

    def problems(self) -> list[str]:
        """Return a message for each field whose value breaks its rule."""
        return super().problems() + below_least(
            self, evaluate_every=0, validation_tokens=1, sample_every=0, sample_tokens=1, log_every=1
        )  # fmt: skip


def below_least(config: object, **least: float) -> list[str]:
    """Return a message for each named field that is less than it may be; None is left alone."""
    return [
        f"{name}={value}: must be at least {bound}. Leave it out for the default."
        for name, bound in least.items()
        if (value := getattr(config, name)) is not None and value < bound
    ]


def outside_shares(config: object, *names: str) -> list[str]:
    """Return a message for each named field that is not in [0, 1]."""
    return [
        f"{name}={getattr(config, name)}: must lie in [0, 1]. Leave it out for the default."
        for name in names
        if not 0 <= getattr(config, name) <= 1
    ]


def not_rates(config: object, *names: str) -> list[str]:
    """Return a message for each named field that is no finite number from 0 on; None is left alone."""
    return [
        f"{name}={value}: must be a number from 0 on. Leave it out for the default."
        for name in names
        if (value := getattr(config, name)) is not None and not 0 <= value < math.inf
    ]
