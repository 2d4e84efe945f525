"""Log probabilities of chosen tokens, in chunks, against a plain softmax in float64: values, entropy, gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loss import LargestTensor

from nanochat.model import loss as module
from nanochat.model.loss import token_logprobs

VOCAB, PADDED = 50, 64


def random_problem(N=23, C=8, seed=0, banned=(), dtype=torch.float32):
    """Hidden states, a head, tokens that may be drawn, and a weight for each of them."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=draw).to(dtype).requires_grad_()
    head = (6.0 * C**-0.5 * torch.randn(PADDED, C, generator=draw)).requires_grad_()
    allowed = torch.tensor([id for id in range(VOCAB) if id not in banned])
    tokens = allowed[torch.randint(len(allowed), (N,), generator=draw)]
    return hidden, head, tokens, torch.randn(N, generator=draw)


def plain(hidden, head, tokens, weights, softcap=15.0, temperature=1.0, banned=()):
    """Values, entropies and gradients of the weighted sum, token by token, over the words that may be drawn alone."""
    hidden, head = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    allowed = [id for id in range(VOCAB) if id not in banned]
    values, entropies = [], []
    for state, token in zip(hidden, tokens.tolist(), strict=True):
        scores = {id: softcap * torch.tanh(head[id] @ state / softcap) / temperature for id in allowed}
        total = torch.logsumexp(torch.stack(list(scores.values())), 0)
        values.append(scores[token] - total)
        logprobs = [float((score - total).detach()) for score in scores.values()]
        entropies.append(-sum(math.exp(logprob) * logprob for logprob in logprobs))
    value_N = torch.stack(values)
    (value_N * weights).sum().backward()
    return value_N.detach(), torch.tensor(entropies, dtype=torch.float64), hidden.grad, head.grad


@settings(max_examples=12)
@given(
    N=st.integers(1, 8), chunk=st.sampled_from([1, 3, 8, 512]), seed=st.integers(0, 99),
    softcap=st.sampled_from([3.0, 15.0]), temperature=st.sampled_from([0.5, 1.0, 2.0]),
    banned=st.sampled_from([(), (7,), (0, 13, 49)]),
)  # fmt: skip
def test_values_entropy_and_gradients_for_any_chunk_size(N, chunk, seed, softcap, temperature, banned):
    hidden, head, tokens, weights = random_problem(N, seed=seed, banned=banned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.CHUNK_TOKENS, "cpu", chunk)
        value_N, entropy_N = token_logprobs(
            hidden, head, tokens, vocab_size=VOCAB, softcap=softcap, temperature=temperature, banned=banned
        )
        (value_N * weights).sum().backward()
    values, entropies, hidden_gradient, head_gradient = plain(
        hidden, head, tokens, weights, softcap, temperature, banned
    )
    assert value_N.dtype == entropy_N.dtype == torch.float32
    torch.testing.assert_close(value_N.double(), values, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(entropy_N.double(), entropies, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(hidden.grad.double(), hidden_gradient, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(head.grad.double(), head_gradient, rtol=1e-4, atol=2e-5)


def test_of_two_words_by_hand():
    """Logits 1 and -1 below a cap that is far away, at temperature 2: 1 / (1 + e^-1) and the other."""
    head = torch.tensor([[1.0], [-1.0]])
    value_N, entropy_N = token_logprobs(
        torch.ones(2, 1), head, torch.tensor([0, 1]), vocab_size=2, softcap=1e4, temperature=2.0
    )
    assert value_N.exp().tolist() == pytest.approx([0.731059, 0.268941], abs=1e-4)
    assert entropy_N.tolist() == pytest.approx([0.582203] * 2, abs=1e-4)


def test_chunks_change_nothing(monkeypatch):
    results = []
    for chunk in (512, 3):
        monkeypatch.setitem(module.CHUNK_TOKENS, "cpu", chunk)
        hidden, head, tokens, weights = random_problem()
        value_N, entropy_N = token_logprobs(hidden, head, tokens, vocab_size=VOCAB, softcap=15.0)
        (value_N * weights).sum().backward()
        results.append((value_N.detach(), entropy_N, hidden.grad, head.grad))
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)


def test_padding_and_banned_words_have_no_probability_and_no_gradient():
    banned = (3, 40)
    hidden, head, tokens, weights = random_problem(banned=banned)
    expected = plain(hidden, head, tokens, weights, banned=banned)
    with torch.no_grad():
        head[VOCAB:] = head[list(banned)] = 1e6
    value_N, entropy_N = token_logprobs(hidden, head, tokens, vocab_size=VOCAB, softcap=15.0, banned=banned)
    (value_N * weights).sum().backward()
    torch.testing.assert_close(value_N.double(), expected[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(entropy_N.double(), expected[1], rtol=1e-4, atol=2e-5)
    has_gradient = head.grad.abs().amax(dim=1) > 0
    assert has_gradient.tolist() == [id < VOCAB and id not in banned for id in range(PADDED)]
    assert hidden.grad.isfinite().all()


def test_the_entropy_has_no_gradient():
    hidden, head, tokens, _ = random_problem()
    value_N, entropy_N = token_logprobs(hidden, head, tokens, vocab_size=VOCAB, softcap=15.0)
    assert value_N.requires_grad
    assert not entropy_N.requires_grad


def test_bfloat16_is_near_float64():
    """Stated tolerance: 0.05 nats, gradients 2 % in norm, against float64 on the same rounded inputs."""
    hidden, head, tokens, weights = random_problem(N=100, C=64, dtype=torch.bfloat16)
    value_N, entropy_N = token_logprobs(hidden, head, tokens, vocab_size=VOCAB, softcap=15.0, temperature=0.8)
    (value_N * weights).sum().backward()
    values, entropies, hidden_gradient, head_gradient = plain(hidden, head.bfloat16(), tokens, weights, temperature=0.8)
    assert value_N.dtype == entropy_N.dtype == head.grad.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    assert (value_N.double() - values).abs().max() < 0.05
    assert (entropy_N.double() - entropies).abs().max() < 0.05
    assert (hidden.grad.double() - hidden_gradient).norm() < 0.02 * hidden_gradient.norm()
    assert (head.grad.double() - head_gradient).norm() < 0.02 * head_gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype):
    hidden, head, tokens, _ = random_problem(dtype=dtype)
    hidden = (hidden.detach() * 1e4).requires_grad_()
    value_N, entropy_N = token_logprobs(hidden, head, tokens, vocab_size=VOCAB, softcap=15.0, temperature=0.1)
    value_N.sum().backward()
    assert value_N.min() < -200
    for tensor in (value_N, entropy_N, hidden.grad, head.grad):
        assert tensor.isfinite().all()


def test_whole_logits_are_never_held():
    N, V = 2048, 640
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, 8, generator=draw).requires_grad_()
    head = torch.randn(V, 8, generator=draw).requires_grad_()
    with LargestTensor() as largest:
        value_N, _ = token_logprobs(hidden, head, torch.arange(N) % 639, vocab_size=V, softcap=15.0, banned=(639,))
        value_N.sum().backward()
    assert largest.elements == module.CHUNK_TOKENS["cpu"] * V < N * V
