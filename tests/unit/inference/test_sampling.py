"""Sampling follows the softmax that it should, row by row."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.inference.sampling import Sampling, Seen, move_logits, sample_tokens


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LOGITS_V = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])


def draw(logits_BV: torch.Tensor, temperature: float, top_k: int | None, seed: int) -> torch.Tensor:
    rows = len(logits_BV)
    uniforms = np.random.default_rng(seed).random(rows).tolist()
    return sample_tokens(logits_BV, [Sampling(temperature=temperature, top_k=top_k)] * rows, uniforms)[0]


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


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"top_p": 0.5}, [1]),
        ({"top_p": 0.6}, [1, 3]), ({"top_p": 0.7}, [1, 3]), ({"top_p": 1e-9}, [1]), ({"min_p": 0.3}, [1, 3]),
        ({"min_p": 0.2}, [0, 1, 3]), ({"min_p": 1.0}, [1]), ({"top_k": 3, "top_p": 0.999}, [0, 1, 3]),
        ({"top_k": 2, "top_p": 0.7}, [1]), ({"top_p": 0.9, "min_p": 0.3}, [1, 3]),
    ],
)  # fmt: skip
def test_who_is_left_out_and_that_the_others_share_its_probability(options, left):
    """Probabilities are 0.126, 0.563, 0.028, 0.207 and 0.076; top_k 2 leaves 0.731 and 0.269."""
    rows = 20_000
    uniforms = np.random.default_rng(1).random(rows).tolist()
    sampling = Sampling(temperature=1.0, **options)
    tokens_B, logprob_B = sample_tokens(LOGITS_V.expand(rows, 5), [sampling] * rows, uniforms)
    expected = torch.full((5,), -math.inf)
    expected[left] = LOGITS_V[left]
    actual = np.bincount(tokens_B.numpy(), minlength=5) / rows
    assert set(np.flatnonzero(actual).tolist()) == set(left)
    assert np.abs(actual - expected.softmax(-1).numpy()).max() < 5 * np.sqrt(0.25 / rows)
    assert torch.allclose(logprob_B, expected.log_softmax(-1)[tokens_B], atol=1e-6)


def test_every_row_draws_by_its_own_parameters():
    """Greedy, all tokens, and kinds of leaving out in one batch: each as it would be alone."""
    rows = [
        ({"temperature": 0.0}, 0.9), ({"temperature": 1.0}, 0.3), ({"temperature": 0.7, "top_k": 2}, 0.99),
        ({"temperature": 2.0, "top_k": 1}, 0.5), ({"temperature": 1.3, "top_k": 4}, 0.01),
        ({"temperature": 1.0, "top_p": 0.8}, 0.7), ({"temperature": 1.0, "min_p": 0.4, "top_k": 6}, 0.2),
    ]  # fmt: skip
    logits_BV = torch.randn(7, 8, generator=generator(7))
    samplings, uniforms = [Sampling(**options) for options, _ in rows], [uniform for _, uniform in rows]
    together, logprob_B = sample_tokens(logits_BV, samplings, uniforms)
    for row in range(7):
        alone, logprob = sample_tokens(logits_BV[row : row + 1], samplings[row : row + 1], uniforms[row : row + 1])
        assert alone.item() == together[row].item(), row
        assert logprob.item() == pytest.approx(logprob_B[row].item(), abs=1e-6)
    assert logprob_B[0] == logprob_B[3] == 0, "the only one that is left"
    assert logprob_B[1] == pytest.approx(logits_BV[1].log_softmax(-1)[together[1]].item(), abs=1e-6)
    assert together[0] == logits_BV[0].argmax()
    assert together[3] == logits_BV[3].argmax()


def test_penalties_and_bias_by_hand():
    logits_V = torch.tensor([2.0, -2.0, 1.0, 0.5, 0.0, 3.0])
    plain = Sampling(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1)
    sampling = Sampling(
        repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, logit_bias={3: 1.5, 4: -math.inf, 2: 1.0}
    )
    seen = Seen([0, 1, 0], [2])
    for token in (2, 5):
        seen.add(token)
    biased = Sampling(logit_bias={0: 1.0})
    logits_BV = logits_V.repeat(4, 1)
    move_logits(logits_BV, [plain, sampling, biased, sampling], [None, seen, None, Seen([5], [])])
    assert logits_BV[0].tolist() == logits_V.tolist()
    assert logits_BV[1].tolist() == [1.0, -4.0, 0.5 - 0.25 - 2 * 0.5 + 1.0, 2.0, -math.inf, 1.5 - 0.25 - 0.5]
    assert logits_BV[2].tolist() == [3.0, *logits_V[1:].tolist()]
    assert logits_BV[3].tolist() == [2.0, -2.0, 2.0, 2.0, -math.inf, 1.5]
    assert sampling.is_penalized
    assert not plain.is_penalized
    assert not biased.is_penalized


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_a_token_without_probability_is_never_drawn_at_the_ends(uniform):
    logits_BV = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]])
    drawn, _ = sample_tokens(logits_BV, [Sampling(temperature=1.0)], [uniform])
    assert drawn.item() in (1, 2)


@given(st.integers(0, 2**31), st.integers(1, 300), st.floats(0.0, 1.0, exclude_max=True))
def test_among_many_tokens_the_one_is_drawn_at_which_the_probabilities_reach_the_uniform(seed, size, uniform):
    logits_V = torch.randn(size, generator=generator(seed)) * 5
    logits_V[torch.rand(size, generator=generator(seed + 1)) < 0.6] = -math.inf
    logits_V[int(torch.randint(size, (), generator=generator(seed + 2)))] = 1.0
    (token,), (logprob,) = sample_tokens(logits_V[None], [Sampling(temperature=1.0)], [uniform])
    probabilities_V = logits_V.double().softmax(-1)
    assert probabilities_V[token] > 0
    assert logprob.item() == pytest.approx(probabilities_V[token].log().item(), abs=1e-5)
    reached_V = probabilities_V.cumsum(-1)
    assert reached_V[token] >= 1 - uniform - 1e-6
    assert reached_V[token] - probabilities_V[token] <= 1 - uniform + 1e-6


@pytest.mark.parametrize("own", [{"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.9}], ids=str)
def test_equal_logits_are_drawn_from_whatever_others_ask_for(own):
    """In bfloat16 many logits are equal: which of them are left does not depend on the rows beside them."""
    logits_BV = torch.randn(200, 500, generator=generator(3)).bfloat16().float()
    assert len(logits_BV[0].unique()) < 450
    uniforms = np.random.default_rng(5).random(200).tolist()
    sampling = Sampling(temperature=1.0, **own)
    alone, _ = sample_tokens(logits_BV, [sampling] * 200, uniforms)
    for other in ({"top_k": 37}, {"top_k": 400}, {"top_p": 0.5}, {}):
        mixed = [sampling, Sampling(temperature=1.0, **other)] * 100
        assert torch.equal(sample_tokens(logits_BV, mixed, uniforms)[0][::2], alone[::2])
