"""Logits to a chosen token, and prompts to completions in one batch.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat.inference.kv_cache import KVCache
from nanochat.model.gpt import GPT


def sample_tokens(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Draw one token of each row, int64 of shape (B,); temperature 0 takes the likeliest.

    `generator` lives on CPU, so that a seed gives the same draws on every device.
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    k = min(top_k or logits_BV.shape[-1], logits_BV.shape[-1])
    top_BK, index_BK = logits_BV.topk(k, dim=-1)
    cumulative_BK = torch.softmax(top_BK / temperature, dim=-1).cumsum(dim=-1)
    uniform_B1 = torch.rand(len(logits_BV), 1, generator=generator).to(logits_BV.device) * cumulative_BK[:, -1:]
    choice_B1 = (cumulative_BK < uniform_B1).sum(dim=-1, keepdim=True).clamp(max=k - 1)
    return index_BK.gather(1, choice_B1)[:, 0]


@torch.no_grad()
def complete(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_token: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Continue each prompt until `stop_token` (not returned) or `max_new_tokens`; all prompts run as one batch."""
    device = model.lm_head.weight.device
    lengths = [len(prompt) for prompt in prompts]
    padded_BT = torch.full((len(prompts), max(lengths)), stop_token, device=device)
    for row, prompt in enumerate(prompts):
        padded_BT[row, : len(prompt)] = torch.tensor(prompt, device=device)
    cache = KVCache(model.config, len(prompts), padded_BT.shape[1] + max_new_tokens, model.compute_dtype, device)
    generator = torch.Generator().manual_seed(seed)
    hidden_BTC = model(padded_BT, cache=cache)
    cache.advance(lengths)
    last_BC = hidden_BTC[torch.arange(len(prompts), device=device), torch.tensor(lengths, device=device) - 1]
    completions: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    for _ in range(max_new_tokens):
        tokens_B = sample_tokens(model.logits(last_BC[:, None])[:, 0], temperature, top_k, generator)
        for row, token in enumerate(tokens_B.tolist()):
            running[row] = running[row] and token != stop_token
            if running[row]:
                completions[row].append(token)
        if not any(running):
            break
        last_BC = model(tokens_B[:, None], cache=cache)[:, 0]
        cache.advance(1)
    return completions
