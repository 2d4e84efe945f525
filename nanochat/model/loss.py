"""Hidden states and targets to nats: head, logit soft-cap and cross-entropy, a chunk of tokens at a time.

The logits of a batch are its largest tensor (8,192 tokens x 32,768 words in float32: 1 GB), so they are never held
whole. In training the gradient of each chunk is made in the forward pass, while its logits are at hand, so nothing
is computed twice; the backward pass only scales it. The soft-cap bounds logits to +-15, so the softmax needs no
maximum: exp(15) * 2**20 words is far inside float32.

Shapes: N tokens, C width, V padded vocabulary. Targets of -1 are ignored.
Source of the idea of a loss fused with its head: Liger Kernel, arXiv:2410.10989, section 3.2.
"""

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_TOKENS = {"cpu": 512, "cuda": 8192, "mps": 2048}
"""Tokens at once by kind of device: on a CPU 512 x 8,192 bf16 logits and their gradient stay in its L3 cache; elsewhere
the fewer chunks the better, each adds to the whole float32 gradient of the head."""


def _capped(logits: Tensor, softcap: float) -> Tensor:
    """Return tanh(logits / softcap) in float32, made from one exp: 1.8 times as fast as tanh on CPU."""
    return 1.0 - 2.0 / (torch.exp(logits.float() * (2.0 / softcap)) + 1.0)


