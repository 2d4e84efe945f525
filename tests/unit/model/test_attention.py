"""Attention against a loop over single queries in float64: windows, grouped heads, documents, gradients."""

import math

import pytest
import torch
import torch.nn.attention.varlen
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanochat.model import attention as module
from nanochat.model.attention import attention, find_documents, sequence_starts, uses_flash


def random_qkv(B=2, T=9, H=4, G=2, D=8, S=None, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, T, H, D), (B, S or T, G, D), (B, S or T, G, D))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def naive(q, k, v, window: int, document=None) -> Tensor:
    """Attend one query and head at a time, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    B, T, H, D = q.shape
    rows = []
    for b in range(B):
        for t in range(T):
            seen = [
                s for s in range(k.shape[1])
                if t - window <= s <= t and (document is None or document[b, s] == document[b, t])
            ]  # fmt: skip
            for h in range(H):
                g = h * k.shape[2] // H
                weights = torch.softmax(k[b, seen, g] @ q[b, t, h] / math.sqrt(D), dim=0)
                rows.append(weights @ v[b, seen, g])
    return torch.stack(rows).view(B, T, H, D)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("window", [0, 1, 5, 127, 128, 129, 10_000])
@pytest.mark.parametrize("T", [1, 128, 150])
def test_windows_over_real_block_borders(window, T):
    q, k, v = random_qkv(B=1, T=T, H=2, G=1)
    assert_near(attention(q, k, v, window=window), naive(q, k, v, window))


@pytest.mark.parametrize(("H", "G"), [(1, 1), (3, 3), (4, 2), (6, 2), (4, 1)])
def test_query_heads_share_the_right_kv_head(H, G):
    q, k, v = random_qkv(H=H, G=G)
    assert_near(attention(q, k, v, window=4), naive(q, k, v, 4))


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(1, 14),
    window=st.integers(0, 16),
    borders=st.lists(st.integers(1, 13), max_size=5),
    block=st.integers(1, 6),
    seed=st.integers(0, 9),
)
def test_blocks_documents_and_windows_in_any_combination(T, window, borders, block, seed):
    q, k, v = random_qkv(T=T, seed=seed)
    document = torch.stack([torch.tensor([sum(t >= border for border in borders) for t in range(T)]), torch.arange(T)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUERY_BLOCK", block)
        y = attention(q, k, v, window=window, documents=find_documents(document))
    assert_near(y, naive(q, k, v, window, document=document))


@pytest.mark.parametrize("window", [0, 3, 100])
@pytest.mark.parametrize("with_documents", [False, True])
def test_gradients(window, with_documents, monkeypatch):
    monkeypatch.setattr(module, "QUERY_BLOCK", 4)
    inputs = [x.requires_grad_() for x in random_qkv(T=11)]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    document = (torch.arange(11) // 4).expand(2, 11) if with_documents else None
    weight = torch.randn(2, 11, 4, 8, generator=torch.Generator().manual_seed(5))
    documents = find_documents(document) if with_documents else None
    (attention(*inputs, window=window, documents=documents) * weight).sum().backward()
    (naive(*doubles, window, document=document) * weight).sum().backward()
    for ours, theirs in zip(inputs, doubles):
        assert_near(ours.grad, theirs.grad)


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_extreme_scores_stay_finite_and_right(scale):
    """Each query takes one key's value as it is; where two scores are near, float32 has them 1e-3 apart."""
    q, k, v = random_qkv(T=20)
    inputs = [(scale * q).requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    y = attention(*inputs, window=100)
    assert_near(y.detach(), naive(scale * q, k, v, 100), 2e-3)
    y.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    weights_of_v = inputs[2].grad.sum(dim=1)  # every query's weights sum to 1: 20 queries of H / G = 2 heads
    assert_near(weights_of_v, torch.full((2, 2, 8), 40.0, dtype=torch.float64), 1e-3)


def test_bfloat16_is_near_float64():
    """Stated tolerance: 2 % of the values' scale (1), of which bf16 weights and values make up 0.4 % each."""
    q, k, v = random_qkv(T=150, dtype=torch.bfloat16)
    y = attention(q, k, v, window=60)
    assert y.dtype == torch.bfloat16
    assert_near(y, naive(q, k, v, 60), 0.02)


def naive_starts(document: Tensor) -> list[int]:
    B, T = document.shape
    return [b * T + t for b in range(B) for t in range(T) if t == 0 or document[b, t] != document[b, t - 1]]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), B=st.integers(1, 4), T=st.integers(1, 40))
