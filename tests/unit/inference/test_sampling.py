"""Sampling follows the softmax that it should, row by row."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.inference.sampling import sample_tokens


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LOGITS_V = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])


def draw(logits_BV: torch.Tensor, temperature: float, top_k: int | None, seed: int) -> torch.Tensor:
    rows = len(logits_BV)
    uniforms = np.random.default_rng(seed).random(rows).tolist()
    return sample_tokens(logits_BV, temperatures=[temperature] * rows, top_ks=[top_k] * rows, uniforms=uniforms)


def frequencies(temperature: float, top_k: int | None, draws: int = 40_000) -> np.ndarray:
    tokens_B = draw(LOGITS_V.expand(draws, 5), temperature, top_k, seed=0)
    assert tokens_B.dtype == torch.int64
    assert tokens_B.shape == (draws,)
    return np.bincount(tokens_B.numpy(), minlength=5) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 0, 5, 100, 3, 1])
def test_tokens_are_drawn_as_often_as_their_softmax_says(temperature, top_k):
    scaled = LOGITS_V / temperature
    if top_k and top_k < 5:
        scaled[LOGITS_V < LOGITS_V.sort(descending=True)[0][top_k - 1]] = -math.inf
    expected = scaled.softmax(-1).numpy()
    actual = frequencies(temperature, top_k)
    assert np.abs(actual - expected).max() < 5 * np.sqrt(0.25 / 40_000)  # five standard deviations
    assert (actual[expected == 0] == 0).all()


def test_temperature_zero_takes_the_likeliest():
    assert draw(torch.stack([LOGITS_V, -LOGITS_V]), 0.0, None, seed=0).tolist() == [1, 2]


@given(st.integers(0, 2**31), st.integers(1, 8), st.floats(0.01, 100))
def test_a_draw_is_always_a_token_of_the_top(seed, top_k, temperature):
    logits_BV = torch.randn(16, 8, generator=generator(seed))
    tokens_B = draw(logits_BV, temperature, top_k, seed)
    rank_B = (logits_BV > logits_BV.gather(1, tokens_B[:, None])).sum(dim=1)
    assert (rank_B < top_k).all()
    assert torch.equal(tokens_B, draw(logits_BV, temperature, top_k, seed))


def test_every_row_draws_by_its_own_parameters():
    """Greedy, all tokens, and two kinds of top-k in one batch: each as it would be alone."""
    rows = [(0.0, None, 0.9), (1.0, None, 0.3), (0.7, 2, 0.99), (2.0, 1, 0.5), (1.3, 4, 0.01)]
    logits_BV = torch.randn(5, 8, generator=generator(7))
    together = sample_tokens(logits_BV, temperatures=[r[0] for r in rows], top_ks=[r[1] for r in rows],
                             uniforms=[r[2] for r in rows])  # fmt: skip
    for row, (temperature, top_k, uniform) in enumerate(rows):
        alone = sample_tokens(
            logits_BV[row : row + 1], temperatures=[temperature], top_ks=[top_k], uniforms=[uniform]
        )  # fmt: skip
        assert alone.item() == together[row].item(), row
    assert together[0] == logits_BV[0].argmax()
    assert together[3] == logits_BV[3].argmax()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_a_token_without_probability_is_never_drawn_at_the_ends(uniform):
    logits_BV = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]])
    drawn = sample_tokens(logits_BV, temperatures=[1.0], top_ks=[None], uniforms=[uniform])
    assert drawn.item() in (1, 2)
