"""Decoding with the cache against the forward without one: ragged rows, windows, chunks, reuse, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanochat.config.model import ModelConfig
from nanochat.errors import ConfigError
from nanochat.inference.kv_cache import KVCache
from nanochat.model.gpt import GPT


@pytest.fixture(scope="module")
def model():
    """Random in every parameter, windows 2 and 8 where rows have up to 16 tokens, grouped heads, smear on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.config.model.SHORT_WINDOW_MULTIPLE", 2)
        yield random_model()


def random_model(dtype: torch.dtype = torch.float32) -> GPT:
    config = ModelConfig(
        sequence_len=8, vocab_size=50, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL", smear=True
    )
    model = GPT(config, dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5, generator=generator)
    return model


def some_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(rows * 100 + length))


def feed(model: GPT, cache: KVCache, pieces: list[Tensor], padding: int = 7) -> list[Tensor]:
    """Run one forward over pieces of any lengths, padded on the right, and return each row's real hidden states."""
    width = max(1, *(len(piece) for piece in pieces))
    tokens = torch.full((len(pieces), width), padding)
    for row, piece in enumerate(pieces):
        tokens[row, : len(piece)] = piece
    with torch.no_grad():
        hidden = model(tokens, cache)
    cache.advance([len(piece) for piece in pieces])
    return [hidden[row, : len(piece)] for row, piece in enumerate(pieces)]


def assert_equals_full_forward(model: GPT, row: Tensor, outputs: list[Tensor]) -> None:
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(outputs), model(row[None])[0], rtol=0, atol=1e-5)


def test_token_by_token_equals_full_forward(model):
    tokens = some_tokens(3, 14)
    cache = KVCache(model.config, 3, 14, torch.float32)
    outputs = [feed(model, cache, list(tokens[:, t : t + 1])) for t in range(14)]
    for row in range(3):
        assert_equals_full_forward(model, tokens[row], [step[row] for step in outputs])


def test_ragged_prompts_then_decoding_equals_full_forward(model):
    lengths = [1, 9, 4, 12]
    tokens = some_tokens(4, 16)
    cache = KVCache(model.config, 4, 16, torch.float32)
    outputs = [[piece] for piece in feed(model, cache, [tokens[row, :n] for row, n in enumerate(lengths)])]
    assert cache.lengths == cache.start_B.tolist() == lengths
    for _ in range(4):
        pieces = [tokens[row, cache.lengths[row] : cache.lengths[row] + 1] for row in range(4)]
        for row, piece in enumerate(feed(model, cache, pieces)):
            outputs[row].append(piece)
    for row, n in enumerate(lengths):
        assert_equals_full_forward(model, tokens[row, : n + 4], outputs[row])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_schedule_of_chunks_equals_full_forward(model, data):
    """Each call gives each row any number of its next tokens, none included."""
    lengths = data.draw(st.lists(st.integers(1, 16), min_size=1, max_size=3), label="lengths")
    tokens = some_tokens(len(lengths), 16)
    cache = KVCache(model.config, len(lengths), 16 + 16, torch.float32)
    outputs: list[list[Tensor]] = [[] for _ in lengths]
    while cache.lengths != lengths:
        left = [n - done for n, done in zip(lengths, cache.lengths)]
        counts = [data.draw(st.integers(0, n), label="count") for n in left]
        if not any(counts):
            counts = [min(n, 1) for n in left]
        pieces = [tokens[row, done : done + n] for row, (done, n) in enumerate(zip(cache.lengths, counts))]
        for row, piece in enumerate(feed(model, cache, pieces)):
            outputs[row].append(piece)
    for row, n in enumerate(lengths):
        assert_equals_full_forward(model, tokens[row, :n], outputs[row])


