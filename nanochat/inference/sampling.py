"""Logits to a chosen token of each row.

In this order: penalties and bias move logits, the temperature divides them; min_p, top_k and top_p leave candidates
out. Shapes: B rows, R rows of a kind, K candidates, V vocabulary.

Sources: top-p: Holtzman et al. 2020 (arXiv 1904.09751); min-p: Nguyen et al. 2024 (arXiv 2407.01082); repetition
penalty: Keskar et al. 2019 (arXiv 1909.05858); presence and frequency penalties: OpenAI's API reference.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

TIE_STEP = 2.0**-48
"""What an id takes from its logit where equals are put in order: less than float32 tells apart."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one row draws."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only; none or 0 = from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this share of the probability."""
    min_p: float = 0.0
    """Draw from tokens that have at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Logits of tokens that are in prompt or completion: divided by it where above 0, else multiplied."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that are in the completion."""
    frequency_penalty: float = 0.0
    """Taken from them once for each time that they are in it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of tokens; minus infinity bans one."""

    @property
    def is_plain(self) -> bool:
        """Tell whether logits stay as they are."""
        unmoved = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) == (1.0, 0.0, 0.0)
        return unmoved and not self.logit_bias


def move_logits(logits_V: Tensor, sampling: Sampling, prompt: Sequence[int], completion: Sequence[int]) -> None:
    """Apply a row's penalties and bias, in place."""
    device = logits_V.device
    if sampling.repetition_penalty != 1.0:
        token_N = torch.tensor(sorted({*prompt, *completion}), dtype=torch.int64, device=device)
        seen_N, penalty = logits_V[token_N], sampling.repetition_penalty
        logits_V[token_N] = torch.where(seen_N > 0, seen_N / penalty, seen_N * penalty)
    changes = {
        token: -sampling.presence_penalty - sampling.frequency_penalty * count
        for token, count in Counter(completion).items()
    }
    for token, bias in sampling.logit_bias.items():
        changes[token] = changes.get(token, 0.0) + bias
    if changes:
        logits_V[torch.tensor(list(changes), device=device)] += torch.tensor(list(changes.values()), device=device)


def sample_tokens(logits_BV: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """Draw one token of each row, int64 of shape (B,), by the inverse of the cumulated probabilities at its uniform.

    Uniforms are numbers in [0, 1), one a row: a draw depends on nothing but its row.
    """
    B, V = logits_BV.shape
    ks = [min(sampling.top_k or V, V) for sampling in samplings]
    kinds = [
        "greedy" if not one.temperature else "all" if (k, one.top_p, one.min_p) == (V, 1.0, 0.0) else "some"
        for one, k in zip(samplings, ks)
    ]
    drawn_B = torch.empty(B, dtype=torch.int64, device=logits_BV.device)
    for kind in set(kinds):
        rows = [row for row, of_row in enumerate(kinds) if of_row == kind]
        row_R = slice(None) if len(rows) == B else torch.tensor(rows, device=logits_BV.device)
        logits_RV = logits_BV[row_R]
        if kind == "greedy":
            drawn_B[row_R] = logits_RV.argmax(dim=-1)
            continue
        # Of the likeliest alone: a sum over all tokens costs more than finding them.
        values_RK, token_RK = (
            _likeliest(logits_RV, max(ks[row] for row in rows)) if kind == "some" else (logits_RV, None)
        )
        own = [
            (samplings[row].temperature, ks[row], samplings[row].top_p, samplings[row].min_p, 1.0 - uniforms[row])
            for row in rows
        ]
        temperature_R1, k_R1, p_R1, least_R1, reach_R1 = torch.tensor(own, device=logits_BV.device).T[:, :, None]
        weights_RK = torch.exp((values_RK - values_RK.amax(dim=-1, keepdim=True)) / temperature_R1.clamp(min=1e-6))
        if token_RK is not None:  # the likeliest first; its weight is 1
            place_K = torch.arange(values_RK.shape[1], device=logits_BV.device)
            weights_RK = weights_RK * ((place_K < k_R1) & (weights_RK >= least_R1))
            cumulative_RK = weights_RK.cumsum(dim=-1)
            is_left_RK = cumulative_RK - weights_RK < p_R1 * cumulative_RK[:, -1:]
            weights_RK = weights_RK * (is_left_RK | (place_K == 0))
        cumulative_RK = weights_RK.cumsum(dim=-1)
        # 1 - uniform is in (0, 1], also when rounded to float32: so no token without probability is ever reached.
        place_R1 = (cumulative_RK < reach_R1 * cumulative_RK[:, -1:]).sum(dim=-1, keepdim=True)
        drawn_B[row_R] = (place_R1 if token_RK is None else token_RK.gather(1, place_R1))[:, 0]
    return drawn_B


def _likeliest(logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` greatest logits of each row and their ids; of equal ones the lower id comes first.

    In bfloat16 many are equal, and which of them `topk` alone takes depends on `count`: on other rows.
    """
    step = torch.arange(logits_RV.shape[1], dtype=torch.float64, device=logits_RV.device) * TIE_STEP
    token_RK = (logits_RV.double() - step).topk(count).indices
    return logits_RV.gather(1, token_RK), token_RK
