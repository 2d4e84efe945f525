"""Token ids to hidden states and logits: the transformer of nanochat.

A pre-norm decoder with rotary positions, normalised queries and keys, ReLU squared, no biases, norms without weights,
and an untied head under a soft-cap. Around that stand five parts, each a field of ModelConfig, built only if on:
value embeddings, residual scalars, backout, sliding windows, smear. All off, it is transformers' `NanoChatForCausalLM`.
Parameters are float32 and are cast to `compute_dtype` where they are used; no autocast.

Shapes: B rows, T positions, C = n_embd, H heads, G KV heads, D head size, V padded vocabulary.
Sources: karpathy/nanochat gpt.py@92d63d4 (names and architecture); RoPE arXiv:2104.09864; QK-norm arXiv:2010.04245;
ReLU^2 arXiv:2109.08668; value embeddings arXiv:2410.17897; scalars, backout and smear: KellerJordan/modded-nanogpt.
Not covered: mixture of experts, dropout, tensor parallelism.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochat.config.model import ModelConfig
from nanochat.model.attention import Documents, attention, find_documents
from nanochat.model.loss import exp_and_slope, head_loss, token_losses

VALUE_GATE_CHANNELS = 12
SMEAR_GATE_CHANNELS = 24
PACKED_ROWS = 8
"""Rows that packed weights are laid out for; other numbers work as well."""
COMPILED_VARIANTS = 64  # one batch shape needs 4 (2 windows, value embedding or not)


class Cache(Protocol):
    """What the model asks of a KV cache (`nanochat.inference.paged_cache`): where the call's tokens stand."""

    position_BT: Tensor
    """The place of each token in its sequence."""
    previous_BT: Tensor
    """The id of the token before each, -1 at the start of a sequence."""

    def attend(self, layer: int, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
        """Store the new keys and values and return what the queries see of their sequences, y_BTHD."""
        ...


class Linear(nn.Linear):
    """A linear layer without bias whose float32 weight is cast to the input's dtype."""

    packed: Tensor | None = None
    """The weight in oneDNN's own layout, see `pack`."""
    int8: Callable[[Tensor], Tensor] | None = None
    """The product with integers that replace the weight (`nanochat.model.int8`)."""
    opaque: Callable[[Tensor], Tensor] | None = None
    """Calls `product` where it is compiled, since no compiler knows the layouts (`inference/compiled_steps.py`)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply by the transposed weight."""
        if self.opaque is not None and torch.compiler.is_compiling():
            return self.opaque(input)
        return self.product(input)

    def product(self, input: Tensor) -> Tensor:
        """Multiply by the weight or what stands in its place."""
        if self.int8 is not None:
            return self.int8(input)
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(input, self.packed, None, "none", [], "")
        return F.linear(input, self.weight.to(input.dtype))

    def pack(self) -> None:
        """Keep a copy of a bfloat16 weight on CPU as oneDNN multiplies it; no gradient flows through that.

        A product of few rows otherwise spends a third to a half of its time on the layout (256 x 256 and 1 row: 15 us
        against 22; 8,192 x 256: 85 against 186; 1 core, AMD EPYC, 2026-11-25). torch.compile's freezing does the same.
        """
        is_half = self.weight.device.type == "cpu" and self.weight.dtype == torch.bfloat16
        if self.int8 is None and is_half and packs_bfloat16():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), PACKED_ROWS)


