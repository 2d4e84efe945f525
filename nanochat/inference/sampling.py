"""Logits to a chosen token of each row.

In this order: penalties and bias move logits, the temperature divides them; min_p, top_k and top_p leave candidates
out. Shapes: B rows, R rows of a kind, K candidates, V vocabulary.

Sources: top-p: Holtzman et al. 2020 (arXiv 1904.09751); min-p: Nguyen et al. 2024 (arXiv 2407.01082); repetition
penalty: Keskar et al. 2019 (arXiv 1909.05858); presence and frequency penalties: OpenAI's API reference.
"""

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

BLOCK = 64
"""Weights that are summed at once where a draw is looked up."""
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
    def is_penalized(self) -> bool:
        """Tell whether what was said before moves logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


class Seen:
    """The distinct tokens of a prompt and its completion, and how often each is in the completion; grows with it."""

    def __init__(self, prompt: Iterable[int], completion: Iterable[int]) -> None:
        self._places: dict[int, int] = {}
        self._tokens, self._counts = array("q"), array("q")
        for tokens, count in ((prompt, 0), (completion, 1)):
            for token in tokens:
                self.add(token, count)

    def add(self, token: int, count: int = 1) -> None:
        """Count a token of the completion."""
        place = self._places.setdefault(token, len(self._tokens))
        if place == len(self._tokens):
            self._tokens.append(token)
            self._counts.append(0)
        self._counts[place] += count

    def copied(self) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and counts, int64 of shape (N,)."""
        return np.array(self._tokens), np.array(self._counts)


def move_logits(logits_BV: Tensor, samplings: Sequence[Sampling], seen: Sequence[Seen | None]) -> None:
    """Apply the rows' penalties and biases, in place; rows that have none need nothing seen."""
    rows, tokens, counts = [], [], []
    for row, (sampling, one) in enumerate(zip(samplings, seen, strict=True)):
        if sampling.is_penalized and one is not None:
            token_N, count_N = one.copied()
            rows.append(np.full_like(token_N, row))
            tokens.append(token_N)
            counts.append(count_N)
    if rows:
        row_N, token_N, count_N = (torch.from_numpy(np.concatenate(parts)) for parts in (rows, tokens, counts))
        penalties_R3 = [(one.repetition_penalty, one.presence_penalty, one.frequency_penalty) for one in samplings]
        repetition_N, presence_N, frequency_N = torch.tensor(penalties_R3, dtype=torch.float64)[row_N].T
        taken_N = presence_N * (count_N > 0) + frequency_N * count_N
        place = (row_N.to(logits_BV.device), token_N.to(logits_BV.device))
        repetition_N, taken_N = (of.float().to(logits_BV.device) for of in (repetition_N, taken_N))
        logit_N = logits_BV[place].float()
        logit_N = torch.where(logit_N > 0, logit_N / repetition_N, logit_N * repetition_N) - taken_N
        logits_BV[place] = logit_N.to(logits_BV.dtype)
    biases = [
        (row, token, bias) for row, sampling in enumerate(samplings) for token, bias in sampling.logit_bias.items()
    ]
    if biases:
        row_N, token_N, bias_N = (torch.tensor(column, device=logits_BV.device) for column in zip(*biases))
        logits_BV[row_N, token_N] += bias_N


def sample_tokens(logits_BV: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Draw one token of each row, by the inverse of the cumulated probabilities at its uniform.

    Uniforms are numbers in [0, 1), one a row: a draw depends on nothing but its row. Returns token_B, int64, and
    logprob_B, float32: how likely each draw was, with the temperature and without what was left out.
    """
    B, V = logits_BV.shape
    ks = [min(sampling.top_k or V, V) for sampling in samplings]
    kinds = [
        "greedy" if not one.temperature else "all" if (k, one.top_p, one.min_p) == (V, 1.0, 0.0) else "some"
        for one, k in zip(samplings, ks)
    ]
    drawn_B = torch.empty(B, dtype=torch.int64, device=logits_BV.device)
    logprob_B = torch.zeros(B, dtype=torch.float32, device=logits_BV.device)
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
        # 1 - uniform is in (0, 1], also when rounded to float32: so no token without probability is ever reached.
        place_R1, total_R = _reached(weights_RK, reach_R1)
        drawn_B[row_R] = (place_R1 if token_RK is None else token_RK.gather(1, place_R1))[:, 0]
        logprob_B[row_R] = (weights_RK.gather(1, place_R1)[:, 0] / total_R).log()
    return drawn_B, logprob_B


def _reached(weights_RK: Tensor, reach_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Return place_R1, where the cumulated weights first reach a share of their total, and total_R.

    By blocks: the sums of a whole vocabulary, one after the other, took a quarter of a step that decodes.
    """
    blocks_RKD = torch.nn.functional.pad(weights_RK, (0, -weights_RK.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    sums_RK = blocks_RKD.sum(dim=-1)
    reached_RK = sums_RK.cumsum(dim=-1)
    goal_R1 = reach_R1 * reached_RK[:, -1:]
    block_R1 = (reached_RK < goal_R1).sum(dim=-1, keepdim=True)
    inside_RD = blocks_RKD.gather(1, block_R1[..., None].expand(-1, -1, BLOCK))[:, 0].cumsum(dim=-1)
    before_R1 = torch.nn.functional.pad(reached_RK, (1, 0)).gather(1, block_R1)  # below the goal, whatever is rounded
    place_R1 = (inside_RD < (goal_R1 - before_R1).clamp(max=inside_RD[:, -1:])).sum(dim=-1, keepdim=True)
    return block_R1 * BLOCK + place_R1, reached_RK[:, -1]


def _likeliest(logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` greatest logits of each row and their ids; of equal ones the lower id comes first.

    In bfloat16 many are equal, and which of them `topk` alone takes depends on `count`: on other rows.
    """
    step = torch.arange(logits_RV.shape[1], dtype=torch.float64, device=logits_RV.device) * TIE_STEP
    token_RK = (logits_RV.double() - step).topk(count).indices
    return logits_RV.gather(1, token_RK), token_RK


@dataclass(frozen=True)
class Likelihood:
    """How likely a token was, by the model: before temperature, penalties and what leaves tokens out."""

    logprob: float
    likeliest: tuple[tuple[int, float], ...]
    """The likeliest ids there and their log probabilities, in order."""


def likelihoods(logits_TV: torch.Tensor, tokens: list[int], count: int) -> list[Likelihood]:
    """Return how likely each token was, and the `count` likeliest in its place."""
    logprobs_TV = logits_TV.float().log_softmax(-1)
    values_TK, token_TK = logprobs_TV.topk(min(count, logprobs_TV.shape[1]))
    own = logprobs_TV.gather(1, torch.tensor(tokens, device=logits_TV.device)[:, None])[:, 0].tolist()
    return [
        Likelihood(logprob, tuple(zip(ids, values)))
        for logprob, ids, values in zip(own, token_TK.tolist(), values_TK.tolist())
    ]


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that depends on its arguments alone: a hash of both."""
    digest = hashlib.blake2b(b"%d %d" % (seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
