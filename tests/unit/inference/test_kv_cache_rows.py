"""Copies of cache rows, and the prefill that needs no cached keys, against the forward without a cache."""

import pytest
import torch
from test_kv_cache import assert_equals_full_forward, feed, random_model, some_tokens

from nanochat.errors import ConfigError
from nanochat.inference.kv_cache import KVCache
from nanochat.model import attention as attention_module
from nanochat.model import gpt as gpt_module
from nanochat.model.attention import attention


@pytest.fixture(scope="module")
def model():
    """Random in every parameter, windows 2 and 8 where rows have up to 16 tokens, grouped heads, smear on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.config.model.SHORT_WINDOW_MULTIPLE", 2)
        yield random_model()


def test_taken_rows_go_on_apart_and_leave_the_source_as_it_was(model):
    tokens = some_tokens(4, 16)
    cache = KVCache(model.config, 3, 9, torch.float32)
    prompts = [tokens[0, :5], tokens[1, :9], tokens[2, :2]]
    first = feed(model, cache, prompts)
    rows = [2, 0, 0, 2]
    taken = cache.take(rows, 16)
    assert taken.lengths == taken.start_B.tolist() == [2, 5, 5, 2]
    ends = [tokens[3, :6], tokens[3, 6:9], tokens[3, 9:14], tokens[3, 1:2]]
    outputs = feed(model, taken, ends)
    for place, row in enumerate(rows):
        assert_equals_full_forward(model, torch.cat([prompts[row], ends[place]]), [first[row], outputs[place]])
    assert cache.lengths == [5, 9, 2]
    cache = cache.take([0, 1, 2], 16)  # all rows, with more room
    outputs = feed(model, cache, [tokens[3, :4], tokens[3, :1], tokens[3, 2:9]])
    for row, end in enumerate((tokens[3, :4], tokens[3, :1], tokens[3, 2:9])):
        assert_equals_full_forward(model, torch.cat([prompts[row], end]), [first[row], outputs[row]])


def test_rows_that_do_not_fit_are_not_taken(model):
    cache = KVCache(model.config, 2, 8, torch.float32)
    feed(model, cache, [some_tokens(1, 7)[0], some_tokens(1, 3)[0]])
    with pytest.raises(ConfigError, match="capacity=6: a row to take holds 7 tokens"):
        cache.take([1, 0], 6)
    assert cache.take([1], 6).lengths == [3]
    with pytest.raises(ConfigError, match="rows=0"):
        cache.take([], 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_computes_what_the_cached_path_does(dtype, monkeypatch):
    """The calls for an empty cache are answered a second time by the path for caches that hold something."""
    monkeypatch.setattr("nanochat.config.model.SHORT_WINDOW_MULTIPLE", 2)
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", 4)
    model, seen = random_model(dtype), []

    def both(q, k, v, *, window, start_B=None, documents=None):
        y = attention(q, k, v, window=window, start_B=start_B, documents=documents)
        start = torch.zeros(len(q), dtype=torch.int64)
        seen.append((start_B, y, attention(q, k, v, window=window, start_B=start)))
        return y

    monkeypatch.setattr(gpt_module, "attention", both)
    cache = KVCache(model.config, 2, 16, dtype)
    tokens = some_tokens(2, 11)
    feed(model, cache, [tokens[0], tokens[1, :4]])
    assert len(seen) == 3
    for start_B, fast, dense in seen:
        assert start_B is None
        torch.testing.assert_close(fast, dense, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)
    feed(model, cache, [tokens[1, :1], tokens[1, :1]])
    assert all(start_B is not None for start_B, *_ in seen[3:])