@functools.cache
def packs_bfloat16() -> bool:
    """Tell whether oneDNN multiplies bfloat16 on this processor, be it slowly."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def rotate(x_BTHD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """Rotate channel pairs (d, d + D/2) by minus the position's angle (the sign that nanochat's checkpoints use)."""
    first, second = x_BTHD.chunk(2, dim=-1)
    cos, sin = cos_BTD[:, :, None], sin_BTD[:, :, None]
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention with rotary positions, normalised queries and keys, and optional value embedding."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        kv_channels = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_channels)
        self.c_v = Linear(config.n_embd, kv_channels)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.ve_gate = Linear(VALUE_GATE_CHANNELS, config.n_kv_head) if config.has_value_embedding(layer) else None
        self.c_qkv: Linear | None = None
        """The three of them as one, see `fuse`."""

    @torch.no_grad()
    def fuse(self) -> None:
        """Let queries, keys and values be one product; the three weights become views of one. For inference."""
        if self.c_qkv is not None:
            return
        parts = (self.c_q, self.c_k, self.c_v)
        sizes = [part.out_features for part in parts]
        with torch.device("meta"):  # nothing is drawn
            fused = Linear(self.config.n_embd, sum(sizes))
        fused.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
        for part, weight in zip(parts, fused.weight.split(sizes), strict=True):
            part.weight.data = weight
        object.__setattr__(self, "c_qkv", fused)  # no submodule: its weight is that of the three

    def forward(
        self,
        x_BTC: Tensor,
        value_embedding_BTC: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        window: int,
        layer: int,
        cache: Cache | None,
        documents: Documents | None,
    ) -> Tensor:
        """Return the attention output projected back to C channels."""
        config = self.config
        B, T = x_BTC.shape[:2]
        H, G = config.n_head, config.n_kv_head
        if self.c_qkv is None:
            q_BTHD = self._turned(self.c_q(x_BTC).view(B, T, H, config.head_dim), rotation)
            k_BTGD = self._turned(self.c_k(x_BTC).view(B, T, G, config.head_dim), rotation)
            v_BTGD = self.c_v(x_BTC).view(B, T, G, config.head_dim)
        else:
            all_BTHD = self.c_qkv(x_BTC).view(B, T, H + 2 * G, config.head_dim)
            v_BTGD = all_BTHD[:, :, H + G :]
            q_BTHD, k_BTGD = self._turned(all_BTHD[:, :, : H + G], rotation).split([H, G], dim=2)
        if self.ve_gate is not None:
            assert value_embedding_BTC is not None
            gate_BTG = 3 * torch.sigmoid(self.ve_gate(x_BTC[..., :VALUE_GATE_CHANNELS]))
            v_BTGD = v_BTGD + gate_BTG[..., None] * value_embedding_BTC.view_as(v_BTGD)
        if cache is None:
            y_BTHD = attention(q_BTHD, k_BTGD, v_BTGD, window=window, documents=documents)
        else:
            y_BTHD = cache.attend(layer, q_BTHD, k_BTGD, v_BTGD, window)
        return self.c_proj(y_BTHD.reshape(B, T, config.n_embd))

    def _turned(self, x_BTHD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate and normalise queries or keys."""
        turned_BTHD = rotate(x_BTHD, *rotation)
        return F.rms_norm(turned_BTHD, (self.config.head_dim,), eps=self.config.norm_eps) * self.config.qk_gain


class MLP(nn.Module):
    """Two layers with ReLU squared between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return the MLP's output."""
        return self.c_proj(F.relu(self.c_fc(x_BTC)).square())


class Block(nn.Module):
    """One layer: residual mix, attention, MLP."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTC: Tensor,
        x0_BTC: Tensor,
        scalars: tuple[Tensor, Tensor] | None,
        value_embedding_BTC: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        window: int,
        layer: int = 0,
        cache: Cache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Return the residual stream after this layer; `scalars` weigh the stream and the first embedding."""
        if scalars is not None:
            x_BTC = scalars[0].to(x_BTC.dtype) * x_BTC + scalars[1].to(x_BTC.dtype) * x0_BTC
        if value_embedding_BTC is not None:
            value_embedding_BTC = value_embedding_BTC.to(x_BTC.dtype)
        x_BTC = x_BTC + self.attn(
            norm(x_BTC, self.norm_eps), value_embedding_BTC, rotation, window, layer, cache, documents
        )
        return x_BTC + self.mlp(norm(x_BTC, self.norm_eps))


def norm(x_BTC: Tensor, eps: float | None) -> Tensor:
    """Divide by the root mean square over the last axis; no weights."""
    return F.rms_norm(x_BTC, (x_BTC.shape[-1],), eps=eps)


