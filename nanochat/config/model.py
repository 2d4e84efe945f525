"""The shape of the model: every size and every optional part, one field each."""

from dataclasses import dataclass, replace
from typing import Any

from nanochat.errors import ConfigError

MAX_LOGIT_SOFTCAP = 60.0  # the loss sums exp(softcap) over the vocabulary in float32
VOCAB_PADDING = 64  # embedding and head rows are padded to a multiple, for tensor cores and even sharding
SHORT_WINDOW_MULTIPLE = 128  # a short window is a quarter of the row, rounded up to FlashAttention's tile


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and parts of `nanochat.model.gpt.GPT`; the defaults are nanochat's architecture."""

    sequence_len: int = 2048
    """Tokens of a training row; the model accepts longer inputs, with windows as for this length."""
    vocab_size: int = 32_768
    """Tokens of the tokenizer; embedding and head have this many rows, rounded up to a multiple of 64."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 6
    """Query heads; n_embd / n_head is the head size."""
    n_kv_head: int = 6
    """Key and value heads; divides n_head."""
    n_embd: int = 768
    """Width of the residual stream."""
    window_pattern: str = "SSSL"
    """Attention reach of the layers, repeated: L = the whole row, S = a quarter; the last layer is always L."""
    value_embeddings: bool = True
    """Add a gated embedding of the token to the values of every second layer."""
    residual_scalars: bool = True
    """Scale the residual stream and mix in the first embedding before each block, by learned scalars."""
    backout: bool = True
    """Subtract the middle layer's output from the last one, by a learned scalar."""
    smear: bool = False
    """Mix the previous token's embedding into each token's, by a learned gate."""
    rope_theta: float = 100_000.0
    """Base of the rotary frequencies."""
    qk_gain: float = 1.2
    """Factor on queries and on keys after their normalisation."""
    norm_eps: float | None = None
    """Epsilon of the RMS norms; none = torch's default for the dtype."""
    logit_softcap: float = 15.0
    """Logits are softcap * tanh(logits / softcap)."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)}: must be at least 1."
            for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
            if getattr(self, name) < 1
        ]
        if not problems:
            if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
                problems.append(f"n_head={self.n_head}: n_embd / n_head must be even. n_embd is {self.n_embd}.")
            if self.n_head % self.n_kv_head:
                problems.append(f"n_kv_head={self.n_kv_head}: must divide n_head. n_head is {self.n_head}.")
            for part, channels in (("value_embeddings", 12), ("smear", 24)):
                if getattr(self, part) and self.n_embd < channels:
                    problems.append(
                        f"n_embd={self.n_embd}: {part} needs at least {channels} channels. Widen the model or drop it."
                    )
        if not 0 < self.logit_softcap <= MAX_LOGIT_SOFTCAP:
            problems.append(f"logit_softcap={self.logit_softcap}: must lie in (0, {MAX_LOGIT_SOFTCAP:g}]. 15 is usual.")
        if not self.rope_theta > 1:
            problems.append(f"rope_theta={self.rope_theta}: must be above 1. 100000 is usual.")
        if not self.window_pattern or set(self.window_pattern) - {"S", "L"}:
            problems.append(f"window_pattern={self.window_pattern!r}: only the letters S and L. For example SSSL.")
        if problems:
            raise ConfigError(" ".join(problems))

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head."""
        return -(-self.vocab_size // VOCAB_PADDING) * VOCAB_PADDING

    @property
    def windows(self) -> list[int]:
        """Keys before itself that a query of each layer sees."""
        short = -(-self.sequence_len // 4 // SHORT_WINDOW_MULTIPLE) * SHORT_WINDOW_MULTIPLE
        reach = {"L": self.sequence_len, "S": short}
        letters = (self.window_pattern * self.n_layer)[: self.n_layer - 1] + "L"
        return [reach[letter] for letter in letters]

    def has_value_embedding(self, layer: int) -> bool:
        """Tell whether a layer has one: every second, the last always."""
        return self.value_embeddings and layer % 2 == (self.n_layer - 1) % 2


STOCK: dict[str, Any] = {
    "window_pattern": "L",
    "value_embeddings": False,
    "residual_scalars": False,
    "backout": False,
    "smear": False,
    "rope_theta": 10_000.0,
    "qk_gain": 1.0,
    "norm_eps": 1e-6,
}
"""What makes a model the one that transformers has as `NanoChatForCausalLM`."""


def stock(config: ModelConfig) -> ModelConfig:
    """Return the config with every part off that `NanoChatForCausalLM` lacks."""
    return replace(config, **STOCK)
