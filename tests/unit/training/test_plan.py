"""What a config resolves to: the dial's overrides and their errors."""

import pytest

from nanochat.config.model import STOCK, ModelConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.errors import ConfigError
from nanochat.model.gpt import GPT
from nanochat.training.plan import (
    resolve,
    resolve_model,
)


def test_every_part_can_be_overridden():
    config = PretrainConfig(
        depth=6, head_dim=32, n_embd=192, n_kv_head=2, window_pattern="SL", value_embeddings=False,
        residual_scalars=False, backout=False, smear=True,
    )  # fmt: skip
    assert resolve_model(config, 1000, 256) == ModelConfig(
        sequence_len=256, vocab_size=1000, n_layer=6, n_head=6, n_kv_head=2, n_embd=192, window_pattern="SL",
        value_embeddings=False, residual_scalars=False, backout=False, smear=True,
    )  # fmt: skip


def test_stock_turns_every_part_off_and_a_field_turns_one_on_again():
    model = resolve_model(PretrainConfig(depth=2, architecture="stock"), 1000, 256)
    assert {name: getattr(model, name) for name in STOCK} == STOCK
    model = resolve_model(PretrainConfig(depth=2, architecture="stock", backout=True, window_pattern="SL"), 1000, 256)
    assert {name: getattr(model, name) for name in STOCK} == STOCK | {"backout": True, "window_pattern": "SL"}


def test_batch_horizon_and_rates_can_be_overridden():
    free = resolve(PretrainConfig(depth=12), 32_768, 2048)
    given = resolve(PretrainConfig(depth=12, global_batch_tokens=2**16, num_steps=7), 32_768, 2048)
    assert (given.num_steps, given.rows_per_step, given.tokens_per_step) == (7, 32, 2**16)
    assert given.lr_factor == pytest.approx(free.lr_factor * 8**-0.5)
    assert given.weight_decay == pytest.approx(free.weight_decay * 8**-0.5)
    as_for = resolve(PretrainConfig(depth=12, global_batch_tokens=2**16, lr_batch_tokens=2**21), 32_768, 2048)
    assert as_for.lr_factor == pytest.approx(2.0)
    assert as_for.weight_decay == pytest.approx(0.56)
    assert as_for.rows_per_step == 32
    assert resolve(PretrainConfig(depth=12, weight_decay=0.1), 32_768, 2048).weight_decay == pytest.approx(0.1)
    half = resolve(PretrainConfig(depth=12, tokens_per_parameter=6.0), 32_768, 2048)
    assert half.num_steps == free.num_steps // 2


def test_the_plan_as_json_has_the_whole_model_and_its_size():
    plan = resolve(PretrainConfig(depth=2, num_steps=3), 1000, 256)
    record = plan.as_json()
    assert ModelConfig(**record["model"]) == plan.model
    assert record["num_steps"] == 3
    assert record["parameters"]["total"] == sum(p.numel() for p in GPT(plan.model).parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 100}, "n_embd=100: must be a multiple of head_dim=128. Change one of them."),
        (
            {"global_batch_tokens": 5000},
            "global_batch_tokens=5000: must be a multiple of the row's 2048 tokens. 4096 is one.",
        ),
        (
            {"global_batch_tokens": 1},
            "global_batch_tokens=1: must be a multiple of the row's 2048 tokens. 2048 is one.",
        ),
    ],
)
def test_errors_name_value_rule_and_remedy(changes, message):
    with pytest.raises(ConfigError) as raised:
        resolve(PretrainConfig(depth=2, **changes), 1000, 2048)
    assert str(raised.value) == message
