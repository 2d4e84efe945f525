"""A pretraining config to what will be trained: model shape, batch, horizon, learning-rate factors, micro-batch.

Pure functions over numbers; the rules themselves are in nanochat/model/scaling.py.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from nanochat.config.model import ModelConfig, stock
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.rl import RLConfig
from nanochat.config.sft import SftConfig
from nanochat.config.training import LearnerConfig
from nanochat.errors import CheckpointError, ConfigError
from nanochat.model import scaling
from nanochat.training.checkpoint import Checkpoint
from nanochat.training.memory import Memory

MAX_MICRO_BATCH_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 16, "mps": 1 << 14}
"""Larger micro-batches are no faster: measured on CPU (2 cores, 2026-11-22), nanochat's 32 x 2,048 on H100."""
USABLE_MEMORY = 0.8
"""Share of the free memory that the micro-batch may be planned for."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run trains, resolved."""

    model: ModelConfig
    num_steps: int
    rows_per_step: int
    """Rows of the global batch."""
    lr_factor: float
    """What the batch multiplies learning rates by."""
    weight_decay: float
    """Muon's weight decay at the first step."""
    flops_per_token: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.rows_per_step * self.model.sequence_len

    def as_json(self) -> dict[str, Any]:
        """Return the plan for config.json."""
        return asdict(self) | {"parameters": scaling.parameter_counts(self.model)}


def resolve_model(config: PretrainConfig, vocab_size: int, sequence_len: int) -> ModelConfig:
    """Return the model that the dial and its overrides describe."""
    n_embd, n_head = scaling.model_shape(config.depth, config.head_dim)
    if config.n_embd is not None:
        if config.n_embd % config.head_dim:
            raise ConfigError(
                f"n_embd={config.n_embd}: must be a multiple of head_dim={config.head_dim}. Change one of them."
            )
        n_embd, n_head = config.n_embd, config.n_embd // config.head_dim
    model = ModelConfig(
        sequence_len=sequence_len, vocab_size=vocab_size, n_layer=config.depth, n_head=n_head,
        n_kv_head=config.n_kv_head or n_head, n_embd=n_embd,
    )  # fmt: skip
    if config.architecture == "stock":
        model = stock(model)
    given = {
        name: value
        for name in ("window_pattern", "value_embeddings", "residual_scalars", "backout", "smear")
        if (value := getattr(config, name)) is not None
    }
    return replace(model, **given)


def resolve(config: PretrainConfig, vocab_size: int, sequence_len: int) -> Plan:
    """Return the whole plan. Raises: ConfigError if the batch is no whole number of rows."""
    model = resolve_model(config, vocab_size, sequence_len)
    tokens = scaling.horizon_tokens(model, config.tokens_per_parameter)
    at_reference = scaling.reference_tokens(model, config.tokens_per_parameter)
    batch = config.global_batch_tokens or max(scaling.batch_tokens(tokens, at_reference), sequence_len)
    if batch % sequence_len:
        raise ConfigError(
            f"global_batch_tokens={batch}: must be a multiple of the row's {sequence_len} tokens. "
            f"{max(1, batch // sequence_len) * sequence_len} is one."
        )
    lr_batch = config.lr_batch_tokens or batch
    return Plan(
        model=model,
        num_steps=config.num_steps or max(1, tokens // batch),
        rows_per_step=batch // sequence_len,
        lr_factor=scaling.batch_lr_factor(lr_batch),
        weight_decay=scaling.scaled_weight_decay(config.weight_decay, lr_batch, tokens, at_reference),
        flops_per_token=scaling.flops_per_token(model, sequence_len),
    )


def with_budget(
    config: PretrainConfig, vocab_size: int, sequence_len: int, budget: str, amount: float
) -> PretrainConfig:
    """Return the config whose steps spend `tokens` or `flops`, to the nearest step; batch and decay are as for those.

    Raises: ConfigError if it does not buy one step.
    """
    model = resolve_model(config, vocab_size, sequence_len)
    tokens = amount / scaling.flops_per_token(model, sequence_len) if budget == "flops" else amount
    at_reference = scaling.reference_tokens(model, config.tokens_per_parameter)
    batch = config.global_batch_tokens or max(scaling.batch_tokens(max(1, int(tokens)), at_reference), sequence_len)
    if tokens < batch:
        raise ConfigError(
            f"{budget}={amount:g}: buys {tokens:.0f} tokens, not one step of {batch}. "
            "Give more, or a smaller global_batch_tokens."
        )
    decay = config.weight_decay * scaling.horizon_tokens(model, config.tokens_per_parameter) / tokens
    return replace(config, global_batch_tokens=batch, num_steps=round(tokens / batch), weight_decay=decay)


def learning_rates(config: PretrainConfig) -> scaling.LearningRates:
    """Return the learning rates as given, before the batch and the schedule multiply them."""
    return scaling.LearningRates(
        matrix=config.matrix_lr, embedding=config.embedding_lr, unembedding=config.unembedding_lr,
        scalar=config.scalar_lr,
    )  # fmt: skip


def inherited_rates(
    config: SftConfig | RLConfig, base: Checkpoint
) -> tuple[dict[str, Any], scaling.LearningRates, dict[str, Any]]:
    """Return a checkpoint's state, learning rates as given or else as it was trained with, and what was not given.

    Raises: CheckpointError if it does not say how it was trained.
    """
    state = base.state
    if missing := {"rates", "plan", "model", "updates"} - state.keys():
        raise CheckpointError(
            f"base={base.folder}: does not say {', '.join(sorted(missing))}. Train it with this version."
        )
    before = {f"{name}_lr": rate for name, rate in state["rates"].items()}
    inherited = {name: rate for name, rate in before.items() if getattr(config, name) is None}
    rates = {name.removesuffix("_lr"): inherited.get(name, getattr(config, name)) for name in before}
    return state, scaling.LearningRates(**rates), inherited


def micro_batch_rows(
    config: LearnerConfig, model: ModelConfig, memory: Memory, *, rows: int, device: str, free_bytes: int
) -> int:
    """Return how many of a worker's `rows` to run at once: as given, else as free memory allows."""
    if config.micro_batch_rows is not None:
        return min(config.micro_batch_rows, rows)
    most = max(1, min(rows, MAX_MICRO_BATCH_TOKENS[device] // model.sequence_len))
    return next((size for size in range(most, 1, -1) if memory.peak(size) <= USABLE_MEMORY * free_bytes), 1)
