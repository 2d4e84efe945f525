"""Token losses to bits per byte of text: a score that does not depend on the tokenizer.

bpb = total nats / ln 2 / total UTF-8 bytes of the target tokens. Special tokens stand for no bytes: their nats are left
out, so rows that are padded with BOS count just their text. Every token of the split is counted once.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from nanochat.model.gpt import GPT
from nanochat.training.step import Supervised, document_numbers


def count_nats_and_bytes(
    model: GPT,
    batches: Iterable[np.ndarray],
    token_bytes_V: Tensor,
    bos: int | None = None,
    supervised: Supervised | None = None,
) -> Tensor:
    """Return (nats, bytes), float64 on CPU, over batches of rows, (rows, T + 1), all of one shape (compiled models).

    `token_bytes_V` holds the UTF-8 bytes of each token, 0 for special ones. With `bos` a token sees its own document
    only, for models trained so. With `supervised` only those tokens count. Sums of several workers may be added.
    """
    device = token_bytes_V.device
    totals = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        rows_BT1 = torch.from_numpy(batch.astype(np.int64)).to(device)
        inputs_BT, targets_BT = rows_BT1[:, :-1], rows_BT1[:, 1:]
        document_BT = None if bos is None else document_numbers(inputs_BT, bos)
        losses_BT = model.token_losses(inputs_BT, targets_BT, document_BT)
        bytes_BT = token_bytes_V[targets_BT]
        if supervised is not None:
            bytes_BT = bytes_BT * torch.from_numpy(supervised(batch)[:, 1:]).to(device)
        totals[0] += (losses_BT * (bytes_BT > 0)).cpu().sum(dtype=torch.float64)  # Apple GPUs have no float64
        totals[1] += bytes_BT.sum().cpu()
    return totals


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Return bits per byte; infinite where there is no text."""
    return nats / math.log(2) / num_bytes if num_bytes else math.inf
