"""Sizes, windows and refusals of the model config."""

import subprocess
import sys

import pytest

from nanochat.config.model import STOCK, ModelConfig, stock
from nanochat.errors import ConfigError


@pytest.mark.parametrize(("sequence_len", "pattern", "n_layer", "windows"), [
    (2048, "SSSL", 8, [512, 512, 512, 2048] * 2),
    (2048, "SSSL", 6, [512, 512, 512, 2048, 512, 2048]),
    (2048, "S", 3, [512, 512, 2048]),
    (2048, "L", 2, [2048, 2048]),
    (640, "SL", 4, [256, 640, 256, 640]),
    (512, "SL", 2, [128, 512]),
    (513, "SL", 2, [256, 513]),
    (100, "SSL", 3, [128, 128, 100]),
    (2048, "SSL", 1, [2048]),
])  # fmt: skip
def test_windows(sequence_len, pattern, n_layer, windows):
    assert ModelConfig(sequence_len=sequence_len, window_pattern=pattern, n_layer=n_layer).windows == windows


@pytest.mark.parametrize(("n_layer", "layers"), [(1, [0]), (2, [1]), (5, [0, 2, 4]), (6, [1, 3, 5])])
def test_every_second_layer_and_the_last_have_value_embeddings(n_layer, layers):
    config = ModelConfig(n_layer=n_layer)
    assert [layer for layer in range(n_layer) if config.has_value_embedding(layer)] == layers
    assert not any(stock(config).has_value_embedding(layer) for layer in range(n_layer))


@pytest.mark.parametrize(("vocab_size", "padded"), [(1, 64), (64, 64), (65, 128), (310, 320), (32_768, 32_768)])
def test_vocabulary_is_padded_to_64(vocab_size, padded):
    assert ModelConfig(vocab_size=vocab_size).padded_vocab_size == padded


@pytest.mark.parametrize(("fields", "message"), [
    ({"n_layer": 0}, "n_layer=0: must be at least 1"),
    ({"vocab_size": -5}, "vocab_size=-5: must be at least 1"),
    ({"n_head": 0}, "n_head=0: must be at least 1"),
    ({"n_head": 5}, "n_head=5: n_embd / n_head must be even"),
    ({"n_embd": 30, "n_head": 6, "smear": False}, "n_head=6: n_embd / n_head must be even"),
    ({"n_kv_head": 4}, "n_kv_head=4: must divide n_head"),
    ({"window_pattern": "SXL"}, "window_pattern='SXL': only the letters S and L"),
    ({"window_pattern": ""}, "window_pattern='': only the letters S and L"),
    ({"n_embd": 12, "n_head": 2, "n_kv_head": 1, "smear": True}, "n_embd=12: smear needs at least 24 channels"),
    ({"n_embd": 8, "n_head": 2, "n_kv_head": 1}, "n_embd=8: value_embeddings needs at least 12 channels"),
    ({"logit_softcap": 0.0}, "logit_softcap=0.0: must lie in"),
    ({"logit_softcap": 100.0}, "logit_softcap=100.0: must lie in"),
    ({"logit_softcap": float("nan")}, "logit_softcap=nan: must lie in"),
    ({"rope_theta": 0.0}, "rope_theta=0.0: must be above 1"),
])  # fmt: skip
def test_refusals_name_field_value_and_rule(fields, message):
    with pytest.raises(ConfigError) as error:
        ModelConfig(**fields)
    assert message in str(error.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        ModelConfig(n_head=5, n_kv_head=3, window_pattern="?")
    assert all(field in str(error.value) for field in ("n_head=5", "n_kv_head=3", "window_pattern='?'"))


def test_stock_changes_the_parts_and_keeps_the_sizes():
    config = ModelConfig(n_layer=7, n_embd=256, n_head=4, n_kv_head=2, vocab_size=999, smear=True)
    plain = stock(config)
    assert {name: getattr(plain, name) for name in STOCK} == STOCK
    for name, value in vars(config).items():
        if name not in STOCK:
            assert getattr(plain, name) == value


def test_importing_the_config_loads_neither_torch_nor_ray():
    code = "import sys, nanochat.config.model; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0
