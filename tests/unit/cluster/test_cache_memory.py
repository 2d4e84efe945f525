"""Keys and values that do not fit are refused before they are allocated, by the engine and by rollout actors."""

from types import SimpleNamespace

import pytest
import torch

from nanochat.config.model import ModelConfig
from nanochat.config.rl import RolloutsConfig
from nanochat.errors import ConfigError
from nanochat.inference import engine as engines
from nanochat.inference.engine import Engine
from nanochat.inference.paged_cache import PAGE_TOKENS, PagedKVCache, cache_bytes
from nanochat.model.gpt import GPT
from nanochat.training.hardware import Hardware

MODEL = ModelConfig(sequence_len=64, vocab_size=64, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)
HARDWARE = Hardware(torch.device("cpu"), torch.bfloat16, "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_those_of_the_cache(dtype):
    cache = PagedKVCache(MODEL, 5, dtype)
    assert cache_bytes(MODEL, 5, dtype) == cache.k_LGPSD.nbytes + cache.v_LGPSD.nbytes


def test_the_engine_refuses_what_does_not_fit(monkeypatch):
    needed = cache_bytes(MODEL, 2 * 64 // PAGE_TOKENS + 1, torch.float32)
    monkeypatch.setattr(Hardware, "free_bytes", lambda self: needed)
    assert Engine(GPT(MODEL), max_running=2).capacity == 64
    monkeypatch.setattr(Hardware, "free_bytes", lambda self: needed - 1)
    monkeypatch.setattr(engines, "PagedKVCache", lambda *arguments: pytest.fail("it is allocated"))
    with pytest.raises(ConfigError, match=r"^max_running=2: the keys and values of 128 tokens need 0\.00 GiB, the dev"):
        Engine(GPT(MODEL), max_running=2)


@pytest.mark.parametrize("processes", [1, 3])
def test_an_actor_refuses_what_is_more_than_its_share(monkeypatch, processes):
    from nanochat.cluster.rollouts import check_share

    spec = SimpleNamespace(model=MODEL, rollouts=RolloutsConfig(running=4), processes=processes)
    weights = 2 * sum(parameter.numel() for parameter in GPT(MODEL).parameters())
    needed = weights + cache_bytes(MODEL, 4 * 64 // PAGE_TOKENS, torch.bfloat16)
    monkeypatch.setattr(Hardware, "total_bytes", lambda self: processes * needed + processes)
    check_share(spec, HARDWARE)
    monkeypatch.setattr(Hardware, "total_bytes", lambda self: processes * needed - processes)
    with pytest.raises(ConfigError, match=r"^running=4: weights, keys and values need 0\.00 GiB, an actor's share of"):
        check_share(spec, HARDWARE)
