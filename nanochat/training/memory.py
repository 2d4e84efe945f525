"""A model's shape to the memory that training takes on one worker, by calculation, and what of it the device has.

The peak is in the backward pass or in the update, whichever takes more:

    weights + gradients + optimiser + max(rows * kept + casts + head + max(logits, rows * backward), update)

Widths are tensors of n_embd channels a token; how many a layer keeps was counted with autograd's own hooks, the peaks
with the allocator's events (torch 2.13, CPU): `tests/unit/training/test_memory.py` does so again.
Not covered: fragmentation, what CUDA and NCCL hold for themselves (about 1 GiB), FP8's copies, and sampling and scoring
between steps, when there are no gradients.
"""

from dataclasses import dataclass

import torch

from nanochat.config.model import ModelConfig
from nanochat.errors import ConfigError
from nanochat.model import scaling
from nanochat.model.attention import QUERY_BLOCK
from nanochat.model.loss import CHUNK_TOKENS

GIB = 2**30
COMPILED_WIDTHS, PLAIN_WIDTHS = 18, 19
"""Kept by a layer: stream, norms, queries, keys and values before and after rotation, value embedding, attention's
output, and the MLP's hidden layer before and after its square (4 each)."""
NORM_WIDTHS = 4
"""More where it is not compiled and half precision: norms keep float32 copies."""
OUTER_WIDTHS = 7
"""Kept outside the layers: the embedding and its norm, the middle layer, the last norm, the loss's gradient."""
BACKWARD_WIDTHS = 12
"""Gradients that one layer's backward pass holds at once: twice the MLP's hidden layer and the stream."""
UPDATE_BYTES = 28
"""Muon's temporaries, seven float32 tensors of each element of the matrices of one shape, which go together."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What training takes on one worker, in bytes."""

    weights: int
    """Float32, with the frozen ones that a penalty holds on to."""
    gradients: int
    """Float32 and whole: every worker keeps its own until the step is done."""
    optimizer: int
    """This worker's share of two moments of tables and one of matrices, float32."""
    update: int
    """Muon's temporaries."""
    head: int
    """The head's gradient twice, as the forward pass made it and scaled; by then a cast head is gone."""
    casts: int
    """Matrices in the compute dtype, kept from forward to backward."""
    token_logits: int
    """Of each token of the loss's chunk: its logits, their slope, and either of the chunk before that goes meanwhile;
    not compiled, four float32 steps between the two."""
    chunk_tokens: int
    row_tokens: int
    kept: int
    """By one row from forward to backward."""
    backward: int
    """By one row while a layer goes backward; if it is computed again, what it keeps, too."""

    @property
    def fixed(self) -> int:
        """What stays whatever the micro-batch."""
        return self.weights + self.gradients + self.optimizer

    def peak(self, rows: int) -> int:
        """Return the most that a step takes with micro-batches of so many rows."""
        logits = min(rows * self.row_tokens, self.chunk_tokens) * self.token_logits
        backward = rows * self.kept + self.casts + self.head + max(logits, rows * self.backward)
        return self.fixed + max(backward, self.update)


def training_memory(
    model: ModelConfig, *, world_size: int, device: str, dtype: torch.dtype, compiled: bool, recompute: bool,
    frozen_copies: int = 0,
) -> Memory:  # fmt: skip
    """Return what training a model takes on a kind of device; `frozen_copies` of it are held besides."""
    counts, dtype_bytes = scaling.parameter_counts(model), dtype.itemsize
    total, matrices = counts["total"], counts["matrices"]
    is_half = dtype_bytes < 4
    width = model.n_embd * model.sequence_len * dtype_bytes
    widths = COMPILED_WIDTHS if compiled else PLAIN_WIDTHS + NORM_WIDTHS * is_half
    is_blocked = device != "cuda" or not is_half  # else FlashAttention
    layers = [widths * width + is_blocked * _score_bytes(model, window, dtype_bytes) for window in model.windows]
    return Memory(
        weights=4 * total * (1 + frozen_copies),
        gradients=4 * total,
        optimizer=-(-(8 * (total - matrices) + 4 * matrices) // world_size),
        update=UPDATE_BYTES * max(min(matrices // 3, matrices // world_size), 4 * model.n_embd**2),
        head=8 * counts["head"],
        casts=is_half * dtype_bytes * matrices // (model.n_layer if recompute else 1),
        token_logits=model.vocab_size * (3 * dtype_bytes if compiled else 16 + 2 * dtype_bytes),
        chunk_tokens=CHUNK_TOKENS[device],
        row_tokens=model.sequence_len,
        kept=(model.n_layer * width if recompute else sum(layers)) + OUTER_WIDTHS * width,
        backward=BACKWARD_WIDTHS * width + (max(layers) if recompute else 0),
    )


def _score_bytes(model: ModelConfig, window: int, dtype_bytes: int) -> int:
    """Return what blocked attention keeps of a row: each block's float32 weights, their cast, and its keys and values.

    FlashAttention keeps none of it.
    """
    tokens, seen = model.sequence_len, 0
    per_query = model.n_head * (4 + dtype_bytes * (dtype_bytes < 4))
    for first in range(0, tokens, QUERY_BLOCK):
        queries = min(QUERY_BLOCK, tokens - first)
        keys = first + queries - max(0, first - window)
        seen += keys * (per_query * queries + 2 * model.n_kv_head * model.head_dim * dtype_bytes)
    return seen


def refuse_unless_it_fits(model: ModelConfig, memory: Memory, free_bytes: int) -> None:
    """Raise ConfigError if not even one row fits; `memory` is with recomputing."""
    needed = memory.peak(1)
    if needed <= free_bytes:
        return
    parts = {
        "weights": memory.weights, "gradients": memory.gradients, "optimiser": memory.optimizer,
        "one row or the update": needed - memory.fixed,
    }  # fmt: skip
    told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    raise ConfigError(
        f"depth={model.n_layer}: needs {needed / GIB:.2f} GiB on each worker ({told}), even if activations are "
        f"recomputed; the device has {free_bytes / GIB:.2f} GiB free for it. Take a smaller depth, more workers (which "
        "share the optimiser's part), shorter rows, or a larger device."
    )