def test_a_row_does_not_notice_its_company(model):
    """Padding, other rows' tokens and other rows' lengths change nothing in a row."""
    tokens = some_tokens(2, 12)
    results = []
    for other, padding in ((tokens[1, :1], 3), (tokens[1, :11], 44)):
        cache = KVCache(model.config, 2, 16, torch.float32)
        outputs = feed(model, cache, [tokens[0, :5], other], padding)[0]
        step = feed(model, cache, [tokens[0, 5:6], tokens[1, 11:12]])[0]
        results.append(torch.cat([outputs, step]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


def test_reset_rows_start_afresh_and_leave_the_others(model):
    tokens = some_tokens(2, 12)
    cache = KVCache(model.config, 2, 12, torch.float32)
    first = feed(model, cache, [tokens[0, :6], tokens[1, :9]])
    cache._k_LBGSD[:, 1] = cache._v_LBGSD[:, 1] = cache._previous_BC[1] = float("nan")  # what an overflow leaves
    cache.reset([1])
    assert cache.lengths == cache.start_B.tolist() == [6, 0]
    second = feed(model, cache, [tokens[0, 6:9], tokens[1, :2]])
    assert_equals_full_forward(model, tokens[0, :9], [first[0], second[0]])
    assert_equals_full_forward(model, tokens[1, :2], [second[1]])
    cache.reset()
    assert cache.lengths == [0, 0]
    third = feed(model, cache, [tokens[1, :4], tokens[0, :3]])
    assert_equals_full_forward(model, tokens[1, :4], [third[0]])
    assert_equals_full_forward(model, tokens[0, :3], [third[1]])


def test_bfloat16_cache_is_near_the_full_forward():
    """Stated tolerance: 3 % in norm."""
    model = random_model(torch.bfloat16)
    tokens = some_tokens(2, 10)
    cache = KVCache(model.config, 2, 10, torch.bfloat16)
    outputs = [feed(model, cache, list(tokens[:, t : t + 1])) for t in range(10)]
    with torch.no_grad():
        expected = model(tokens).float()
    actual = torch.stack([torch.cat([step[row] for step in outputs]) for row in range(2)]).float()
    assert (actual - expected).norm() < 0.03 * expected.norm()


def test_a_full_row_is_refused_before_anything_is_written(model):
    tokens = some_tokens(2, 9)
    cache = KVCache(model.config, 2, 8, torch.float32)
    feed(model, cache, [tokens[0, :3], tokens[1, :7]])
    before = cache._k_LBGSD.clone()
    with pytest.raises(ConfigError, match="capacity=8: row 1 would hold 9 tokens, padding included"):
        feed(model, cache, [tokens[0, 3:5], tokens[1, 7:9]])
    assert torch.equal(cache._k_LBGSD, before)
    assert cache.lengths == [3, 7]
    feed(model, cache, [tokens[0, 3:4], tokens[1, 7:8]])
    assert cache.lengths == [4, 8]


@pytest.mark.parametrize(("rows", "capacity", "message"), [(0, 8, "rows=0"), (2, 0, "capacity=0")])
def test_empty_caches_are_refused(rows, capacity, message, model):
    with pytest.raises(ConfigError, match=message):
        KVCache(model.config, rows, capacity, torch.float32)


def test_products_read_the_cache_in_place(model):
    """Heads before slots in memory: a copy of all keys for every new token would cost more than the token."""
    cache = KVCache(model.config, 2, 16, torch.float32)
    k, v = cache.append(1, torch.ones(2, 3, 2, 8), torch.ones(2, 3, 2, 8))
    assert k.shape == v.shape == (2, 3, 2, 8)
    for view, whole in ((k, cache._k_LBGSD), (v, cache._v_LBGSD)):
        assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        view.transpose(1, 2).view(2 * 2, 3, 8)  # batch and heads fold without a copy


def test_no_graph_is_kept(model):
    cache = KVCache(model.config, 1, 8, torch.float32)
    model(some_tokens(1, 4), cache)
    cache.advance(4)
    assert not cache._k_LBGSD.requires_grad
    assert not cache._previous_BC.requires_grad
