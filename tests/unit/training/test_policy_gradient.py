"""Every knob of the policy gradient against numbers by hand and against loops over tokens in plain Python."""

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from nanochat.config.rl import RLConfig
from nanochat.training.policy_gradient import (
    BatchCounts,
    Tokens,
    advantages,
    clipped,
    is_informative,
    kl_estimate,
    token_losses,
    token_weights,
)

KINDS = ("mean", "std", "rloo")
LOSSES = ("reinforce", "ppo_clip", "cispo", "gspo")
AGGREGATES = ("token_global", "sequence_mean", "constant")


@pytest.mark.parametrize(
    ("kind", "rewards", "expected"),
    [
        ("mean", [1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]),
        ("mean", [3, -1, 1], [2, -2, 0]),
        ("std", [1, 0, 0, 0], [1.5, -0.5, -0.5, -0.5]),  # sum of squares 3/4, over 3: a deviation of 1/2
        ("std", [3, -1, 1], [1, -1, 0]),
        ("rloo", [1, 0, 0, 0], [1, -1 / 3, -1 / 3, -1 / 3]),
        ("rloo", [3, -1, 1], [3, -3, 0]),
        ("mean", [1, 0], [0.5, -0.5]),
        ("std", [1, 0], [0.5**0.5, -(0.5**0.5)]),
        ("rloo", [1, 0], [1, -1]),
    ],
)
def test_advantages_by_hand(kind, rewards, expected):
    """In the company of other groups, which change nothing."""
    rewards_PG = torch.tensor([[7.0] * len(rewards), rewards, [100 * reward for reward in rewards]])
    advantage_PG = advantages(rewards_PG, kind)
    assert advantage_PG.dtype == torch.float32
    assert advantage_PG[1].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert advantage_PG[0].tolist() == [0.0] * len(rewards)
    assert is_informative(rewards_PG).tolist() == [False, True, True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [2, 3, 6, 7, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(kind, samples, dtype):
    rewards = [0.0, 1.0, 0.1, 0.7, -1 / 3, 1e-30, 1e30]
    rewards_PG = torch.tensor([[reward] * samples for reward in rewards], dtype=dtype)
    assert advantages(rewards_PG, kind).tolist() == [[0.0] * samples] * len(rewards)
    assert not is_informative(rewards_PG).any()


def test_a_tenth_does_not_average_exactly():
    """Why the test above needs a rule: here the centred rewards are not 0."""
    tenths = torch.full((3,), 0.1, dtype=torch.float64)
    assert (tenths - tenths.mean()).abs().max() > 0


def test_a_tiny_deviation_does_not_blow_up():
    rewards_PG = torch.tensor([[1.0, 1.0 + 1e-9], [1.0, 1.0 + 1e-4]], dtype=torch.float64)
    tiny, small = advantages(rewards_PG, "std").tolist()
    assert tiny == pytest.approx([-4.9965e-4, 4.9965e-4], rel=1e-3)  # 5e-10 / (7.07e-10 + 1e-6)
    assert small == pytest.approx([-0.6972, 0.6972], rel=1e-3)  # 5e-5 / (7.07e-5 + 1e-6)


def test_bounds_of_the_ratio():
    bounds = {loss: RLConfig(loss=loss).bounds for loss in LOSSES}
    assert bounds["reinforce"] == (None, 2.0)
    assert bounds["ppo_clip"] == pytest.approx((0.8, 1.28))
    assert bounds["cispo"] == (0.0, 5.0)
    assert bounds["gspo"] == pytest.approx((0.9997, 1.0004))
    assert RLConfig(loss="ppo_clip", clip_low=0.5, clip_high=0.0).bounds == (0.5, 1.0)


def gradient(config: RLConfig, logprobs, tokens: Tokens):
    """Losses of the tokens, and the gradient of their sum in the log probabilities."""
    logprob_N = torch.tensor(logprobs, requires_grad=True)
    loss_N = token_losses(config, logprob_N, tokens)
    loss_N.sum().backward()
    return loss_N.tolist(), logprob_N.grad.tolist()


def one_token(ratio: float, advantage: float):
    """A token of probability 1/4 when it was sampled and `ratio` times that now."""
    tokens = Tokens(torch.tensor([math.log(0.25)]), torch.tensor([0]), torch.tensor([advantage]))
    return [math.log(0.25 * ratio)], tokens


@pytest.mark.parametrize(
    ("changes", "ratio", "advantage", "slope", "is_clipped"),
    [
        ({"loss": "reinforce", "tis_cap": None}, 3.0, 2.0, -2.0, False),
        ({"loss": "reinforce", "tis_cap": None}, 0.1, -2.0, 2.0, False),
        ({"loss": "reinforce", "tis_cap": 2.0}, 3.0, 2.0, -4.0, True),
        ({"loss": "reinforce", "tis_cap": 2.0}, 3.0, -2.0, 4.0, True),
        ({"loss": "reinforce", "tis_cap": 2.0}, 1.5, 2.0, -3.0, False),
        ({"loss": "reinforce", "tis_cap": 2.0}, 0.01, 2.0, -0.02, False),
        ({"loss": "ppo_clip"}, 1.5, 2.0, 0.0, True),
        ({"loss": "ppo_clip"}, 1.5, -2.0, 3.0, False),
        ({"loss": "ppo_clip"}, 0.5, 2.0, -1.0, False),
        ({"loss": "ppo_clip"}, 0.5, -2.0, 0.0, True),
        ({"loss": "ppo_clip"}, 1.25, 2.0, -2.5, False),
        ({"loss": "ppo_clip", "clip_high": 0.2}, 1.25, 2.0, 0.0, True),
        ({"loss": "ppo_clip", "clip_low": 0.6}, 0.5, -2.0, 1.0, False),
        ({"loss": "cispo"}, 4.5, 2.0, -9.0, False),
        ({"loss": "cispo"}, 8.0, 2.0, -10.0, True),
        ({"loss": "cispo"}, 8.0, -2.0, 10.0, True),
        ({"loss": "cispo", "clip_low": 0.2}, 0.5, 2.0, -1.6, True),
        ({"loss": "gspo"}, 1.0003, 2.0, -2.0006, False),
        ({"loss": "gspo"}, 1.0005, 2.0, 0.0, True),
        ({"loss": "gspo"}, 1.0005, -2.0, 2.001, False),
        ({"loss": "gspo"}, 0.9996, 2.0, -1.9992, False),
        ({"loss": "gspo"}, 0.9996, -2.0, 0.0, True),
    ],
)
def test_the_gradient_of_one_token_by_hand(changes, ratio, advantage, slope, is_clipped):
    config = RLConfig(**changes)
    logprobs, tokens = one_token(ratio, advantage)
    _, (computed,) = gradient(config, logprobs, tokens)
    assert computed == pytest.approx(slope, rel=1e-5) if slope else computed == 0.0
    assert clipped(config, torch.tensor(logprobs), tokens).tolist() == [is_clipped]


@pytest.mark.parametrize(
    ("changes", "ratio", "advantage", "loss"),
    [
        ({"loss": "ppo_clip"}, 1.5, 2.0, -2.56),
        ({"loss": "ppo_clip"}, 1.5, -2.0, 3.0),
        ({"loss": "ppo_clip"}, 0.5, -2.0, 1.6),
        ({"loss": "gspo"}, 1.0005, 2.0, -2.0008),
        ({"loss": "reinforce", "tis_cap": None}, 3.0, 2.0, 2 * math.log(4 / 3)),
        ({"loss": "reinforce", "tis_cap": 2.0}, 3.0, 2.0, 4 * math.log(4 / 3)),
        ({"loss": "cispo"}, 3.0, 2.0, 6 * math.log(4 / 3)),
    ],
)
def test_the_loss_of_one_token_by_hand(changes, ratio, advantage, loss):
    logprobs, tokens = one_token(ratio, advantage)
    assert gradient(RLConfig(**changes), logprobs, tokens)[0] == pytest.approx([loss], rel=1e-5)


def test_the_penalty_by_hand():
    """The policy says 1/2 where the other says 1/4: 1/2 - ln(1/2) - 1, with a slope of 1 - 1/2."""
    logprob_N, other_N = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    assert kl_estimate(logprob_N, other_N).tolist() == pytest.approx([0.193147, 0.306853, 0.0], abs=1e-6)
    tokens = Tokens(logprob_N, torch.tensor([0, 0, 0]), torch.tensor([0.0]), other_N)
    losses, slopes = gradient(RLConfig(kl_beta=0.1), logprob_N.tolist(), tokens)
    assert losses == pytest.approx([0.0193147, 0.0306853, 0.0], abs=1e-7)
    assert slopes == pytest.approx([0.05, -0.1, 0.0], abs=1e-6)


def test_weights_of_tokens_by_hand():
    """Three tokens of a sequence and one of another, in a batch of 10 tokens and 4 sequences of the 6 it could have."""
    tokens = Tokens(torch.zeros(4), torch.tensor([0, 0, 0, 1]), torch.tensor([1.0, 1.0]))
    expected = {"token_global": [0.1] * 4, "sequence_mean": [1 / 12] * 3 + [1 / 4], "constant": [1 / 30] * 4}
    for aggregate, weights in expected.items():
        config = RLConfig(aggregate=aggregate, max_new_tokens=5, groups_per_step=3, samples_per_group=2)
        assert token_weights(config, tokens, BatchCounts(10, 4)).tolist() == pytest.approx(weights), aggregate


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("loss", LOSSES)
def test_no_tokens_and_sequences_without_tokens_give_no_nan(loss, aggregate):
    config = RLConfig(loss=loss, aggregate=aggregate)
    none = Tokens(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(2))
    assert token_losses(config, torch.zeros(0), none).sum() == 0
    assert token_weights(config, none, BatchCounts(0, 0)).shape == clipped(config, torch.zeros(0), none).shape == (0,)
    middle = Tokens(torch.tensor([-1.0, -1.0]), torch.tensor([0, 2]), torch.tensor([1.0, 1.0, 1.0]))
    assert middle.mean_of_sequence(torch.tensor([2.0, 4.0])).tolist() == [2.0, 0.0, 4.0]
    losses, slopes = gradient(config, [-1.0, -1.0], middle)
    assert all(map(math.isfinite, losses))
    assert slopes == [-1.0, -1.0]


def random_case(seed: int):
    """Sequences of different lengths, whose ratios are on both sides of every bound."""
    draw = random.Random(seed)
    width = draw.choice([3e-4, 0.2, 1.5])
    lengths = [draw.randint(1, 5) for _ in range(draw.randint(1, 5))]
    rollout = [[-draw.uniform(0.1, 3) for _ in range(length)] for length in lengths]
    logprobs = [[value + draw.gauss(0, width) for value in values] for values in rollout]
    reference = [[value + draw.gauss(0, 0.3) for value in values] for values in logprobs]
    return logprobs, rollout, reference, [draw.choice([-1.5, -0.5, 0.0, 0.5, 2.0]) for _ in lengths]


def naive(config: RLConfig, logprobs, rollout, reference, advantage, low, high):
    """Loss, slope and whether it is clipped of each token, from one token to the next."""
    rows = []
    for now, before, others, A in zip(logprobs, rollout, reference, advantage, strict=True):
        mean_ratio = math.exp(sum(a - b for a, b in zip(now, before)) / len(now))
        for a, b, other in zip(now, before, others, strict=True):
            ratio = mean_ratio if config.loss == "gspo" else math.exp(a - b)
            cut = ratio > high if A > 0 else ratio < low if A < 0 else False
            bounded = max(low, min(high, ratio))
            if config.loss in ("reinforce", "cispo"):
                cut = bounded != ratio
                loss, slope = -bounded * A * a, -bounded * A
            else:
                loss, slope = -A * (bounded if cut else ratio), 0.0 if cut else -A * ratio
            if config.kl_beta:
                u = math.exp(other - a)
                loss, slope = loss + config.kl_beta * (u - math.log(u) - 1), slope + config.kl_beta * (1 - u)
            rows.append((loss, slope, cut))
    return [list(column) for column in zip(*rows)]


@pytest.mark.parametrize("kl_beta", [0.0, 0.3])
@pytest.mark.parametrize(
    ("loss", "low", "high"), [("reinforce", 0, 1.2), ("ppo_clip", 0.8, 1.28), ("cispo", 0, 5), ("gspo", 0.9997, 1.0004)]
)
def test_any_sequences_against_a_loop(loss, low, high, kl_beta):
    config, cut = RLConfig(loss=loss, kl_beta=kl_beta, tis_cap=1.2), set()
    for seed in range(60):
        logprobs, rollout, reference, advantage = random_case(seed)
        now, before, others = ([value for values in one for value in values] for one in (logprobs, rollout, reference))
        sequence = [number for number, values in enumerate(rollout) for _ in values]
        tokens = Tokens(torch.tensor(before), torch.tensor(sequence), torch.tensor(advantage))
        if kl_beta:
            tokens = replace(tokens, reference_N=torch.tensor(others))
        losses, slopes = gradient(config, now, tokens)
        expected = naive(config, logprobs, rollout, reference, advantage, low, high)
        assert losses == pytest.approx(expected[0], rel=1e-4, abs=2e-5)
        assert slopes == pytest.approx(expected[1], rel=1e-4, abs=2e-5)
        assert clipped(config, torch.tensor(now), tokens).tolist() == expected[2]
        cut |= set(expected[2])
    assert cut == {True, False}


METHODS = {
    "nanochat": {"loss": "reinforce", "aggregate": "token_global", "tis_cap": None},
    "nanochat, truncated": {"loss": "reinforce", "aggregate": "token_global"},
    "GRPO": {"loss": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2, "aggregate": "sequence_mean"},
    "Dr. GRPO": {"loss": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2, "aggregate": "constant"},
    "DAPO": {"loss": "ppo_clip", "clip_low": 0.2, "clip_high": 0.28, "aggregate": "token_global"},
    "RLOO": {"loss": "reinforce", "aggregate": "constant"},
    "CISPO": {"loss": "cispo", "aggregate": "token_global"},
    "GSPO": {"loss": "gspo", "aggregate": "sequence_mean"},
}


@pytest.mark.parametrize("method", METHODS)
def test_with_current_weights_every_method_has_the_gradient_of_reinforce(method):
    config = RLConfig(max_new_tokens=7, groups_per_step=2, samples_per_group=3, **METHODS[method])
    lengths, advantage = [3, 1, 4], [0.75, -0.25, -0.5]
    ends = [0, 3, 4, 8]
    rollout = [-0.1 * (number + 1) for number in range(8)]
    sequence = [number for number, length in enumerate(lengths) for _ in range(length)]
    logprob_N = torch.tensor(rollout, requires_grad=True)
    tokens = Tokens(torch.tensor(rollout), torch.tensor(sequence), torch.tensor(advantage))
    weight_N = token_weights(config, tokens, BatchCounts(tokens=20, sequences=5))
    (token_losses(config, logprob_N, tokens) * weight_N).sum().backward()
    share = {"token_global": [1 / 20] * 3, "sequence_mean": [1 / 15, 1 / 5, 1 / 20], "constant": [1 / 42] * 3}
    expected = [0.0] * 8
    for (lo, hi), A, weight in zip(pairwise(ends), advantage, share[config.aggregate], strict=True):
        expected[lo:hi] = [-A * weight] * (hi - lo)
    assert logprob_N.grad.tolist() == pytest.approx(expected, rel=1e-6)
    assert not clipped(config, logprob_N, tokens).any()
