"""Token ids to hidden states inside vLLM: the model of nanochat on Ray as a native class of vLLM's.

The arithmetic is that of nanochat/model/gpt.py in the same order, so that both engines say the same: rotation by minus
the position's angle, norms without weights and with torch's own epsilon, queries and keys normalised after the rotation
and times a gain, windows that count the keys before a query (vLLM counts the query, too), the soft-cap in float32.
vLLM loads this package by the entry point `vllm.general_plugins` and calls `register` in each of its processes.

Shapes: N tokens of a step, C width, H heads, G KV heads, D head size, V vocabulary.
Source: the interface: vLLM 0.32, docs/contributing/model and docs/design/plugin_system.
Not covered: smear (vLLM gives a model no token before a chunk), tensor and pipeline parallelism, quantised weights.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from nanochat.exchange.hf_model import ARCHITECTURE, MODEL_TYPE
from nanochat.exchange.modeling_nanochat import VALUE_GATE_CHANNELS, NanochatOnRayConfig, norm, rotate


def register() -> None:
    """Make vLLM and transformers know the architecture; may be called again."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    AutoConfig.register(MODEL_TYPE, NanochatOnRayConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "nanochat.inference.vllm_model:NanochatOnRayForCausalLM")


class NanochatAttention(nn.Module):
    """Queries, keys and values of one layer, into vLLM's attention and its cache."""

    def __init__(self, vllm_config: VllmConfig, config: NanochatOnRayConfig, layer: int, prefix: str) -> None:
        super().__init__()
        self.config = config
        self.qkv_proj = QKVParallelLinear(
            config.n_embd, config.head_dim, config.n_head, config.n_kv_head, bias=False, prefix=f"{prefix}.qkv_proj"
        )
        self.c_proj = ReplicatedLinear(config.n_embd, config.n_embd, bias=False, prefix=f"{prefix}.c_proj")
        if config.has_value_embedding(layer):
            self.ve_gate = nn.Linear(VALUE_GATE_CHANNELS, config.n_kv_head, bias=False)
        seen = config.windows[layer] + 1  # with the query itself
        self.attn = Attention(
            config.n_head, config.head_dim, config.head_dim**-0.5, num_kv_heads=config.n_kv_head,
            cache_config=vllm_config.cache_config, prefix=f"{prefix}.attn",
            per_layer_sliding_window=None if seen >= vllm_config.model_config.max_model_len else seen,
        )  # fmt: skip

    def forward(self, x_NC: Tensor, value_embedding: Tensor | None, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Return the attention output projected back to C channels."""
        config = self.config
        H, G, D = config.n_head, config.n_kv_head, config.head_dim
        qkv, _ = self.qkv_proj(x_NC)
        qk_NHD, v_NGD = qkv.view(-1, H + 2 * G, D).split([H + G, G], dim=1)
        qk_NHD = norm(rotate(qk_NHD[None], *rotation)[0], config.norm_eps) * config.qk_gain
        if value_embedding is not None:
            gate_NG = 3 * torch.sigmoid(self.ve_gate(x_NC[:, :VALUE_GATE_CHANNELS]))
            v_NGD = v_NGD + gate_NG[..., None] * value_embedding.view_as(v_NGD)
        q_NHD, k_NGD = qk_NHD.split([H, G], dim=1)
        y_NC = self.attn(q_NHD.flatten(1), k_NGD.flatten(1), v_NGD.flatten(1))
        return self.c_proj(y_NC)[0]


class NanochatMLP(nn.Module):
    """Two layers with ReLU squared between them."""

    def __init__(self, config: NanochatOnRayConfig, prefix: str) -> None:
        super().__init__()
        self.c_fc = ReplicatedLinear(config.n_embd, 4 * config.n_embd, bias=False, prefix=f"{prefix}.c_fc")
        self.c_proj = ReplicatedLinear(4 * config.n_embd, config.n_embd, bias=False, prefix=f"{prefix}.c_proj")

    def forward(self, x_NC: Tensor) -> Tensor:
        """Return the MLP's output."""
        return self.c_proj(F.relu(self.c_fc(x_NC)[0]).square())[0]


class NanochatBlock(nn.Module):
    """One layer."""

    def __init__(self, vllm_config: VllmConfig, config: NanochatOnRayConfig, layer: int, prefix: str) -> None:
        super().__init__()
        self.attn = NanochatAttention(vllm_config, config, layer, f"{prefix}.attn")
        self.mlp = NanochatMLP(config, f"{prefix}.mlp")


@support_torch_compile
class NanochatModel(nn.Module):
    """All but the head; vLLM compiles it where the platform has a compiler."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: NanochatOnRayConfig = vllm_config.model_config.hf_config
        self.config = config
        layers, kv_channels = range(config.n_layer), config.n_kv_head * config.head_dim
        self.wte = VocabParallelEmbedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(
            [NanochatBlock(vllm_config, config, layer, f"{prefix}.h.{layer}") for layer in layers]
        )  # fmt: skip
        self.value_embeds = nn.ModuleDict(
            {
                str(layer): VocabParallelEmbedding(config.vocab_size, kv_channels)
                for layer in layers
                if config.has_value_embedding(layer)
            }
        )
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Return the final normalised hidden states, hidden_NC."""
        config = self.config
        x = x0 = norm(self.wte(input_ids), config.norm_eps)
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=x.device)
        angle_1ND = (positions[:, None] * config.rope_theta ** (-half / config.head_dim))[None]
        rotation = angle_1ND.cos().to(x.dtype), angle_1ND.sin().to(x.dtype)
        middle = x
        for layer, block in enumerate(cast(list[NanochatBlock], self.h)):
            if config.residual_scalars:
                x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            embedding = self.value_embeds[str(layer)](input_ids) if config.has_value_embedding(layer) else None
            x = x + block.attn(norm(x, config.norm_eps), embedding, rotation)
            x = x + block.mlp(norm(x, config.norm_eps))
            if layer == config.n_layer // 2:
                middle = x
        if config.backout:
            x = x - self.backout_lambda * middle
        return norm(x, config.norm_eps)


