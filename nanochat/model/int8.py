"""Large linear layers to 8-bit integers, for serving on CPUs: half of the bytes that a step of few rows waits for.

Each row of a weight becomes integers up to 127 and a scale. A product does the same to each row of its input,
multiplies integers, which is exact, and scales back: what a row gets cannot depend on the rows beside it. Left as they
are: small layers, embeddings (looked up, not multiplied), gates. Source: arXiv:2208.07339, section 2.

The inputs are integers, too, because torch's product of 8-bit weights with bfloat16 (`_weight_int8pack_mm`) is slower
than bfloat16 alone: 8 rows take 1.5 to 2 times as long, 32 rows 2.5 times (1 core, AMD EPYC, 2026-11-27).
Not covered: GPUs, training, other weights later on, outliers kept in bfloat16 (that paper's section 3.2).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat.errors import ConfigError
from nanochat.model.gpt import GPT, PACKED_ROWS

MIN_WEIGHTS = 1 << 20
"""Smaller layers stay: making integers of the input takes longer than the product saves. Against bfloat16, 1 / 8 / 32 /
96 rows: 256 x 256 0.4 / 0.4 / 0.5 / 0.6 times as fast, 768 x 768 0.9 / 0.9 / 1.0 / 1.2, 2304 x 768 1.3 / 1.4 / 1.4 /
1.4, 1280 x 5120 1.6 / 1.4 / 1.4 / 1.4, 32,768 x 768 1.5 / 1.6 / 1.6 / 1.6 (1 core, AMD EPYC, 2026-11-27)."""
LARGEST = 127
ZERO = 128
"""Stands for 0 in an input's integers: oneDNN's fast product takes them without a sign."""


@dataclass(frozen=True)
class Int8Weight:
    """The integers of a weight, N x K, in oneDNN's own layout, and what multiplies by them.

    A row of zeros makes no integers (0 / 0), in the weight or an input; products of what stands there are scaled by 0.
    """

    packed: Tensor
    scale_N: Tensor
    """What 1 stands for in a product of integers, where the input's largest number is 1."""
    zero_N: Tensor
    half_up: Tensor
    """Added to an input before its fraction is cut off."""

    @classmethod
    def of(cls, weight_NK: Tensor) -> "Int8Weight":
        """Round a weight to integers."""
        largest_N1 = weight_NK.float().abs().amax(1, keepdim=True)
        integers_NK = (weight_NK * (LARGEST / largest_N1)).round_().to(torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(integers_NK, [PACKED_ROWS, weight_NK.shape[1]])
        zero_N = torch.zeros(len(weight_NK), dtype=torch.int64)
        return cls(packed, largest_N1.flatten() / LARGEST**2, zero_N, torch.tensor(ZERO + 0.5))

    def __call__(self, input: Tensor) -> Tensor:
        """Return the product of an input, (..., K), with the transposed weight, in the input's dtype."""
        rows = input.float()
        largest = rows.abs().amax(-1, keepdim=True)
        integers = torch.addcdiv(self.half_up, rows, largest, value=LARGEST).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            integers, 1.0, ZERO, self.packed, self.scale_N, self.zero_N, None, 1.0, 0, torch.float32, "none", [], "none"
        )
        return product.mul_(largest).to(input.dtype)


def multiplies_int8(device: torch.device) -> bool:
    """Tell whether a device is a CPU with instructions for 8-bit products; without, oneDNN's are slow and overflow."""
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_vnni"))


@torch.no_grad()
def convert_to_int8(model: GPT) -> GPT:
    """Replace the large weights of a model on CPU and return it, ready to answer, which is all it can do from then on.

    Their own bytes are given back.
    """
    for linear in model.fused_linears():
        if linear.weight.numel() >= MIN_WEIGHTS:
            linear.int8 = Int8Weight.of(linear.weight)
            linear.weight.data = linear.weight.new_empty(0)
    for attention in (block.attn for block in model.blocks):
        if attention.c_qkv is not None and attention.c_qkv.int8 is not None:
            for linear in (attention.c_q, attention.c_k, attention.c_v):  # views of the fused weight
                linear.weight.data = linear.weight.new_empty(0)
    model.register_load_state_dict_pre_hook(_refuse)
    return model.prepare_for_inference()


def _refuse(*_: Any) -> None:
    raise ConfigError("dtype=int8: a model of integers takes no other weights. Load the checkpoint anew.")
