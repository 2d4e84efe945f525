"""Causal attention over rows: sliding windows, grouped KV heads, documents, one interface.

Two kernels, chosen per call by device and dtype: `varlen_attn` (FlashAttention) on CUDA in half precision, and
blocked matrix products everywhere else. On CPU a block of 128 queries multiplies only the keys it may see, so
the upper triangle and everything left of the window are never computed: in bf16, (16, 512, 4, 64) forward and
backward 56 ms against 115 ms with `scaled_dot_product_attention` (2 cores, AMD EPYC AVX512-BF16, 2026-11-22).

Shapes: B rows, T queries of this call, S keys, H query heads, G KV heads (H divides by G), D head size.
Sources: GQA arXiv:2305.13245; sliding windows arXiv:2004.05150; FlashAttention-2 arXiv:2307.08691, 3 arXiv:2407.08608.
Not covered: dropout, non-causal attention.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)

from nanochat.errors import excerpt

QUERY_BLOCK = 128
HOPPER = 9
FLASH_TOLERANCE = 0.02
"""As far as two kernels in bfloat16 may be apart."""


class Documents(NamedTuple):
    """Which tokens of a batch of rows may see each other."""

    id_BT: Tensor
    """Any integers, one run of equal ones per document: an id does not come back later in its row."""
    starts_N: Tensor | None
    """On CUDA the flat start of every document (`sequence_starts`), int32."""


def find_documents(id_BT: Tensor) -> Documents:
    """Prepare a document mask, once for all layers; on CUDA this waits for the device to count the documents."""
    return Documents(id_BT, sequence_starts(id_BT) if id_BT.is_cuda else None)


def attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    window: int,
    documents: Documents | None = None,
) -> Tensor:
    """Attend causally within whole rows; a query sees itself and `window` keys before, not those of other `documents`.

    Returns y_BTHD in q's dtype; scores and softmax are float32.
    """
    assert q_BTHD.shape[2] % k_BSGD.shape[2] == 0, "query heads are a multiple of KV heads"
    assert q_BTHD.shape[1] == k_BSGD.shape[1], "the queries are the whole row"
    if uses_flash(q_BTHD):
        return _flash(q_BTHD, k_BSGD, v_BSGD, window, documents)
    return _blocked(q_BTHD, k_BSGD, v_BSGD, window, documents)


def uses_flash(q_BTHD: Tensor) -> bool:
    """Tell whether FlashAttention takes these queries: CUDA of capability 8.0 or newer, half precision, head size."""
    head_dim = q_BTHD.shape[-1]
    return (
        q_BTHD.is_cuda
        and q_BTHD.dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(q_BTHD.device) >= (8, 0)
    )


def choose_flash(device: torch.device, dtype: torch.dtype) -> str:
    """Let `varlen_attn` run FlashAttention 3 in this process, on Hopper where package flash_attn_interface is.

    It stays only if it agrees with the blocked products on a small input. Returns what runs, and why not the faster.
    """
    if not uses_flash(torch.empty(1, 1, 1, 64, dtype=dtype, device=device)):
        return "blocked products"
    if torch.cuda.get_device_capability(device)[0] != HOPPER:
        return "FlashAttention 2"
    try:
        activate_flash_attention_impl("FA3")
        error = _flash_error(device)
    except (ImportError, RuntimeError) as err:
        reason = excerpt(err)
    else:
        if error < FLASH_TOLERANCE:
            return "FlashAttention 3"
        reason = f"it is off by {error:.1%} here"
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()
    return f"FlashAttention 2; not 3: {reason}"


def _flash_error(device: torch.device) -> float:
    """Return how far flash and blocked attention are apart, output and gradients, relative to the latter's norm."""
    draw = torch.Generator(device).manual_seed(0)
    q, k, v, weight = torch.randn(4, 2, 192, 2, 64, generator=draw, device=device).to(torch.bfloat16)
    documents = find_documents((torch.arange(192, device=device) // 80).expand(2, 192))
    results = []
    for kernel in (_flash, _blocked):
        one, two, three = (x.detach().requires_grad_() for x in (q, k, v))
        y = kernel(one, two, three, 70, documents)
        results.append([y.detach(), *torch.autograd.grad(y, [one, two, three], weight)])
    return max(float((one - other).float().norm() / other.float().norm()) for one, other in zip(*results))


def _flash(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int, documents: Documents | None) -> Tensor:
    """Run varlen_attn: every row, or every document of a row, is one sequence."""
    from torch.nn.attention.varlen import varlen_attn

    B, T = q_BTHD.shape[:2]
    if documents is None:
        starts = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q_BTHD.device)
    else:
        assert documents.starts_N is not None, "on CUDA find_documents has found the starts"
        starts = documents.starts_N
    y = varlen_attn(
        q_BTHD.flatten(0, 1), k_BTGD.flatten(0, 1), v_BTGD.flatten(0, 1), starts, starts, T, T,
        window_size=(window if window < T - 1 else -1, 0), enable_gqa=q_BTHD.shape[2] != k_BTGD.shape[2],
    )  # fmt: skip
    assert isinstance(y, Tensor), "no auxiliary output was asked for"
    return y.view_as(q_BTHD)


def sequence_starts(id_BT: Tensor) -> Tensor:
    """Return the flat start of every document and the end of the last, int32; rows are apart.

    Padded by empty sequences to B * (T // 128 + 1), doubled until it fits, plus 1: few shapes to compile. A bound of
    B * T would not do: FlashAttention's backward keeps 128 float32 rows for every sequence, and takes at most 65,535.
    """
    B, T = id_BT.shape
    is_start_BT = torch.ones_like(id_BT, dtype=torch.bool)
    is_start_BT[:, 1:] = id_BT[:, 1:] != id_BT[:, :-1]
    starts = is_start_BT.flatten().nonzero()[:, 0].to(torch.int32)
    size = B * (T // 128 + 1)
    while size < len(starts):
        size *= 2
    return torch.nn.functional.pad(starts, (0, size + 1 - len(starts)), value=B * T)


def _blocked(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int, documents: Documents | None) -> Tensor:
    """Multiply each block of queries with just the keys it can see."""
    T = q_BTHD.shape[1]
    q_BGRTD, k_BGTD, v_BGTD = _by_kv_head(q_BTHD, k_BTGD, v_BTGD)
    position_T = torch.arange(T, device=q_BTHD.device)
    blocks = []
    for lo in range(0, T, QUERY_BLOCK):
        hi = min(lo + QUERY_BLOCK, T)
        first = max(0, lo - window)
        distance = position_T[lo:hi, None] - position_T[None, first:hi]
        seen = (distance >= 0) & (distance <= window)
        if documents is not None:
            same = documents.id_BT[:, lo:hi, None] == documents.id_BT[:, None, first:hi]
            seen = (seen & same)[:, None, None]
        blocks.append(_softmax_product(q_BGRTD[:, :, :, lo:hi], k_BGTD[:, :, first:hi], v_BGTD[:, :, first:hi], seen))
    return _by_position(torch.cat(blocks, dim=3))


def _by_kv_head(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, D = q_BTHD.shape
    G = k_BSGD.shape[2]
    q_BGRTD = q_BTHD.view(B, T, G, H // G, D).permute(0, 2, 3, 1, 4)
    return q_BGRTD, k_BSGD.transpose(1, 2), v_BSGD.transpose(1, 2)


def _by_position(y_BGRTD: Tensor) -> Tensor:
    B, G, R, T, D = y_BGRTD.shape
    return y_BGRTD.permute(0, 3, 1, 2, 4).reshape(B, T, G * R, D)


def _softmax_product(q_BGRTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, seen: Tensor) -> Tensor:
    """Weigh values by softmax over the seen keys; the R query heads of a group share one product with its keys."""
    B, G, R, T, D = q_BGRTD.shape
    S = k_BGSD.shape[2]
    scores = q_BGRTD.reshape(B, G, R * T, D) @ k_BGSD.transpose(-1, -2)
    scores = scores.view(B, G, R, T, S).float() * D**-0.5
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1).to(q_BGRTD.dtype)
    return (weights.view(B, G, R * T, S) @ v_BGSD).view(B, G, R, T, D)