class NanochatOnRayForCausalLM(nn.Module):
    """The model with its head, as vLLM loads and calls it."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "transformer.": "model.", "value_embeds.": "model.value_embeds.", "resid_lambdas": "model.resid_lambdas",
            "x0_lambdas": "model.x0_lambdas", "backout_lambda": "model.backout_lambda",
        },
        orig_to_new_stacked={".c_q.": (".qkv_proj.", "q"), ".c_k.": (".qkv_proj.", "k"), ".c_v.": (".qkv_proj.", "v")},
    )  # fmt: skip

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: NanochatOnRayConfig = vllm_config.model_config.hf_config
        parallel = vllm_config.parallel_config
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if (size := getattr(parallel, name)) > 1:
                raise ValueError(f"{name}={size}: must be 1 for {ARCHITECTURE}. Start more replicas instead.")
        if vllm_config.quant_config is not None:
            raise ValueError("quantization: this model has none in vLLM. Leave it out.")
        if config.smear:
            raise ValueError("smear=True: vLLM cannot do it. Serve the model with the native backend.")
        self.config = config
        self.model = NanochatModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(config.vocab_size, config.n_embd, prefix=maybe_prefix(prefix, "lm_head"))
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the token embeddings, which vLLM asks every model for."""
        return self.model.wte(input_ids)

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: object = None, inputs_embeds: object = None
    ) -> Tensor:
        """Return hidden_NC of a step's tokens. Raises: ValueError for embeddings in the place of ids."""
        if inputs_embeds is not None or intermediate_tensors is not None:
            raise ValueError("inputs_embeds: value embeddings need token ids. Send ids.")
        return self.model(input_ids, positions)

    def compute_logits(self, hidden_NC: Tensor) -> Tensor | None:
        """Return float32 logits_NV under the soft-cap."""
        logits_NV = self.logits_processor(self.lm_head, hidden_NC)
        if logits_NV is None:
            return None
        cap = self.config.logit_softcap
        return 2 * cap * torch.sigmoid(logits_NV.float() * (2 / cap)) - cap

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take tensors under the names of nanochat/model/gpt.py; return those that were taken."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
