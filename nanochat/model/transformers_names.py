"""Our parameters to those of transformers' `NanoChatForCausalLM` and back, for models without the optional parts.

The architectures agree, so a tensor changes its name and nothing else, but for the rows that pad our vocabulary: they
are untrained, and a program that knows nothing of them could sample their ids, so they stay here.
Source: transformers 5, models/nanochat/modeling_nanochat.py.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nanochat.config.model import STOCK, ModelConfig
from nanochat.errors import ConfigError

VOCABULARY_NAMES = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
BLOCK_NAMES = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def name_map(config: ModelConfig) -> dict[str, str]:
    """Return their name of each of our parameters.

    Raises: ConfigError if the model has a part that `NanoChatForCausalLM` lacks.
    """
    different = [f"{name}={getattr(config, name)}" for name in STOCK if not _fits(config, name)]
    if different:
        raise ConfigError(
            f"{', '.join(different)}: NanoChatForCausalLM has no such part. Train with architecture=stock to export."
        )
    blocks = {
        f"transformer.h.{layer}.{ours}.weight": f"model.layers.{layer}.{theirs}.weight"
        for layer in range(config.n_layer)
        for ours, theirs in BLOCK_NAMES.items()
    }
    return VOCABULARY_NAMES | blocks


def to_transformers(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return our state dict under their names, without padding.

    Raises: ConfigError as `name_map`; KeyError if a parameter is missing.
    """
    return {
        theirs: state[ours][: config.vocab_size] if ours in VOCABULARY_NAMES else state[ours]
        for ours, theirs in name_map(config).items()
    }


def from_transformers(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return their state dict under our names, the vocabulary padded with zeros.

    Raises: ConfigError as `name_map`; KeyError if a parameter is missing.
    """
    padding = config.padded_vocab_size - config.vocab_size
    return {
        ours: F.pad(state[theirs], (0, 0, 0, padding)) if ours in VOCABULARY_NAMES else state[theirs]
        for ours, theirs in name_map(config).items()
    }


def transformers_config(config: ModelConfig) -> dict[str, Any]:
    """Return the keyword arguments of `NanoChatConfig` for our config; token ids are the caller's to add."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "hidden_act": "relu2",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "final_logit_softcapping": config.logit_softcap,
        "attention_bias": False,
        "tie_word_embeddings": False,
    }


def is_stock(config: ModelConfig) -> bool:
    """Tell whether a model has no part that `NanoChatForCausalLM` lacks."""
    return all(_fits(config, name) for name in STOCK)


def _fits(config: ModelConfig, name: str) -> bool:
    value = getattr(config, name)
    if name == "window_pattern":
        return set(value) == {"L"}
    if name in ("rope_theta", "norm_eps"):  # fields that their config has as well
        return value is not None
    return value == STOCK[name]
