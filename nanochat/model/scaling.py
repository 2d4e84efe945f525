"""The depth dial: one number to width, heads, batch, horizon, learning rates and weight decay. Pure functions.

Everything is tuned at depth 12 and carried to other depths by these rules.
Sources: width, learning rates and horizon: nanochat base_train.py@92d63d4; batch = B_ref (D / D_ref)^0.383:
Power Lines arXiv:2505.13738; learning rate ~ sqrt(batch): arXiv:2205.10287; weight decay from a constant
T_epoch = B / (lr * decay * D): arXiv:2405.13698; Adam's learning rates ~ width^-0.5: arXiv:2203.03466 (muP, weakened).
"""

import math
from dataclasses import dataclass

from nanochat.config.model import ModelConfig
from nanochat.model.optimizer import ParameterGroup

WIDTH_PER_LAYER = 64
REFERENCE_DEPTH = 12
REFERENCE_BATCH_TOKENS = 2**19
REFERENCE_WIDTH = 768
BATCH_EXPONENT = 0.383


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """Learning rates at the reference batch and width 768."""

    matrix: float
    embedding: float
    unembedding: float
    scalar: float


def model_shape(depth: int, head_dim: int) -> tuple[int, int]:
    """Return (n_embd, n_head): 64 channels a layer, rounded up to whole heads."""
    n_head = -(-depth * WIDTH_PER_LAYER // head_dim)
    return n_head * head_dim, n_head


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Return the number of parameters by kind."""
    kv_channels = config.n_kv_head * config.head_dim
    block = 2 * config.n_embd**2 + 2 * config.n_embd * kv_channels + 8 * config.n_embd**2
    with_value = sum(config.has_value_embedding(layer) for layer in range(config.n_layer))
    counts = {
        "embedding": config.padded_vocab_size * config.n_embd,
        "value_embeddings": with_value * config.padded_vocab_size * kv_channels,
        "head": config.padded_vocab_size * config.n_embd,
        "matrices": config.n_layer * block + with_value * 12 * config.n_kv_head,
        "scalars": 2 * config.n_layer * config.residual_scalars + config.backout + 25 * config.smear,
    }
    return counts | {"total": sum(counts.values())}


def scaling_parameters(config: ModelConfig) -> int:
    """Return the parameters that scaling laws count: block matrices and head."""
    counts = parameter_counts(config)
    return counts["matrices"] + counts["head"]


def flops_per_token(config: ModelConfig, sequence_len: int) -> int:
    """Return forward and backward FLOPs of a token: 6 per matrix parameter, 12 per head channel and key seen at most.

    Source: PaLM arXiv:2204.02311, appendix B, with windows.
    """
    attention = sum(12 * config.n_embd * min(window, sequence_len) for window in config.windows)
    return 6 * scaling_parameters(config) + attention


def horizon_tokens(config: ModelConfig, tokens_per_parameter: float) -> int:
    """Return how many tokens to train on."""
    return int(tokens_per_parameter * scaling_parameters(config))


def reference_tokens(config: ModelConfig, tokens_per_parameter: float) -> int:
    """Return the horizon of the depth-12 model with this vocabulary and these parts."""
    from dataclasses import replace

    width, n_head = model_shape(REFERENCE_DEPTH, 128)
    reference = replace(config, n_layer=REFERENCE_DEPTH, n_embd=width, n_head=n_head, n_kv_head=n_head)
    return horizon_tokens(reference, tokens_per_parameter)


def batch_tokens(tokens: int, tokens_at_reference: int) -> int:
    """Return the best batch for a horizon, a power of two."""
    ideal = REFERENCE_BATCH_TOKENS * (tokens / tokens_at_reference) ** BATCH_EXPONENT
    return 2 ** round(math.log2(ideal))


def batch_lr_factor(global_batch_tokens: int) -> float:
    """Return what a batch multiplies learning rates by."""
    return math.sqrt(global_batch_tokens / REFERENCE_BATCH_TOKENS)


def scaled_weight_decay(weight_decay: float, global_batch_tokens: int, tokens: int, tokens_at_reference: int) -> float:
    """Return Muon's weight decay for a batch and horizon."""
    return weight_decay * batch_lr_factor(global_batch_tokens) * tokens_at_reference / tokens


def parameter_groups(
    config: ModelConfig, names: list[str], rates: LearningRates, lr_factor: float
) -> list[ParameterGroup]:
    """Sort parameters into groups with their learning rates; `lr_factor` is the batch's.

    Source: nanochat gpt.py@92d63d4, setup_optimizer.
    """
    adam = lr_factor * (config.n_embd / REFERENCE_WIDTH) ** -0.5
    rules: list[tuple[str, ParameterGroup]] = [
        ("lm_head.", _adamw(rates.unembedding * adam, 0.01, (0.8, 0.96))),
        ("transformer.wte.", _adamw(rates.embedding * adam, 0.001, (0.8, 0.995))),
        ("value_embeds.", _adamw(rates.embedding * adam * 0.5, 0.01, (0.8, 0.995))),
        ("resid_lambdas", _adamw(rates.scalar * lr_factor * 0.01, 0.05, (0.8, 0.95))),
        ("x0_lambdas", _adamw(rates.scalar * lr_factor, 0.0, (0.96, 0.95))),
        ("smear_", _adamw(0.2 * lr_factor, 0.0, (0.8, 0.95))),
        ("backout_", _adamw(0.2 * lr_factor, 0.0, (0.8, 0.95))),
        ("transformer.h.", ParameterGroup(kind="muon", names=(), lr=rates.matrix * lr_factor)),
    ]
    groups = []
    for prefix, rule in rules:
        members = tuple(name for name in names if name.startswith(prefix))
        if members:
            groups.append(
                ParameterGroup(
                    kind=rule.kind, names=members, lr=rule.lr, weight_decay=rule.weight_decay, betas=rule.betas
                )
            )
    return groups


def _adamw(lr: float, weight_decay: float, betas: tuple[float, float]) -> ParameterGroup:
    return ParameterGroup(kind="adamw", names=(), lr=lr, weight_decay=weight_decay, betas=betas)
