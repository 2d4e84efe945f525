"""How a base model is trained: the depth dial and everything that can override it."""

import math
from dataclasses import dataclass
from typing import Literal

from nanochat.config.identity import Identity
from nanochat.config.training import TrainingConfig, below_least, not_rates, outside_shares


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """One dial, `depth`, sets width, heads, batch, learning rates, weight decay and horizon; each can be overridden."""

    depth: Identity[int] = 12
    """Transformer blocks; everything not given below follows from it (nanochat/model/scaling.py)."""
    architecture: Identity[Literal["nanochat", "stock"]] = "nanochat"
    """nanochat = every part on; stock = transformers' NanoChatForCausalLM."""
    head_dim: Identity[int] = 128
    """Channels of a head."""
    n_embd: Identity[int | None] = None
    """Width; none = 64 a layer, in whole heads."""
    n_kv_head: Identity[int | None] = None
    """Key and value heads; none = as many as query heads."""
    window_pattern: Identity[str | None] = None
    """Attention reach of the layers, S = a quarter row, L = the whole; none = SSSL (stock: L)."""
    value_embeddings: Identity[bool | None] = None
    """Value embeddings; none = as the architecture has it."""
    residual_scalars: Identity[bool | None] = None
    """Residual and first-embedding scalars; none = as the architecture has it."""
    backout: Identity[bool | None] = None
    """Subtract the middle layer at the end; none = as the architecture has it."""
    smear: Identity[bool | None] = None
    """Mix in the previous token's embedding; none = off."""
    document_masking: Identity[bool] = False
    """Hide the other documents of a packed row."""

    tokens_per_parameter: Identity[float] = 12.0
    """Horizon: training tokens per matrix and head parameter."""
    num_steps: Identity[int | None] = None
    """Steps; none = from the horizon."""
    global_batch_tokens: Identity[int | None] = None
    """Tokens of a step over all workers; none = from the horizon."""
    matrix_lr: Identity[float] = 0.02
    """Muon's learning rate at the reference batch."""
    embedding_lr: Identity[float] = 0.3
    """AdamW's learning rate of the token embedding at width 768 and the reference batch."""
    unembedding_lr: Identity[float] = 0.008
    """AdamW's learning rate of the head at width 768 and the reference batch."""
    scalar_lr: Identity[float] = 0.5
    """AdamW's learning rate of the scalars at the reference batch."""
    weight_decay: Identity[float] = 0.28
    """Muon's weight decay at the reference batch and horizon."""
    lr_batch_tokens: Identity[int | None] = None
    """Scale learning rates and weight decay as for this batch; none = for the batch used."""
    warmup_steps: Identity[int] = 40
    """Steps of linear warm-up."""
    warmdown_fraction: Identity[float] = 0.65
    """Share of the steps in which the learning rate falls linearly."""
    final_lr_factor: Identity[float] = 0.05
    """The learning rate at the end, as a share of its peak."""

    def problems(self) -> list[str]:
        """Return a message for each field whose value breaks its rule."""
        found = super().problems()
        found += below_least(
            self, depth=1, head_dim=2, n_embd=1, n_kv_head=1, num_steps=1, global_batch_tokens=1, lr_batch_tokens=1,
            warmup_steps=0,
        )  # fmt: skip
        found += outside_shares(self, "warmdown_fraction", "final_lr_factor")
        found += not_rates(self, "matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "weight_decay")
        if not 0 < self.tokens_per_parameter < math.inf:
            found.append(f"tokens_per_parameter={self.tokens_per_parameter}: must be positive. 12 is a good value.")
        return found
