"""Sampling follows the softmax it should, and batched completion equals going on one token at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.config.model import ModelConfig
from nanochat.inference.sampling import complete, sample_tokens
from nanochat.model.gpt import GPT


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LOGITS_V = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])


def frequencies(temperature: float, top_k: int | None, draws: int = 40_000) -> np.ndarray:
    tokens_B = sample_tokens(LOGITS_V.expand(draws, 5), temperature, top_k, generator())
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


def test_temperature_zero_takes_the_likeliest_and_draws_nothing():
    draw = generator()
    before = draw.get_state()
    assert sample_tokens(torch.stack([LOGITS_V, -LOGITS_V]), 0.0, None, draw).tolist() == [1, 2]
    assert torch.equal(draw.get_state(), before)


@given(st.integers(0, 2**31), st.integers(1, 8), st.floats(0.01, 100))
def test_a_draw_is_always_a_token_of_the_top(seed, top_k, temperature):
    logits_BV = torch.randn(16, 8, generator=generator(seed))
    tokens_B = sample_tokens(logits_BV, temperature, top_k, generator(seed))
    rank_B = (logits_BV > logits_BV.gather(1, tokens_B[:, None])).sum(dim=1)
    assert (rank_B < top_k).all()
    assert torch.equal(tokens_B, sample_tokens(logits_BV, temperature, top_k, generator(seed)))


STOP = 0


def random_model(seed: int = 0) -> GPT:
    model = GPT(ModelConfig(sequence_len=16, vocab_size=40, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, smear=True))
    draw = generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=draw).mul_(0.4)
    return model


def slowly(model: GPT, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Take the likeliest token again and again, the whole row through the model each time."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = int(model.logits(model(torch.tensor([tokens])))[0, -1].argmax())
        if token == STOP:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


PROMPTS = [[5], [7, 3, 9, 11, 2], [1, 2, 3], [30, 31, 32, 33, 34, 35, 36, 37, 38]]


def test_a_batch_of_prompts_goes_on_as_each_would_by_itself():
    lengths = set()
    for seed in range(4):
        model = random_model(seed)
        expected = [slowly(model, prompt, 24) for prompt in PROMPTS]
        assert complete(model, PROMPTS, max_new_tokens=24, stop_token=STOP) == expected
        lengths |= {len(completion) for completion in expected}
    assert len(lengths) > 1, "some stopped early"


def test_samples_are_a_function_of_the_seed():
    model = random_model()

    def sample(seed: int) -> list[list[int]]:
        return complete(model, PROMPTS, max_new_tokens=12, stop_token=STOP, temperature=1.0, top_k=20, seed=seed)

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)
    assert all(STOP not in completion for completion in sample(3))


def test_no_new_tokens_and_an_immediate_stop():
    model = random_model()
    assert complete(model, PROMPTS, max_new_tokens=0, stop_token=STOP) == [[], [], [], []]
    first = slowly(model, PROMPTS[0], 1)[0]
    assert complete(model, PROMPTS[:1], max_new_tokens=8, stop_token=first) == [[]]