def test_sequence_starts_are_the_borders_of_documents_and_rows(data, B, T):
    document = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 1), min_size=T, max_size=T), min_size=B, max_size=B))
    )
    expected = naive_starts(document)
    starts = sequence_starts(document)
    assert starts.dtype == torch.int32
    assert starts[: len(expected)].tolist() == expected
    assert set(starts[len(expected) :].tolist()) == {B * T}
    assert len(starts) - 1 <= max(B * (T // 128 + 1), 2 * len(expected) - 1)


@pytest.mark.parametrize("document_tokens", [64, 2048])
def test_sequence_starts_stay_few_and_of_one_length(document_tokens):
    """FlashAttention's backward allocates 128 float32 rows per sequence and its grid ends at 65,535 sequences."""
    B, T = 32, 2048
    documents = (torch.arange(T) // document_tokens).expand(B, T)
    assert len(sequence_starts(documents)) - 1 <= 2 * B * max(T // 128 + 1, T // document_tokens)


def naive_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    """What torch.nn.attention.varlen.varlen_attn documents, one sequence at a time."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    assert right == 0
    y = torch.full_like(query, float("nan"))
    for lo, hi in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:]):
        assert hi - lo <= max_q == max_k
        if hi > lo:
            parts = (x[None, lo:hi] for x in (query, key, value))
            y[lo:hi] = naive(*parts, window=left if left >= 0 else 10**9)[0]
    return y


@pytest.mark.parametrize("window", [0, 3, 10, 11, 12, 500])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("G", [1, 4])
def test_flash_is_called_as_its_documentation_asks(window, with_documents, G, monkeypatch):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", naive_varlen)
    q, k, v = random_qkv(T=12, G=G)
    document = torch.tensor([[0] * 5 + [1] * 7, list(range(12))]) if with_documents else None
    documents = module.Documents(document, sequence_starts(document)) if with_documents else None
    assert_near(module._flash(q, k, v, window, documents), naive(q, k, v, window, document=document))


def test_cpu_does_not_use_flash():
    assert not uses_flash(torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16))
    assert find_documents(torch.zeros(1, 4, dtype=torch.int64)).starts_N is None


@pytest.fixture
def hopper(monkeypatch):
    """A device that says that it is a Hopper, and what activates and restores the kernels of FlashAttention."""
    active = []
    monkeypatch.setattr(module, "uses_flash", lambda q: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(module, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(module, "current_flash_attention_impl", lambda: active[-1] if active else None)
    monkeypatch.setattr(module, "restore_flash_attention_impl", active.clear)
    return active


@pytest.mark.parametrize("factor", [1.0, 1.001, 1.1, float("nan")])
def test_flash_attention_3_stays_if_its_numbers_are_right(hopper, monkeypatch, factor):
    monkeypatch.setattr(module, "_flash", lambda q, *rest: module._blocked(q, *rest) * factor)
    said = module.choose_flash(torch.device("cpu"), torch.bfloat16)
    if factor < 1.01:
        assert (said, hopper) == ("FlashAttention 3", ["FA3"])
    else:
        assert said.startswith("FlashAttention 2; not 3: it is off by ")
        assert hopper == []


def test_without_flash_attention_3_the_reason_is_said(hopper, monkeypatch):
    monkeypatch.setattr(module, "activate_flash_attention_impl", torch.nn.attention.activate_flash_attention_impl)
    said = module.choose_flash(torch.device("cpu"), torch.bfloat16)
    assert said == "FlashAttention 2; not 3: No module named 'flash_attn_interface'"


def test_other_devices_do_not_try_it(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert module.choose_flash(torch.device("cpu"), torch.bfloat16) == "FlashAttention 2"
    monkeypatch.setattr(module, "uses_flash", uses_flash)
    assert module.choose_flash(torch.device("cpu"), torch.bfloat16) == "blocked products"
    assert hopper == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_a_gpu_chooses_agrees_with_the_blocked_products():
    said = module.choose_flash(torch.device("cuda"), torch.bfloat16)
    assert said.startswith("FlashAttention ")
    assert module._flash_error(torch.device("cuda")) < module.FLASH_TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [0, 1, 64, 200, 299, 1000])
@pytest.mark.parametrize("document_tokens", [None, 1, 70])
@pytest.mark.parametrize(("H", "G", "D"), [(4, 4, 64), (4, 1, 128)])
def test_flash_equals_blocked(window, document_tokens, H, G, D):
    qkv = [x.cuda() for x in random_qkv(T=300, H=H, G=G, D=D, dtype=torch.bfloat16)]
    assert uses_flash(qkv[0])
    documents = None
    if document_tokens:
        documents = find_documents((torch.arange(300, device="cuda") // document_tokens).expand(2, 300))
    weight = torch.randn(2, 300, H, D, device="cuda")
    results = []
    for kernel in (module._flash, module._blocked):
        inputs = [x.detach().requires_grad_() for x in qkv]
        y = kernel(*inputs, window, documents)
        (y * weight).sum().backward()
        results.append([y, *(x.grad for x in inputs)])
    for flash, blocked in zip(*results):
        # where a query sees itself alone, the gradients of q and k are 0, and FlashAttention's rounding
        assert (flash - blocked).float().norm() < 0.02 * blocked.float().norm() + 1e-3
