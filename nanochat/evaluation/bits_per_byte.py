"""Token losses to bits per byte of text: a score that does not depend on the tokenizer.

bpb = total nats / ln 2 / total UTF-8 bytes of the target tokens. Special tokens stand for no bytes: their nats are left
out, so rows that are padded with BOS count just their text. Every token of the split is counted once.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from nanochat.data.token_shards import TokenShards
from nanochat.model.gpt import GPT


def count_nats_and_bytes(model: GPT, batches: Iterable[np.ndarray], token_bytes_V: Tensor) -> Tensor:
    """Return float64 (nats, bytes) over batches of rows, shape (rows, T + 1), all of one shape (compiled models).

    `token_bytes_V` holds the UTF-8 bytes of each token, 0 for special ones. Sums of several workers may be added.
    """
    device = token_bytes_V.device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        rows_BT1 = torch.from_numpy(batch.astype(np.int64)).to(device)
        targets_BT = rows_BT1[:, 1:]
        bytes_BT = token_bytes_V[targets_BT]
        losses_BT = model.token_losses(rows_BT1[:, :-1], targets_BT)
        totals[0] += (losses_BT * (bytes_BT > 0)).sum(dtype=torch.float64)
        totals[1] += bytes_BT.sum(dtype=torch.float64)
    return totals


def validation_batches(
    shards: TokenShards, *, rows: int, limit: int, padding: int, rank: int = 0, world_size: int = 1
) -> Iterator[np.ndarray]:
    """Yield every `world_size`-th batch of the first `limit` validation rows, in manifest order, from batch `rank` on.

    All batches have `rows` rows of the shards' dtype; the last is filled up with rows of `padding`, which count nothing.
    """
    waiting: list[np.ndarray] = []
    taken = number = 0
    groups = ((shard, group) for shard in shards.split("validation") for group in range(len(shard.group_rows())))
    for shard, group in groups:
        if taken >= limit:
            break
        for row in shards.read_rows(shard, group)[: limit - taken]:
            waiting.append(row)
            taken += 1
            if len(waiting) == rows:
                if number % world_size == rank:
                    yield np.stack(waiting)
                waiting, number = [], number + 1
    if waiting and number % world_size == rank:
        filler = np.full_like(waiting[0], padding)
        yield np.stack(waiting + [filler] * (rows - len(waiting)))


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Return bits per byte; infinite where there is no text."""
    return nats / math.log(2) / num_bytes if num_bytes else math.inf
