"""Logits to a chosen token of each row. Shapes: B rows, V vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sample_tokens(
    logits_BV: Tensor, *, temperatures: Sequence[float], top_ks: Sequence[int | None], uniforms: Sequence[float]
) -> Tensor:
    """Draw one token of each row, int64 of shape (B,); temperature 0 takes the likeliest.

    A row draws from its `top_k` likeliest tokens (none or 0 = all), by the inverse of their cumulated probabilities at
    its `uniform`, a number in [0, 1): so the draw depends on nothing but the row.
    """
    if not any(temperatures):
        return logits_BV.argmax(dim=-1)
    V = logits_BV.shape[-1]
    ks = [min(k or V, V) for k in top_ks]
    if min(ks) < V:
        logits_BV = logits_BV.clone()
        largest_BK = logits_BV.topk(max(k for k in ks if k < V), dim=-1).values
        for row, k in enumerate(ks):
            if k < V:
                logits_BV[row].masked_fill_(logits_BV[row] < largest_BK[row, k - 1], float("-inf"))
    temperature_B1 = torch.tensor(temperatures, device=logits_BV.device)[:, None]
    scaled_BV = logits_BV / temperature_B1.clamp(min=1e-6)
    cumulative_BV = torch.softmax(scaled_BV, dim=-1).cumsum(dim=-1)
    # 1 - uniform is in (0, 1], also when rounded to float32: so no token without probability is ever reached.
    reach_B1 = torch.tensor([1.0 - u for u in uniforms], device=logits_BV.device)[:, None] * cumulative_BV[:, -1:]
    drawn_B = (cumulative_BV < reach_B1).sum(dim=-1)
    return torch.where(temperature_B1[:, 0] > 0, drawn_B, logits_BV.argmax(dim=-1))