class GPT(nn.Module):
    """The whole model. Parameter names are nanochat's, so that its checkpoints load as they are."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.recompute = False
        rows = config.padded_vocab_size
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(rows, config.n_embd),
                "h": nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            }
        )
        self.lm_head = Linear(config.n_embd, rows)
        kv_channels = config.n_kv_head * config.head_dim
        self.value_embeds = nn.ModuleDict(
            {
                str(layer): nn.Embedding(rows, kv_channels)
                for layer in range(config.n_layer)
                if config.has_value_embedding(layer)
            }
        )
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        if config.smear:
            self.smear_gate = Linear(SMEAR_GATE_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.exp_and_slope = exp_and_slope

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding."""
        return cast(nn.Embedding, self.transformer["wte"])

    @property
    def blocks(self) -> list[Block]:
        """The layers in order."""
        return [cast(Block, block) for block in cast(nn.ModuleList, self.transformer["h"])]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each block and the loss in place, for inputs without a cache; one compilation serves like layers.

        Static shapes: another batch shape compiles anew. Generation with a cache stays uncompiled. Arguments go to
        `torch.compile`.
        """
        for block in self.blocks:
            block.compile(*args, dynamic=False, recompile_limit=COMPILED_VARIANTS, **kwargs)
        self.exp_and_slope = torch.compile(exp_and_slope, *args, dynamic=False, **kwargs)

    def prepare_for_inference(self) -> "GPT":
        """Lay the weights out for many small products and return the model, which is not to be trained any more.

        Again after weights were loaded into it.
        """
        for linear in self.fused_linears():
            linear.pack()
        return self.eval()

    def fused_linears(self) -> list[Linear]:
        """Fuse each layer's queries, keys and values, and return the linear layers that take a token's time."""
        found = []
        for block in self.blocks:
            block.attn.fuse()
            assert block.attn.c_qkv is not None, "fused just now"
            found += [block.attn.c_qkv, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]
        return [*found, self.lm_head]

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters. Source: nanochat gpt.py@92d63d4, init_weights."""
        config = self.config
        bound = (3 / config.n_embd) ** 0.5  # uniform with standard deviation 1 / sqrt(n_embd)
        self.embedding.weight.normal_(0.0, 0.8, generator=generator)
        self.lm_head.weight.normal_(0.0, 0.001, generator=generator)
        for block in self.blocks:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                linear.weight.uniform_(-bound, bound, generator=generator)
            block.mlp.c_fc.weight.uniform_(-0.4 * bound, 0.4 * bound, generator=generator)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            if block.attn.ve_gate is not None:
                block.attn.ve_gate.weight.uniform_(0.0, 0.02, generator=generator)
        for embedding in self.value_embeds.values():
            cast(nn.Embedding, embedding).weight.uniform_(-bound, bound, generator=generator)
        for padded in (self.embedding, self.lm_head, *self.value_embeds.values()):
            cast(nn.Embedding, padded).weight[config.vocab_size :] = 0  # never read, never trained: no export has them
        if config.residual_scalars:
            share = torch.arange(config.n_layer, device=self.resid_lambdas.device) / max(config.n_layer - 1, 1)
            self.resid_lambdas.copy_(1.15 - 0.10 * share)
            self.x0_lambdas.copy_(0.20 - 0.15 * share)
        if config.backout:
            self.backout_lambda.fill_(0.2)
        if config.smear:
            self.smear_lambda.zero_()
            self.smear_gate.weight.uniform_(0.0, 0.02, generator=generator)

    def forward(self, tokens_BT: Tensor, cache: Cache | None = None, document_BT: Tensor | None = None) -> Tensor:
        """Return the final normalised hidden states hidden_BTC in the compute dtype.

        With a cache the tokens are those of its batch. `document_BT` hides other documents of a row.
        """
        config = self.config
        assert cache is None or document_BT is None, "a cache holds one document a row"
        documents = None if document_BT is None else find_documents(document_BT)
        x_BTC = norm(self.embedding(tokens_BT).to(self.compute_dtype), config.norm_eps)
        if config.smear:
            x_BTC = self._smear(x_BTC, cache, document_BT)
        x0_BTC = x_BTC.view_as(x_BTC)  # not the same object, for which the first block would be compiled apart
        rotation = self._rotation(tokens_BT, cache)
        middle_BTC = None
        for layer, (block, window) in enumerate(zip(self.blocks, config.windows, strict=True)):
            scalars = (self.resid_lambdas[layer], self.x0_lambdas[layer]) if config.residual_scalars else None
            value_embedding = self.value_embeds[str(layer)](tokens_BT) if config.has_value_embedding(layer) else None
            inputs = (x_BTC, x0_BTC, scalars, value_embedding, rotation, window)
            if cache is not None:
                x_BTC = block.forward(*inputs, layer=layer, cache=cache)
            elif self.recompute and torch.is_grad_enabled():
                x_BTC = checkpoint(block, *inputs, documents=documents, use_reentrant=False)
            else:
                x_BTC = block(*inputs, documents=documents)
            if layer == config.n_layer // 2:
                middle_BTC = x_BTC
        if config.backout:
            assert middle_BTC is not None
            x_BTC = x_BTC - self.backout_lambda.to(x_BTC.dtype) * middle_BTC
        return norm(x_BTC, config.norm_eps)

    def logits(self, hidden_BTC: Tensor) -> Tensor:
        """Return soft-capped float32 logits over the vocabulary, without padding.

        tanh(x) is written as 2 sigmoid(2x) - 1: six times as fast on CPU, where it took 5 % of a step that decodes.
        """
        cap = self.config.logit_softcap
        logits_BTV = self.lm_head(hidden_BTC)[..., : self.config.vocab_size].float()
        return 2 * cap * torch.sigmoid(logits_BTV * (2 / cap)) - cap

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, document_BT: Tensor | None = None) -> Tensor:
        """Return the sum of nats over the tokens that have a target (-1 = none), with a gradient."""
        hidden_BTC = self(tokens_BT, document_BT=document_BT)
        return head_loss(
            hidden_BTC.flatten(0, 1), self.lm_head.weight, targets_BT.flatten(), vocab_size=self.config.vocab_size,
            softcap=self.config.logit_softcap, exp_and_slope=self.exp_and_slope,
        )  # fmt: skip

    def token_losses(self, tokens_BT: Tensor, targets_BT: Tensor, document_BT: Tensor | None = None) -> Tensor:
        """Return the nats of every token, float32 losses_BT, 0 where there is no target; no gradient.

        The layers run as in training, so that what was compiled for it serves here.
        """
        with torch.enable_grad():
            hidden_BTC = self(tokens_BT, document_BT=document_BT).detach()
        if self.lm_head.int8 is not None:
            logits_NV = self.logits(hidden_BTC.flatten(0, 1))
            losses_N = F.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=-1, reduction="none")
        else:
            losses_N = token_losses(
                hidden_BTC.flatten(0, 1), self.lm_head.weight, targets_BT.flatten(), vocab_size=self.config.vocab_size,
                softcap=self.config.logit_softcap, exp_and_slope=self.exp_and_slope,
            )  # fmt: skip
        return losses_N.view_as(targets_BT)

    def _rotation(self, tokens_BT: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Return cos_BTD and sin_BTD (D = half a head) of each token's position, made in float32."""
        half = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=tokens_BT.device)
        frequency_D = self.config.rope_theta ** (-half / self.config.head_dim)
        here_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        position_BT = here_BT if cache is None else cache.position_BT
        angle_BTD = position_BT[..., None] * frequency_D
        return angle_BTD.cos().to(self.compute_dtype), angle_BTD.sin().to(self.compute_dtype)

    def _smear(self, x_BTC: Tensor, cache: Cache | None, document_BT: Tensor | None) -> Tensor:
        """Add a gated share of the previous token's embedding; a row's first token has none."""
        if cache is None:
            previous_BTC = F.pad(x_BTC[:, :-1], (0, 0, 1, 0))
        else:
            previous_BTC = norm(self.embedding(cache.previous_BT.clamp(min=0)).to(x_BTC.dtype), self.config.norm_eps)
            previous_BTC = previous_BTC * (cache.previous_BT >= 0)[..., None]
        gate_BT1 = self.smear_lambda.to(x_BTC.dtype) * torch.sigmoid(self.smear_gate(x_BTC[..., :SMEAR_GATE_CHANNELS]))
        if document_BT is not None:
            gate_BT1 = gate_BT1 * (document_BT == F.pad(document_BT[:, :-1], (1, 0), value=-1))[..., None]
        return x_BTC + gate_BT1 * previous_BTC
