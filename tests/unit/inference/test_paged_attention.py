"""The kernel for sequences that decode: what torch's products give, of any pages, heads and windows, or nothing."""

import logging
import random
import shutil
from dataclasses import replace

import pytest
import torch
from test_paged_cache import CONFIG, piecewise, randomise, sequences, whole

from nanochat.inference import paged_attention
from nanochat.inference.completions import complete
from nanochat.inference.engine import Engine
from nanochat.inference.paged_attention import decoding_attention
from nanochat.inference.paged_cache import PAGE_TOKENS, Chunk, FlatBatch, PagedKVCache
from nanochat.inference.requests import Request
from nanochat.model.gpt import GPT

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
PAGES = 40


def exact(q_BHD, k_GPSD, v_GPSD, firsts, tables, places, window) -> torch.Tensor:
    """One sequence and head after the other, in float64."""
    (B, H, D), G = q_BHD.shape, len(k_GPSD)
    out = torch.empty(B, H, D, dtype=torch.float64)
    for b in range(B):
        seen = range(max(0, places[b] - window), places[b] + 1)
        slots = [(tables[b][place // PAGE_TOKENS - firsts[b]], place % PAGE_TOKENS) for place in seen]
        for h in range(H):
            of_group = (one[h * G // H] for one in (k_GPSD, v_GPSD))
            k, v = (torch.stack([one[page, slot] for page, slot in slots]).double() for one in of_group)
            out[b, h] = torch.softmax(k @ q_BHD[b, h].double() * D**-0.5, 0) @ v
    return out


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 64), (4, 1, 16), (6, 2, 48), (2, 2, 128)])
@pytest.mark.parametrize("window", [0, 1, 31, 40, 1000])
def test_it_gives_what_a_sum_over_all_tokens_gives(dtype, heads, groups, size, window):
    draw, generator = random.Random(window), torch.Generator().manual_seed(window)
    kernel = decoding_attention(size, PAGE_TOKENS, dtype)
    k_GPSD, v_GPSD = (torch.randn(groups, PAGES, PAGE_TOKENS, size, generator=generator).to(dtype) for _ in range(2))
    places = [0, 1, 30, 31, 32, 33, 63, 64, 95, 96, 130]
    firsts = [max(0, place - window) // PAGE_TOKENS for place in places]
    counts = [place // PAGE_TOKENS + 1 - first for place, first in zip(places, firsts)]
    free = list(range(1, PAGES))
    draw.shuffle(free)
    tables = [[free.pop() for _ in range(count)] + [0] * (max(counts) - count) for count in counts]
    # Rows that lie apart, as the parts of one product of queries, keys and values do; strong scores among them.
    all_BXD = torch.randn(len(places), heads + 2 * groups, size, generator=generator).to(dtype)
    all_BXD[3:6, :heads] *= 4
    q_BHD, k_BGD, v_BGD = all_BXD.split([heads, groups, groups], dim=1)
    before = k_GPSD.clone(), v_GPSD.clone()
    for paged, new in zip(before, (k_BGD, v_BGD), strict=True):
        for b, place in enumerate(places):
            paged[:, tables[b][place // PAGE_TOKENS - firsts[b]], place % PAGE_TOKENS] = new[b]
    actual = kernel(
        q_BHD, k_BGD, v_BGD, k_GPSD, v_GPSD, torch.tensor(firsts), torch.tensor(tables).flatten(),
        torch.tensor(places), window,
    )  # fmt: skip
    assert torch.equal(k_GPSD, before[0]), "the new ones are in their places and nothing else has changed"
    assert torch.equal(v_GPSD, before[1])
    expected = exact(q_BHD, k_GPSD, v_GPSD, firsts, tables, places, window)
    # float32: scores are up to 30, so exponents are known to some 3e-6; bfloat16: half of a last place of the result.
    tolerance = {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-5}
    torch.testing.assert_close(actual.double(), expected, **tolerance)


@needs_compiler
@pytest.mark.parametrize("pause", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("sizes", [[1], [1] * 9 + [33], [1] * 30 + [2, 70]])
def test_sequences_that_decode_have_the_logits_of_a_whole_forward(monkeypatch, sizes, pause):
    """They pause, end, and compute longer chunks in between, beside others; short windows begin within a page."""
    monkeypatch.setattr("nanochat.config.model.SHORT_WINDOW_MULTIPLE", 40)
    model = GPT(replace(CONFIG, n_embd=64))
    randomise(model)
    model.eval()
    assert PagedKVCache(model.config, 2, torch.float32).kernel is not None
    tokens_of = sequences(6, seed=len(sizes))
    for got, tokens in zip(piecewise(model, tokens_of, sizes, 1, pause), tokens_of, strict=True):
        torch.testing.assert_close(got, whole(model, tokens), rtol=0, atol=2e-4)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_threads_nor_company_change_a_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    kernel = decoding_attention(32, PAGE_TOKENS, dtype)
    k_GPSD, v_GPSD = (torch.randn(2, 18, PAGE_TOKENS, 32, generator=generator).to(dtype) for _ in range(2))
    q, k, v = (torch.randn(8, count, 32, generator=generator).to(dtype) for count in (4, 2, 2))
    tables, places, firsts = torch.arange(1, 17).view(8, 2), torch.arange(20, 60, 5), torch.zeros(8, dtype=torch.int64)

    def run(rows: slice) -> torch.Tensor:
        return kernel(q[rows], k[rows], v[rows], k_GPSD, v_GPSD, firsts[rows], tables[rows].flatten(), places[rows], 99)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = run(slice(0, 8))
        assert torch.equal(torch.cat([run(slice(row, row + 1)) for row in range(8)]), together)
        torch.set_num_threads(3)
        assert torch.equal(run(slice(0, 8)), together)
    finally:
        torch.set_num_threads(threads)


def test_without_a_kernel_given_tokens_and_drawn_ones_are_one_group():
    """CUDA graphs have one for each number of tokens, and know nothing of groups."""
    cache = PagedKVCache(CONFIG, 4, torch.float32)
    cache.kernel = None
    batch = cache.batch([Chunk([5], 40, 7, [1, 2]), Chunk([5], 32, 7, [1, 3], is_given=True)])
    assert [group.row_BT for group in batch._groups] == [None]


@needs_compiler
def test_the_last_token_of_a_prompt_is_computed_as_the_others_before_it(monkeypatch):
    """Whether they were computed before or are in the cache: alone it would be one token of a sequence, too."""
    model = GPT(replace(CONFIG, n_embd=64))
    randomise(model)
    engine, seen = Engine(model.eval(), max_running=4), []
    decode = FlatBatch._decode

    def kept(batch, group, layer, *tensors):
        seen.extend(chunk.start for chunk in group.chunks if layer == 0)
        return decode(batch, group, layer, *tensors)

    monkeypatch.setattr(FlatBatch, "_decode", kept)
    request = Request(prompt=tuple(range(2 * PAGE_TOKENS + 1)), max_new_tokens=3)
    for _ in range(2):
        (found,) = complete(engine, [request])
        # The first new token is drawn from the prompt's last, the others at places 65 and 66.
        assert (len(found.tokens), seen) == (3, [65, 66])
        seen.clear()
    assert engine.load().prefix_hits == 2 * PAGE_TOKENS


@pytest.fixture
def anew():
    """Nothing is known of earlier builds."""
    decoding_attention.cache_clear()
    yield
    decoding_attention.cache_clear()


def test_without_a_compiler_torchs_products_do_it(anew, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    cache = PagedKVCache(replace(CONFIG, n_embd=64), 2, torch.float32)
    assert cache.kernel is None
    q = torch.randn(1, 1, 4, 16)
    kv = torch.randn(1, 1, 2, 16)
    batch = cache.batch([Chunk([5], 0, -1, [1])])
    seen = batch.attend(0, q, kv, kv, cache.windows[0])
    torch.testing.assert_close(seen[0, 0], kv[0, 0].repeat_interleave(2, 0))


@pytest.mark.parametrize("compiler", ["nowhere/g++", "false", "true"])
def test_a_compiler_that_fails_is_named_and_torchs_products_do_it(anew, monkeypatch, caplog, compiler):
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING):
        assert decoding_attention(32, PAGE_TOKENS, torch.float32) is None
    (record,) = caplog.records
    assert record.getMessage().startswith(f"attention by torch's products: {compiler} built no kernel (")


@pytest.mark.parametrize(("size", "dtype"), [(24, torch.float32), (32, torch.float64), (32, torch.float16)])
def test_there_is_no_kernel_for_other_heads(anew, monkeypatch, size, dtype):
    monkeypatch.setattr(paged_attention.subprocess, "run", lambda *_, **__: pytest.fail("it is built"))
    assert decoding_attention(size, PAGE_TOKENS, dtype) is None
