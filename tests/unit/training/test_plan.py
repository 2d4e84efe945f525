"""What a config resolves to: the dial's overrides, their errors, and the micro-batch that memory allows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.config.model import STOCK, ModelConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.errors import ConfigError
from nanochat.model.gpt import GPT
from nanochat.training.plan import (
    MAX_MICRO_BATCH_TOKENS,
    activation_bytes_per_row,
    fixed_bytes,
    micro_batch_rows,
    resolve,
    resolve_model,
)

GB = 10**9


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


def rows_for(free_bytes: int, *, rows: int = 1024, device: str = "cuda", world_size: int = 1, **changes) -> int:
    plan = resolve(PretrainConfig(depth=12), 32_768, 2048)
    return micro_batch_rows(
        PretrainConfig(depth=12, **changes), plan, rows=rows, device=device, dtype_bytes=2, free_bytes=free_bytes,
        world_size=world_size,
    )  # fmt: skip


@given(st.integers(0, 200 * GB), st.integers(0, 200 * GB), st.sampled_from(["cpu", "cuda", "mps"]), st.booleans())
def test_more_memory_never_means_fewer_rows(one, other, device, recompute):
    less, more = (rows_for(b, device=device, recompute=recompute) for b in sorted((one, other)))
    assert 1 <= less <= more <= MAX_MICRO_BATCH_TOKENS[device] // 2048


def test_what_else_moves_the_micro_batch():
    assert rows_for(0) == 1
    assert rows_for(500 * GB) == 32
    assert rows_for(500 * GB, device="cpu") == 4
    assert rows_for(500 * GB, rows=3) == 3
    assert 1 < rows_for(10 * GB) < rows_for(10 * GB, recompute=True)
    assert rows_for(8 * GB) < rows_for(8 * GB, world_size=8)  # the optimiser's state is shared
    assert rows_for(0, micro_batch_rows=5) == 5
    assert rows_for(0, micro_batch_rows=5, rows=2) == 2


def test_a_6_gb_gpu_trains_depth_12():
    """Weights, gradients and optimiser state take 4.6 GB; recomputing leaves room for rows."""
    model = resolve(PretrainConfig(depth=12), 32_768, 2048).model
    assert fixed_bytes(model, 1) == 16 * 286_261_705
    assert fixed_bytes(model, 8) == 9 * 286_261_705
    assert 0.8 * 6.2 * GB - fixed_bytes(model, 1) > activation_bytes_per_row(
        model, dtype_bytes=2, keeps_scores=False, recompute=True
    )


class _Saved:
    """Counts the bytes that autograd keeps for the backward pass, each storage once, parameters not."""

    def __init__(self, model: GPT) -> None:
        self._own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._storages[storage.data_ptr()] = storage
        return tensor

    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def kept_per_row(model: GPT) -> int:
    """Measure as two rows less one, so that what does not grow with the rows is left out."""
    kept = []
    for rows in (1, 2):
        saved = _Saved(model)
        tokens = torch.zeros(rows, model.config.sequence_len, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor):
            model.loss(tokens, tokens)
        kept.append(saved.bytes())
    return kept[1] - kept[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["L", "SSSL"])
def test_the_estimate_of_activations_is_near_what_autograd_keeps(pattern, dtype):
    config = ModelConfig(
        sequence_len=512, vocab_size=128, n_layer=4, n_head=2, n_kv_head=2, n_embd=128, window_pattern=pattern
    )
    model = GPT(config, dtype)
    model.initialize(torch.Generator().manual_seed(0))
    estimate, recomputing = (
        activation_bytes_per_row(config, dtype_bytes=dtype.itemsize, keeps_scores=True, recompute=recompute)
        for recompute in (False, True)
    )
    measured = kept_per_row(model)
    assert 0.75 < estimate / measured < 1.33
    model.recompute = True
    one_layer = measured / config.n_layer  # is run again while the inputs of all are kept
    assert 0.75 < recomputing / (kept_per_row(model) + one_layer) < 1.33
