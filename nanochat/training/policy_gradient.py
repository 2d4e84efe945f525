"""Rewards and log probabilities to a loss: advantages, policy-gradient losses, their aggregation. Maths alone.

Three choices make most of the published methods:

    nanochat's REINFORCE   advantage=mean  loss=reinforce                 aggregate=token_global
    GRPO                   advantage=std   loss=ppo_clip(0.2, 0.2)        aggregate=sequence_mean
    Dr. GRPO               advantage=mean  loss=ppo_clip(0.2, 0.2)        aggregate=constant
    DAPO                   advantage=std   loss=ppo_clip(0.2, 0.28)       aggregate=token_global, dynamic sampling
    RLOO                   advantage=rloo  loss=reinforce                 aggregate=constant
    CISPO                  any             loss=cispo(4)                  aggregate=token_global
    GSPO                   any             loss=gspo(3e-4, 4e-4)          aggregate=sequence_mean

The ratio rho is always the trained policy over the one that sampled, token by token, whatever lies between them: with
weights that are current it is 1, and every loss has REINFORCE's gradient. Sums are divided by counts of the whole
batch, so neither micro-batches nor workers change the gradient.

Shapes: P groups of a batch, G samples of a group, N trained tokens of a micro-batch, S its sequences.
Sources: REINFORCE, Williams 1992; RLOO, arXiv 2402.14740; PPO, 1707.06347; GRPO, 2402.03300; Dr. GRPO, 2503.20783;
DAPO, 2503.14476; CISPO, 2506.13585; GSPO, 2507.18071; truncated importance sampling, fengyao.notion.site/off-policy-rl;
the k3 estimator of KL, joschu.net/blog/kl-approx.html.
Not covered: several updates on one batch, learned values, rewards of single tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.config.rl import RLConfig

STD_EPS = 1e-6


def advantages(rewards_PG: Tensor, kind: str) -> Tensor:
    """Return how much better each sample is than its group, float32 of shape (P, G), G >= 2.

    mean: reward minus the group's mean; std: that, divided by the group's standard deviation; rloo: reward minus the
    mean of the others. Exactly 0 where all rewards of a group are equal.
    """
    rewards_PG = rewards_PG.double()  # a mean of equal rewards is not always equal to them
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if kind == "rloo":
        centred_PG = centred_PG * (rewards_PG.shape[1] / (rewards_PG.shape[1] - 1))
    elif kind == "std":
        centred_PG = centred_PG / (rewards_PG.std(dim=1, keepdim=True) + STD_EPS)
    return torch.where(is_informative(rewards_PG)[:, None], centred_PG, 0.0).float()


def is_informative(rewards_PG: Tensor) -> Tensor:
    """Tell of which groups the rewards differ, bool of shape (P,): the others have no gradient."""
    return rewards_PG.amax(dim=1) != rewards_PG.amin(dim=1)


@dataclass(frozen=True)
class Tokens:
    """The trained tokens of some sequences, one after the other."""

    rollout_N: Tensor
    """Log probabilities when they were sampled."""
    sequence_N: Tensor
    """Which of the micro-batch's sequences a token belongs to, int64."""
    advantage_S: Tensor
    reference_N: Tensor | None = None
    """Log probabilities by the model that the KL penalty holds on to."""

    @property
    def length_S(self) -> Tensor:
        """Trained tokens of each sequence."""
        return torch.bincount(self.sequence_N, minlength=len(self.advantage_S))

    def mean_of_sequence(self, values_N: Tensor) -> Tensor:
        """Return the mean over each sequence's tokens, of shape (S,); 0 of none."""
        total_S = torch.zeros_like(self.advantage_S).index_add(0, self.sequence_N, values_N)
        return total_S / self.length_S.clamp(min=1)


def token_losses(config: RLConfig, logprob_N: Tensor, tokens: Tokens) -> Tensor:
    """Return the loss of each token, before it is weighed, with its gradient in logprob_N."""
    advantage_N = tokens.advantage_S[tokens.sequence_N]
    log_ratio_N = logprob_N - tokens.rollout_N
    low, high = config.bounds
    if config.loss == "gspo":
        ratio_S, advantage_S = tokens.mean_of_sequence(log_ratio_N).exp(), tokens.advantage_S
        surrogate_S = torch.minimum(ratio_S * advantage_S, ratio_S.clamp(low, high) * advantage_S)
        loss_N = -surrogate_S[tokens.sequence_N]
    elif config.loss == "ppo_clip":
        ratio_N = log_ratio_N.exp()
        loss_N = -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(low, high) * advantage_N)
    else:
        weight_N = log_ratio_N.detach().exp().clamp(low, high) if high is not None else 1.0
        loss_N = -weight_N * advantage_N * logprob_N
    if tokens.reference_N is not None:
        loss_N = loss_N + config.kl_beta * kl_estimate(logprob_N, tokens.reference_N)
    return loss_N


def kl_estimate(logprob_N: Tensor, other_N: Tensor) -> Tensor:
    """Return k3, an estimate of KL(policy | other) from tokens of the policy that is never negative."""
    log_ratio_N = other_N - logprob_N
    return log_ratio_N.exp() - log_ratio_N - 1


@dataclass(frozen=True)
class BatchCounts:
    """What the sums of a whole batch are divided by, over all workers."""

    tokens: int
    """Trained tokens."""
    sequences: int
    """Sequences with at least one of them."""


def token_weights(config: RLConfig, tokens: Tokens, counts: BatchCounts) -> Tensor:
    """Return the factor of each token's loss in the batch's, float32 of shape (N,).

    token_global: every token of the batch counts alike; sequence_mean: every sequence does; constant: as tokens do, but
    divided by what a batch could have at most, whatever it has.
    """
    if config.aggregate == "token_global":
        return torch.full_like(tokens.rollout_N, 1 / max(1, counts.tokens))
    if config.aggregate == "constant":
        most = config.groups_per_step * config.samples_per_group * config.max_new_tokens
        return torch.full_like(tokens.rollout_N, 1 / most)
    return 1 / (tokens.length_S[tokens.sequence_N] * counts.sequences)


def clipped(config: RLConfig, logprob_N: Tensor, tokens: Tokens) -> Tensor:
    """Tell at which tokens the loss's bound cuts the gradient off, or the weight down; bool of shape (N,)."""
    log_ratio_N = logprob_N - tokens.rollout_N
    if config.loss == "gspo":
        log_ratio_N = tokens.mean_of_sequence(log_ratio_N)[tokens.sequence_N]
    ratio_N, advantage_N = log_ratio_N.exp(), tokens.advantage_S[tokens.sequence_N]
    low, high = config.bounds
    too_low_N, too_high_N = ratio_N < (low or 0.0), ratio_N > (math.inf if high is None else high)
    if config.loss in ("gspo", "ppo_clip"):
        too_low_N, too_high_N = too_low_N & (advantage_N < 0), too_high_N & (advantage_N > 0)
    return too_low_N | too_high_N
