"""Logits to a chosen token of each row. Shapes: B rows, K candidates, V vocabulary."""

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
    B, V = logits_BV.shape
    ks = [min(k or V, V) for k in top_ks]
    kinds = ["greedy" if not temperature else "all" if k == V else "top" for temperature, k in zip(temperatures, ks)]
    drawn_B = torch.empty(B, dtype=torch.int64, device=logits_BV.device)
    for kind in set(kinds):
        rows = [row for row, of_row in enumerate(kinds) if of_row == kind]
        row_R = slice(None) if len(rows) == B else torch.tensor(rows, device=logits_BV.device)
        logits_RV = logits_BV[row_R]
        if kind == "greedy":
            drawn_B[row_R] = logits_RV.argmax(dim=-1)
            continue
        # Of the likeliest alone: a sum over all tokens costs more than finding them.
        values_RK, token_RK = logits_RV.topk(max(ks[row] for row in rows)) if kind == "top" else (logits_RV, None)
        own = [(temperatures[row], ks[row], 1.0 - uniforms[row]) for row in rows]
        temperature_R1, k_R1, reach_R1 = torch.tensor(own, device=logits_BV.device).T[:, :, None]
        weights_RK = torch.exp((values_RK - values_RK.amax(dim=-1, keepdim=True)) / temperature_R1.clamp(min=1e-6))
        if token_RK is not None:
            weights_RK = weights_RK * (torch.arange(values_RK.shape[1], device=logits_BV.device) < k_R1)
        cumulative_RK = weights_RK.cumsum(dim=-1)
        # 1 - uniform is in (0, 1], also when rounded to float32: so no token without probability is ever reached.
        place_R1 = (cumulative_RK < reach_R1 * cumulative_RK[:, -1:]).sum(dim=-1, keepdim=True)
        drawn_B[row_R] = (place_R1 if token_RK is None else token_RK.gather(1, place_R1))[:, 0]
    return drawn_B
