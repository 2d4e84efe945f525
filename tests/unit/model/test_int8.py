"""Products of integers are exact and do not depend on company; what they cost is bounded; the rest is refused."""

from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from nanochat.config.model import ModelConfig
from nanochat.config.serving import ServingConfig
from nanochat.errors import ConfigError
from nanochat.inference import load
from nanochat.inference.completions import complete
from nanochat.inference.engine import Engine
from nanochat.inference.load import load_model
from nanochat.inference.requests import Request
from nanochat.model import int8
from nanochat.model.gpt import GPT
from nanochat.model.int8 import Int8Weight, convert_to_int8, multiplies_int8
from nanochat.run_context import RunContext
from nanochat.training.hardware import Hardware

CPU = torch.device("cpu")
able = pytest.mark.skipif(not multiplies_int8(CPU), reason="needs AVX512-VNNI")
SHAPES = [(96, 32), (32, 96), (200, 40), (768, 256), (50, 17)]


@pytest.fixture
def all_sizes(monkeypatch):
    """Small layers count as large."""
    monkeypatch.setattr(int8, "MIN_WEIGHTS", 0)


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    config = ModelConfig(sequence_len=64, vocab_size=40, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, smear=True)
    model, draw = GPT(config, dtype), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=draw).mul_(0.4)
    return model.to(dtype)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_the_grid(rows: int, channels: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return integers whose rows reach 127 or -127, and a power of two for each row."""
    draw = torch.Generator().manual_seed(seed)
    integers = torch.randint(-127, 128, (rows, channels), generator=draw)
    integers[torch.arange(rows), torch.randint(channels, (rows,), generator=draw)] = 127 * (-1) ** torch.arange(rows)
    return integers.double(), 2.0 ** torch.randint(-6, 7, (rows, 1), generator=draw)


@able
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_that_are_integers_times_a_scale_are_multiplied_exactly(shape, dtype):
    """To the rounding of the result alone."""
    (weights, weight_scale), (inputs, input_scale) = on_the_grid(*shape, seed=1), on_the_grid(11, shape[1], seed=2)
    expected = (inputs * input_scale) @ (weights * weight_scale).T
    found = Int8Weight.of((weights * weight_scale).to(dtype))((inputs * input_scale).to(dtype))
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol={torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype], atol=0.0)


@able
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_number_is_further_off_than_half_an_integer_on_either_side_allows(shape):
    weight_NK, input_MK = drawn(*shape, seed=1).double(), drawn(11, shape[1], seed=2).double()
    weight_NK[3] *= 1000  # scales are of rows: the others do not suffer
    input_MK[5] *= 1000
    found = Int8Weight.of(weight_NK.float())(input_MK.float()).double()
    half_weight_N1, half_input_M1 = (rows.abs().amax(1, keepdim=True) / 254 for rows in (weight_NK, input_MK))
    error = (found - input_MK @ weight_NK.T).abs()
    sums = half_input_M1 * weight_NK.abs().sum(1) + half_weight_N1.T * input_MK.abs().sum(1, keepdim=True)
    bound = sums + shape[1] * half_input_M1 * half_weight_N1.T
    assert (error <= 1.0001 * bound).all()
    typical = input_MK.norm(dim=1, keepdim=True) * weight_NK.norm(dim=1) / shape[1] ** 0.5
    assert 0.003 < (error / typical).square().mean().sqrt() < 0.013, "errors of many channels mostly cancel"


@able
def test_zeros_stay_zeros_and_what_is_no_number_stays_in_its_row():
    weight_NK, input_MK = drawn(24, 16, seed=1), drawn(9, 16, seed=2)
    weight_NK[[0, 7]] = 0.0
    input_MK[[2, 3, 8]] = 0.0
    expected = Int8Weight.of(weight_NK)(input_MK)
    assert (expected[:, [0, 7]] == 0).all()
    assert (expected[[2, 3, 8]] == 0).all()
    input_MK[4, 5] = torch.nan
    found = Int8Weight.of(weight_NK)(input_MK)
    assert found[4].isnan().all()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(found[others], expected[others])


@able
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (512, 768), (128, 3072)], ids=str)
def test_a_row_gets_the_same_bits_in_any_company(shape, dtype):
    weight = Int8Weight.of(drawn(*shape, seed=1, dtype=dtype))
    input_MK = drawn(96, shape[1], seed=2, dtype=dtype)
    expected = weight(input_MK)
    for rows in [*range(1, 34), 64, 95]:
        assert torch.equal(weight(input_MK[:rows]), expected[:rows]), rows
        assert torch.equal(weight(input_MK[-rows:][None])[0], expected[-rows:]), rows
    assert torch.equal(weight(input_MK.T.contiguous().T), expected), "however it lies in memory"


def bytes_held(model: GPT) -> int:
    """Of what computes: parameters, views counted once, and each layer's own copy."""
    tensors = [*model.parameters()]
    for linear in model.fused_linears():
        tensors += [linear.weight] if linear.packed is None else [linear.weight, linear.packed]
        if linear.int8 is not None:
            tensors += [linear.int8.packed, linear.int8.scale_N, linear.int8.zero_N]
    seen, total = set(), 0
    for tensor in tensors:
        if tensor.is_mkldnn:
            total += tensor.numel() * tensor.element_size()
        elif tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            total += tensor.untyped_storage().nbytes()
    return total


@able
def test_the_weights_themselves_are_given_back(all_sizes):
    model, other = tiny_model(dtype=torch.bfloat16), tiny_model(dtype=torch.bfloat16).prepare_for_inference()
    linears = model.fused_linears()
    weights = sum(linear.weight.numel() for linear in linears)
    rows = sum(len(linear.weight) for linear in linears)
    storages = [StorageWeakRef(linear.weight.untyped_storage()) for linear in linears]
    kept = bytes_held(model) - 2 * weights
    convert_to_int8(model)
    assert [storage.expired() for storage in storages] == [True] * len(linears), "queries, keys and values included"
    assert bytes_held(model) == kept + weights + (4 + 8) * rows
    assert bytes_held(other) == kept + 4 * weights, "in bfloat16 they are there twice: see Linear.pack"


@able
def test_small_layers_stay_as_they_are(monkeypatch):
    tokens_BT = torch.arange(24).view(2, 12)
    half = tiny_model(dtype=torch.bfloat16).prepare_for_inference()
    expected = half.logits(half(tokens_BT))
    small = convert_to_int8(tiny_model(dtype=torch.bfloat16))
    assert torch.equal(small.logits(small(tokens_BT)), expected)
    assert all(linear.packed is not None for linear in small.fused_linears())
    sizes = sorted(linear.weight.numel() for linear in half.fused_linears())
    monkeypatch.setattr(int8, "MIN_WEIGHTS", sizes[-1])
    model = convert_to_int8(tiny_model(dtype=torch.bfloat16))
    found = {linear.in_features * linear.out_features: linear.int8 is not None for linear in model.fused_linears()}
    assert found == {size: size == sizes[-1] for size in sizes}
    assert model.blocks[0].attn.c_q.weight.numel(), "its fused weight stays"
    assert not torch.equal(model.logits(model(tokens_BT)), expected)


@able
def test_a_model_of_integers_is_near_the_one_of_floats(all_sizes):
    tokens_BT = torch.arange(36).view(3, 12)
    exact, converted = tiny_model(), convert_to_int8(tiny_model())
    hidden_BTC, other_BTC = exact(tokens_BT), converted(tokens_BT)
    assert 1e-4 < (hidden_BTC - other_BTC).norm() / hidden_BTC.norm() < 0.05
    assert all(linear.int8 is not None for linear in converted.fused_linears())
    assert not converted.training


@able
def test_losses_are_those_of_its_logits(all_sizes):
    """Evaluation has no other way: the weights that the loss multiplies by are gone."""
    tokens_BT, targets_BT = torch.arange(36).view(3, 12), torch.arange(3, 39).view(3, 12)
    targets_BT[1, 4:7] = -1
    exact, model = tiny_model(), convert_to_int8(tiny_model())
    losses_BT = model.token_losses(tokens_BT, targets_BT)
    logprobs_BTV = model.logits(model(tokens_BT)).log_softmax(-1)
    expected_BT = -logprobs_BTV.gather(2, targets_BT.clamp(min=0)[..., None])[..., 0] * (targets_BT >= 0)
    assert torch.allclose(losses_BT, expected_BT, atol=1e-5)
    exact_BT = exact.token_losses(tokens_BT, targets_BT)
    assert losses_BT.sum().item() == pytest.approx(exact_BT.sum().item(), rel=0.01)


def taught_model() -> GPT:
    """A model that has learned to count in steps of 7 within 40 words."""
    model = GPT(ModelConfig(sequence_len=64, vocab_size=40, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.initialize(torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(80):
        starts_B1 = torch.randint(40, (8, 1), generator=torch.Generator().manual_seed(step))
        rows_BT1 = (starts_B1 + 7 * torch.arange(17)) % 40
        loss = model.loss(rows_BT1[:, :-1], rows_BT1[:, 1:]) / rows_BT1[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@able
def test_the_engine_says_what_the_model_has_learned(all_sizes):
    model = convert_to_int8(taught_model())
    requests = [Request(prompt=(start, (start + 7) % 40), max_new_tokens=12) for start in range(0, 40, 5)]
    for one, request in zip(complete(Engine(model, max_running=8), requests), requests, strict=True):
        assert one.tokens == [(request.prompt[-1] + 7 * n) % 40 for n in range(1, 13)]


@able
def test_sampled_answers_are_the_same_in_any_company(all_sizes):
    model = convert_to_int8(tiny_model(3))
    requests = [Request(prompt=tuple(range(n % 9 + 1)), max_new_tokens=12, temperature=1.0, seed=n) for n in range(33)]
    together = complete(Engine(model, max_running=33), requests)
    for one, request in list(zip(together, requests, strict=True))[::4]:
        assert complete(Engine(model, max_running=1), [request])[0].tokens == one.tokens


@able
def test_other_weights_are_refused_before_anything_changes(all_sizes):
    model = convert_to_int8(tiny_model(1))
    engine = Engine(model, max_running=2)
    request = Request(prompt=(7, 3, 9), max_new_tokens=12)
    expected = complete(engine, [request])[0].tokens
    gates = model.smear_gate.weight.clone()
    with pytest.raises(ConfigError, match=r"^dtype=int8: .* Load the checkpoint anew\.$"):
        engine.load_weights(tiny_model(2).state_dict())
    assert torch.equal(model.smear_gate.weight, gates)
    assert complete(engine, [request])[0].tokens == expected


def checkpoint_of(model: GPT | None) -> SimpleNamespace:
    """What `load_model` asks of a checkpoint; none = its weights must not be read."""
    return SimpleNamespace(
        state={"tokenizer_hash": "hash", "model": vars(tiny_model().config)}, folder="step_000001",
        model_tensors=lambda: dict(model.named_parameters()) if model else pytest.fail("read"),
    )  # fmt: skip


TOKENIZER = SimpleNamespace(hash="hash")


@pytest.fixture
def one_thread(monkeypatch):
    """Loading chooses how many threads there are; here it does not."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@able
@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_bf16"), reason="needs AVX512-BF16")
def test_a_checkpoint_is_served_in_integers(all_sizes, one_thread):
    source = tiny_model(5)
    model = load_model(checkpoint_of(source), TOKENIZER, RunContext(), "int8")
    assert model.compute_dtype == torch.bfloat16
    assert all(linear.int8 is not None for linear in model.fused_linears())
    tokens_BT = torch.arange(24).view(2, 12)
    expected = convert_to_int8(tiny_model(5, torch.bfloat16))(tokens_BT)
    assert torch.equal(model(tokens_BT), expected)
    assert model.embedding.weight.dtype == model.smear_gate.weight.dtype == torch.bfloat16
    other = load_model(checkpoint_of(source), TOKENIZER, RunContext(), "bfloat16")
    assert all(linear.int8 is None and linear.packed is not None for linear in other.fused_linears())


@pytest.mark.parametrize("instructions", [(), ("avx512_vnni",), ("avx512_bf16",), ("bf16",)], ids=str)
def test_a_processor_without_the_instructions_is_refused(one_thread, monkeypatch, instructions):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
    with pytest.raises(ConfigError, match=r"^dtype=int8: .* computes on .+\. Leave it out\.$"):
        load_model(checkpoint_of(None), TOKENIZER, RunContext(), "int8")


def test_a_gpu_is_refused(one_thread, monkeypatch):
    gpu = Hardware(torch.device("mps"), torch.bfloat16, "asked for")
    monkeypatch.setattr(load, "choose_hardware", lambda config, run: gpu)
    with pytest.raises(ConfigError, match=r"^dtype=int8: .* computes on Apple GPU\. Leave it out\.$"):
        load_model(checkpoint_of(None), TOKENIZER, RunContext(), "int8")


def test_another_engine_is_refused():
    assert ServingConfig(dtype="int8").backend == "native"
    with pytest.raises(ConfigError, match=r"^dtype=int8: is not for vLLM\. "):
        ServingConfig(dtype="int8", backend="vllm")
