"""Token ids to logits in `transformers`: the model of nanochat on Ray, with all its parts but smear.

This file is copied into exported folders and needs nothing beside torch and transformers. Load a folder with
`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`. Parameter names and arithmetic are those of
nanochat/model/gpt.py; the tests hold both to the same logits.

Shapes: B rows, T new tokens, S tokens with those of the cache, C width, H heads, G KV heads, D head size.
Not covered: training, gradient checkpointing, static caches, attention weights as output.
"""

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PretrainedConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

VALUE_GATE_CHANNELS = 12
SHORT_WINDOW_MULTIPLE = 128
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What `generate` calls the cache: the first in transformers 5.24, the second in 5.19."""


class NanochatOnRayConfig(PretrainedConfig):
    """The fields of nanochat's ModelConfig under the names that it has there; `windows` is spelled out."""

    model_type = "nanochat_on_ray"
    attribute_map: ClassVar = {
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head", "max_position_embeddings": "sequence_len",
    }  # fmt: skip

    def __init__(
        self, sequence_len: int = 2048, vocab_size: int = 32768, n_layer: int = 12, n_head: int = 6,
        n_kv_head: int = 6, n_embd: int = 768, window_pattern: str = "SSSL", windows: list[int] | None = None,
        value_embeddings: bool = True, residual_scalars: bool = True, backout: bool = True, smear: bool = False,
        rope_theta: float = 100_000.0, qk_gain: float = 1.2, norm_eps: float | None = None,
        logit_softcap: float = 15.0, **others: Any,
    ) -> None:  # fmt: skip
        self.sequence_len, self.vocab_size, self.n_layer = sequence_len, vocab_size, n_layer
        self.n_head, self.n_kv_head, self.n_embd = n_head, n_kv_head, n_embd
        short = -(-sequence_len // 4 // SHORT_WINDOW_MULTIPLE) * SHORT_WINDOW_MULTIPLE
        letters = (window_pattern * n_layer)[: n_layer - 1] + "L"
        self.window_pattern = window_pattern
        self.windows = windows or [short if letter == "S" else sequence_len for letter in letters]
        self.value_embeddings, self.residual_scalars, self.backout = value_embeddings, residual_scalars, backout
        self.smear = smear
        self.rope_theta, self.qk_gain, self.norm_eps, self.logit_softcap = rope_theta, qk_gain, norm_eps, logit_softcap
        self.head_dim = n_embd // n_head
        super().__init__(**{"tie_word_embeddings": False} | others)

    def has_value_embedding(self, layer: int) -> bool:
        """Tell whether a layer has one: every second, the last always."""
        return self.value_embeddings and layer % 2 == (self.n_layer - 1) % 2


def norm(x: Tensor, eps: float | None) -> Tensor:
    """Divide by the root mean square over the last axis; no weights."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def rotate(x_BTHD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """Rotate channel pairs (d, d + D/2) by minus the position's angle: the other sign than most models."""
    first, second = x_BTHD.chunk(2, dim=-1)
    cos, sin = cos_BTD[:, :, None], sin_BTD[:, :, None]
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


class NanochatAttention(nn.Module):
    """Causal attention with normalised queries and keys, a window, and perhaps a value embedding."""

    def __init__(self, config: NanochatOnRayConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.window = config, layer, config.windows[layer]
        kv_channels = config.n_kv_head * config.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, kv_channels, bias=False)
        self.c_v = nn.Linear(config.n_embd, kv_channels, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if config.has_value_embedding(layer):
            self.ve_gate = nn.Linear(VALUE_GATE_CHANNELS, config.n_kv_head, bias=False)

    def forward(
        self, x_BTC: Tensor, value_embedding: Tensor | None, rotation: tuple[Tensor, Tensor], sees_BTS: Tensor,
        past: Cache | None,
    ) -> Tensor:  # fmt: skip
        """Return the attention output; `sees_BTS` is which tokens each may look at, without the layer's window."""
        config = self.config
        B, T = x_BTC.shape[:2]
        q = self._turned(self.c_q(x_BTC).view(B, T, config.n_head, config.head_dim), rotation)
        k = self._turned(self.c_k(x_BTC).view(B, T, config.n_kv_head, config.head_dim), rotation)
        v = self.c_v(x_BTC).view(B, T, config.n_kv_head, config.head_dim)
        if value_embedding is not None:
            gate_BTG = 3 * torch.sigmoid(self.ve_gate(x_BTC[..., :VALUE_GATE_CHANNELS]))
            v = v + gate_BTG[..., None] * value_embedding.view_as(v)
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        if past is not None:
            k, v = past.update(k, v, self.layer)
        S = k.shape[2]
        back = torch.arange(S - T, S, device=k.device)[:, None] - torch.arange(S, device=k.device)
        groups = config.n_head // config.n_kv_head
        y = F.scaled_dot_product_attention(
            q, k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1),
            attn_mask=(sees_BTS & (back <= self.window))[:, None],
        )  # fmt: skip
        return self.c_proj(y.transpose(1, 2).reshape(B, T, config.n_embd))

    def _turned(self, x_BTHD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        return norm(rotate(x_BTHD, *rotation), self.config.norm_eps) * self.config.qk_gain


class NanochatMLP(nn.Module):
    """Two layers with ReLU squared between them."""

    def __init__(self, config: NanochatOnRayConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return the MLP's output."""
        return self.c_proj(F.relu(self.c_fc(x_BTC)).square())


class NanochatBlock(nn.Module):
    """One layer."""

    def __init__(self, config: NanochatOnRayConfig, layer: int) -> None:
        super().__init__()
        self.attn, self.mlp = NanochatAttention(config, layer), NanochatMLP(config)


class NanochatOnRayForCausalLM(PreTrainedModel, GenerationMixin):
    """The model with its head."""

    config_class = NanochatOnRayConfig
    base_model_prefix = "transformer"
    _supports_sdpa = True
    accepts_loss_kwargs = False
    """transformers' Trainer divides the loss by its accumulation steps, since `forward` does not."""
    _no_split_modules: ClassVar = ["NanochatBlock"]

    def __init__(self, config: NanochatOnRayConfig) -> None:
        super().__init__(config)
        if config.smear:
            raise ValueError("smear=True: is not in this model. Use nanochat on Ray, or train with smear off.")
        layers, rows = range(config.n_layer), config.vocab_size
        kv_channels = config.n_kv_head * config.head_dim
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(rows, config.n_embd),
                "h": nn.ModuleList([NanochatBlock(config, layer) for layer in layers]),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, rows, bias=False)
        self.value_embeds = nn.ModuleDict(
            {str(layer): nn.Embedding(rows, kv_channels) for layer in layers if config.has_value_embedding(layer)}
        )
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.transformer["wte"]

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, cache: Cache | None = None, use_cache: bool | None = None,
        labels: Tensor | None = None, logits_to_keep: int | Tensor = 0, **others: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Return float32 logits_BTV under the soft-cap, and the cache; `labels` gives a mean loss of what follows.

        Raises: ValueError if what the blocks compute is asked for.
        """
        if asked := [name for name in ("output_hidden_states", "output_attentions") if others.get(name)]:
            raise ValueError(f"{asked[0]}: this model does not return them. Leave it out.")
        config, T = self.config, input_ids.shape[1]
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        begun = 0 if cache is None else cache.get_seq_length()
        here_T = torch.arange(begun, begun + T, device=input_ids.device)
        sees_BTS = (here_T[:, None] >= torch.arange(begun + T, device=input_ids.device))[None]
        if attention_mask is not None:  # padding on the left; a padded query sees itself, for its sum to be finite
            there_BS = attention_mask[:, : begun + T].bool()
            itself_TS = here_T[:, None] == torch.arange(begun + T, device=input_ids.device)
            sees_BTS = sees_BTS & there_BS[:, None] | itself_TS
            if position_ids is None:
                position_ids = (there_BS.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        if position_ids is None:
            position_ids = here_T[None]
        x = x0 = norm(self.transformer["wte"](input_ids), config.norm_eps)
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=x.device)
        angle_BTD = position_ids[..., None] * config.rope_theta ** (-half / config.head_dim)
        rotation = angle_BTD.cos().to(x.dtype), angle_BTD.sin().to(x.dtype)
        middle = x
        for layer, block in enumerate(cast(list[NanochatBlock], self.transformer["h"])):
            if config.residual_scalars:
                x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            embedding = self.value_embeds[str(layer)](input_ids) if config.has_value_embedding(layer) else None
            x = x + block.attn(norm(x, config.norm_eps), embedding, rotation, sees_BTS, cache)
            x = x + block.mlp(norm(x, config.norm_eps))
            if layer == config.n_layer // 2:
                middle = x
        if config.backout:
            x = x - self.backout_lambda * middle
        hidden = norm(x, config.norm_eps)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden = hidden if isinstance(kept, int) else hidden[:, kept]
        logits = self.lm_head(hidden).float()
        logits = config.logit_softcap * torch.tanh(logits / config.logit_softcap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