def exp_and_slope(logits_NV: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Return sum(exp(capped logits)) of each token, float32, and its derivative in the uncapped logits, in their dtype.

    One pass over the logits: the division by the sum is left to the matrix products that follow.
    """
    tanh_NV = _capped(logits_NV, softcap)
    exp_NV = torch.exp(tanh_NV * softcap)
    return exp_NV.sum(dim=-1), (exp_NV * (1.0 - tanh_NV * tanh_NV)).to(logits_NV.dtype)


class _HeadLoss(torch.autograd.Function):
    """Sum of nats over tokens, with its gradient in hidden states and head made on the way forward."""

    @staticmethod
    def forward(ctx, hidden_NC, head_VC, targets_N, vocab_size, softcap, exp_and_slope):  # type: ignore[override]
        weight_VC = head_VC[:vocab_size].to(hidden_NC.dtype)
        hidden_gradient_NC = torch.empty_like(hidden_NC)
        head_gradient_VC = torch.zeros_like(head_VC)
        total = torch.zeros((), dtype=torch.float32, device=hidden_NC.device)
        chunk = CHUNK_TOKENS[hidden_NC.device.type]
        for lo in range(0, hidden_NC.shape[0], chunk):
            chunk_NC, target_N = hidden_NC[lo : lo + chunk], targets_N[lo : lo + chunk]
            has_target_N = target_N >= 0
            at = (torch.arange(len(target_N), device=target_N.device), target_N.clamp(min=0))
            logits_NV = chunk_NC @ weight_VC.T
            tanh_N = _capped(logits_NV[at], softcap)
            sum_N, slope_NV = exp_and_slope(logits_NV, softcap)
            total += ((sum_N.log() - softcap * tanh_N) * has_target_N).sum()
            slope_NV[at] = ((torch.exp(tanh_N * softcap) - sum_N) * (1.0 - tanh_N * tanh_N)).to(slope_NV.dtype)
            share_N1 = (has_target_N / sum_N)[:, None]
            hidden_gradient_NC[lo : lo + chunk] = (slope_NV @ weight_VC) * share_N1
            head_gradient_VC[:vocab_size] += slope_NV.T @ (chunk_NC * share_N1).to(chunk_NC.dtype)
        ctx.save_for_backward(hidden_gradient_NC, head_gradient_VC)
        return total

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[override]
        hidden_gradient_NC, head_gradient_VC = ctx.saved_tensors
        return (
            (hidden_gradient_NC * upstream.view(1, 1)).to(hidden_gradient_NC.dtype),  # scaled in float32
            head_gradient_VC * upstream,
            None,
            None,
            None,
            None,
        )


def head_loss(
    hidden_NC: Tensor,
    head_VC: Tensor,
    targets_N: Tensor,
    *,
    vocab_size: int,
    softcap: float,
    exp_and_slope: Callable = exp_and_slope,
) -> Tensor:
    """Return the sum of nats over the tokens that have a target, a float32 scalar with a gradient.

    `exp_and_slope` is this module's or its compiled form. Padding rows of the head get no gradient.
    """
    return _HeadLoss.apply(hidden_NC, head_VC, targets_N, vocab_size, softcap, exp_and_slope)  # type: ignore[no-any-return]


@torch.no_grad()
def token_losses(
    hidden_NC: Tensor,
    head_VC: Tensor,
    targets_N: Tensor,
    *,
    vocab_size: int,
    softcap: float,
    exp_and_slope: Callable = exp_and_slope,
) -> Tensor:
    """Return the nats of every token, float32 of shape (N,), 0 where ignored; no gradient."""
    weight_VC = head_VC[:vocab_size].to(hidden_NC.dtype)
    losses = []
    chunk = CHUNK_TOKENS[hidden_NC.device.type]
    for chunk_NC, chunk_N in zip(hidden_NC.split(chunk), targets_N.split(chunk), strict=True):
        logits_NV = chunk_NC @ weight_VC.T
        at_target_N1 = _capped(logits_NV.gather(1, chunk_N.clamp(min=0)[:, None]), softcap)
        sum_N, _ = exp_and_slope(logits_NV, softcap)
        losses.append((sum_N.log() - softcap * at_target_N1[:, 0]) * (chunk_N >= 0))
    return torch.cat(losses)


class _TokenLogprobs(torch.autograd.Function):
    """Log probabilities of chosen tokens, whose logits are made again on the way back."""

    @staticmethod
    def forward(ctx, hidden_NC, head_VC, token_N, vocab_size, softcap, temperature, banned):  # type: ignore[override]
        logprobs, entropies = [], []
        for chunk_NC, chunk_N in zip(*(of.split(CHUNK_TOKENS[of.device.type]) for of in (hidden_NC, token_N))):
            _, logits_NV = _sampled_logits(chunk_NC, head_VC[:vocab_size], softcap, temperature, banned)
            logprob_NV = logits_NV.log_softmax(dim=-1)
            logprobs.append(logprob_NV.gather(1, chunk_N[:, None])[:, 0])
            entropies.append(torch.special.entr(logprob_NV.exp()).sum(dim=-1))
        ctx.save_for_backward(hidden_NC, head_VC, token_N)
        ctx.settings = (vocab_size, softcap, temperature, banned)
        entropy_N = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy_N)
        return torch.cat(logprobs), entropy_N

    @staticmethod
    def backward(ctx, upstream_N, _):  # type: ignore[override]
        hidden_NC, head_VC, token_N = ctx.saved_tensors
        vocab_size, softcap, temperature, banned = ctx.settings
        weight_VC = head_VC[:vocab_size]
        hidden_gradient_NC, head_gradient_VC = torch.empty_like(hidden_NC), torch.zeros_like(head_VC)
        chunk = CHUNK_TOKENS[hidden_NC.device.type]
        for lo in range(0, hidden_NC.shape[0], chunk):
            chunk_NC, chunk_N = hidden_NC[lo : lo + chunk], token_N[lo : lo + chunk]
            tanh_NV, logits_NV = _sampled_logits(chunk_NC, weight_VC, softcap, temperature, banned)
            slope_NV = -logits_NV.softmax(dim=-1)
            slope_NV[torch.arange(len(chunk_N), device=chunk_N.device), chunk_N] += 1.0
            slope_NV *= (1.0 - tanh_NV * tanh_NV) * (upstream_N[lo : lo + chunk, None] / temperature)
            slope_NV = slope_NV.to(hidden_NC.dtype)
            hidden_gradient_NC[lo : lo + chunk] = slope_NV @ weight_VC.to(hidden_NC.dtype)
            head_gradient_VC[:vocab_size] += slope_NV.T @ chunk_NC
        return hidden_gradient_NC, head_gradient_VC, None, None, None, None, None


def _sampled_logits(
    hidden_NC: Tensor, weight_VC: Tensor, softcap: float, temperature: float, banned: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return tanh of the capped logits, and the logits that are sampled from, both float32 of shape (N, V)."""
    tanh_NV = _capped(hidden_NC @ weight_VC.to(hidden_NC.dtype).T, softcap)
    logits_NV = tanh_NV * (softcap / temperature)
    logits_NV[:, list(banned)] = float("-inf")
    return tanh_NV, logits_NV


def token_logprobs(
    hidden_NC: Tensor,
    head_VC: Tensor,
    token_N: Tensor,
    *,
    vocab_size: int,
    softcap: float,
    temperature: float = 1.0,
    banned: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Return logprob_N of chosen tokens, with a gradient, and entropy_N of their distributions, without; float32.

    Logits are divided by the temperature, and `banned` ids have no probability: as the tokens were sampled.
    """
    return _TokenLogprobs.apply(hidden_NC, head_VC, token_N, vocab_size, softcap, temperature, banned)  # type: ignore[no-any-return]
