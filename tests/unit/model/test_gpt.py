"""The whole model against a second implementation, part by part; masks, dtypes, initialisation, recompute, compile."""

import itertools
import math

import numpy as np
import pytest
import torch
from naive_gpt import Description, naive_hidden, naive_logits, naive_token_losses, parameters_of, randomise

from nanochat.config.model import ModelConfig
from nanochat.model.gpt import GPT, Linear, packs_bfloat16

PARTS = ("value_embeddings", "residual_scalars", "backout", "smear")
T = 13  # longer than the rows (8) and than the short window (4) of the tiny models


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    monkeypatch.setattr("nanochat.config.model.SHORT_WINDOW_MULTIPLE", 2)


def tiny_config(**changes) -> ModelConfig:
    sizes = {
        "sequence_len": 8, "vocab_size": 50, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32,
        "window_pattern": "SSL", "smear": True,
    }  # fmt: skip
    return ModelConfig(**(sizes | changes))


def random_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    model = GPT(config, dtype)
    randomise(model, seed)
    return model


def describe(model: GPT) -> Description:
    config = model.config
    reach = {"S": 2, "L": 8}
    letters = [config.window_pattern[layer % len(config.window_pattern)] for layer in range(config.n_layer)]
    return Description(
        n_head=config.n_head, n_kv_head=config.n_kv_head, windows=[reach[letter] for letter in letters[:-1]] + [8],
        vocab_size=config.vocab_size, parameters=parameters_of(model),
    )  # fmt: skip


def some_tokens(rows: int = 2, vocab_size: int = 50, length: int = T, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: GPT, tokens_BT: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model.logits(model(tokens_BT)).double().numpy()


@pytest.mark.parametrize("on", list(itertools.product([False, True], repeat=len(PARTS))), ids=lambda on: str(on))
@pytest.mark.parametrize("windows", ["L", "SSL"])
def test_every_combination_of_parts_agrees_with_the_naive_forward(on, windows):
    config = tiny_config(**dict(zip(PARTS, on)), window_pattern=windows)
    model = random_model(config)
    tokens = some_tokens(rows=1)
    assert np.abs(logits_of(model, tokens)[0] - naive_logits(tokens[0].tolist(), describe(model))).max() < 1e-4


@pytest.mark.parametrize("sizes", [
    {"n_layer": 1}, {"n_layer": 2, "n_kv_head": 4}, {"n_layer": 5, "n_kv_head": 1}, {"n_head": 1, "n_kv_head": 1},
])  # fmt: skip
def test_other_depths_and_head_counts_agree(sizes):
    model = random_model(tiny_config(**sizes))
    tokens = some_tokens(rows=1)
    assert np.abs(logits_of(model, tokens)[0] - naive_logits(tokens[0].tolist(), describe(model))).max() < 1e-4


def scaled(name: str, factor: float):
    """Return a mutation that multiplies all parameters whose name contains `name`."""

    def mutate(d: Description) -> None:
        chosen = [key for key in d.parameters if name in key]
        assert chosen
        for key in chosen:
            d.parameters[key] = d.parameters[key] * factor

    return mutate


def changed(**fields):
    def mutate(d: Description) -> None:
        for name, value in fields.items():
            setattr(d, name, value)

    return mutate


MUTATIONS = {
    "short window one less": changed(windows=[1, 1, 8]),
    "short window one more": changed(windows=[3, 3, 8]),
    "long window one less": changed(windows=[2, 2, 7]),
    "no windows": changed(windows=[99, 99, 99]),
    "last layer short": changed(windows=[2, 2, 2]),
    "rope theta": changed(rope_theta=10_000.0),
    "rope sign": changed(rope_sign=1.0),
    "no rope": changed(rope_sign=0.0),
    "qk gain": changed(qk_gain=1.0),
    "softcap": changed(softcap=20.0),
    "value gate scale": changed(value_gate_scale=2.0),
    "backout from another layer": changed(middle_layer=0),
    "value embeddings zeroed": scaled("value_embeds", 0.0),
    "value gate zeroed": scaled("ve_gate", 0.0),
    "residual scalars": scaled("resid_lambdas", 0.9),
    "x0 scalars zeroed": scaled("x0_lambdas", 0.0),
    "backout zeroed": scaled("backout_lambda", 0.0),
    "smear zeroed": scaled("smear_lambda", 0.0),
    "smear gate zeroed": scaled("smear_gate", 0.0),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_notices_a_mutation(mutation):
    """The comparison above would fail by at least 100 times its tolerance if the model had this mistake."""
    model = random_model(tiny_config())
    tokens = some_tokens(rows=1)
    description = describe(model)
    MUTATIONS[mutation](description)
    assert np.abs(logits_of(model, tokens)[0] - naive_logits(tokens[0].tolist(), description)).max() > 1e-2


def test_normalising_before_the_rotation_would_be_the_same():
    """A rotation keeps the norm, so this order is no mutation that a test could see."""
    model = random_model(tiny_config())
    tokens = some_tokens(rows=1)
    description = describe(model)
    description.norm_before_rope = True
    assert np.abs(logits_of(model, tokens)[0] - naive_logits(tokens[0].tolist(), description)).max() < 1e-4


@pytest.mark.parametrize("field", ["rope_theta", "qk_gain", "logit_softcap", "norm_eps"])
def test_each_constant_is_taken_from_the_config(field):
    value, described = {
        "rope_theta": (500.0, {"rope_theta": 500.0}),
        "qk_gain": (0.7, {"qk_gain": 0.7}),
        "logit_softcap": (4.0, {"softcap": 4.0}),
        "norm_eps": (0.3, {"epsilon": 0.3}),
    }[field]
    model = random_model(tiny_config(**{field: value}))
    tokens = some_tokens(rows=1)
    description = describe(model)
    changed(**described)(description)
    assert np.abs(logits_of(model, tokens)[0] - naive_logits(tokens[0].tolist(), description)).max() < 1e-4


def test_loss_and_token_losses_agree_with_the_naive_forward():
    model = random_model(tiny_config())
    tokens, targets = some_tokens(), some_tokens(seed=2)
    targets[0, 3] = targets[1, :5] = -1
    expected = np.stack(
        [naive_token_losses(row.tolist(), target.tolist(), describe(model)) for row, target in zip(tokens, targets)]
    )
    assert np.abs(model.token_losses(tokens, targets).numpy() - expected).max() < 1e-4
    assert model.loss(tokens, targets).item() == pytest.approx(expected.sum(), abs=1e-3)


@pytest.mark.parametrize(("part", "prefixes"), [
    ("value_embeddings", ("value_embeds.", "transformer.h.0.attn.ve_gate", "transformer.h.2.attn.ve_gate")),
    ("residual_scalars", ("resid_lambdas", "x0_lambdas")),
    ("backout", ("backout_lambda",)),
    ("smear", ("smear_",)),
])  # fmt: skip
def test_a_part_that_is_off_is_not_constructed(part, prefixes):
    names_on = {name for name, _ in GPT(tiny_config()).named_parameters()}
    names_off = {name for name, _ in GPT(tiny_config(**{part: False})).named_parameters()}
    assert names_on - names_off == {name for name in names_on if name.startswith(prefixes)} != set()
    assert names_off < names_on


def test_gradients_of_every_parameter_agree_with_differences_of_the_naive_loss():
    model = random_model(tiny_config())
    tokens, targets = some_tokens(rows=1), some_tokens(rows=1, seed=2)
    model.loss(tokens, targets).backward()
    description = describe(model)
    generator = np.random.default_rng(3)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        start, direction = description.parameters[name], generator.standard_normal(parameter.shape)
        nats = []
        for step in (1e-6, -1e-6):
            description.parameters[name] = start + step * direction
            nats.append(naive_token_losses(tokens[0].tolist(), targets[0].tolist(), description).sum())
        description.parameters[name] = start
        gradient = parameter.grad.double().numpy()
        tolerance = 1e-4 * np.linalg.norm(gradient) * np.sqrt(direction.size) + 1e-4
        assert (gradient * direction).sum() == pytest.approx((nats[0] - nats[1]) / 2e-6, abs=tolerance), name


def test_recompute_gives_the_same_gradients():
    model = random_model(tiny_config())
    tokens, targets = some_tokens(), some_tokens(seed=2)
    documents = torch.arange(T).expand(2, T) // 5
    model.loss(tokens, targets, documents).backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.recompute = True
    model.loss(tokens, targets, documents).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=0, atol=0, msg=name)


def test_recompute_keeps_fewer_activations():
    model = random_model(tiny_config())
    kept = {}
    for recompute in (False, True):
        model.recompute = recompute
        elements = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, elements=elements: elements.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            model.loss(some_tokens(), some_tokens(seed=2))
        kept[recompute] = sum(elements)
    assert kept[True] < 0.5 * kept[False]


def test_documents_do_not_see_each_other():
    model = random_model(tiny_config())
    tokens = some_tokens(rows=1)
    documents = torch.tensor([[7] * 5 + [3] * 8])
    other = tokens.clone()
    other[0, :5] = (tokens[0, :5] + 17) % 50
    with torch.no_grad():
        before, after, unmasked = model(tokens, None, documents), model(other, None, documents), model(other)
    torch.testing.assert_close(before[:, 5:], after[:, 5:], rtol=0, atol=0)
    assert (before[:, :5] - after[:, :5]).abs().max() > 0.1
    assert (unmasked[:, 5:] - after[:, 5:]).abs().max() > 0.1


def test_a_packed_row_equals_its_documents_alone():
    model = random_model(tiny_config())
    tokens = some_tokens(rows=2)
    documents = torch.tensor([[0] * 4 + [1] * 1 + [2] * 8, [4] * 10 + [9] * 3])
    with torch.no_grad():
        packed = model(tokens, None, documents)
        for row, lo, hi in ((0, 0, 4), (0, 4, 5), (0, 5, 13), (1, 0, 10), (1, 10, 13)):
            torch.testing.assert_close(packed[row, lo:hi], model(tokens[row : row + 1, lo:hi])[0], rtol=0, atol=2e-5)
    naive = naive_hidden(tokens[0].tolist(), describe(model), documents[0].tolist())
    assert np.abs(packed[0].double().numpy() - naive).max() < 1e-4


def test_rows_of_a_batch_do_not_see_each_other():
    model = random_model(tiny_config())
    tokens = some_tokens(rows=3)
    assert np.abs(logits_of(model, tokens)[1] - logits_of(model, tokens[1:2])[0]).max() < 1e-5


def test_padded_vocabulary_rows_change_nothing():
    model = random_model(tiny_config())
    tokens, targets = some_tokens(), some_tokens(seed=2)
    before = model.loss(tokens, targets).item()
    with torch.no_grad():
        model.lm_head.weight[50:] = 1e3
        model.embedding.weight[50:] = float("nan")
    assert model.loss(tokens, targets).item() == before
    assert model.logits(model(tokens)).shape == (2, T, 50)


def test_bfloat16_is_near_float32():
    """Stated tolerance: loss within 1 %, hidden states within 5 % in norm (bf16 has 8 bits; parts are all random)."""
    config = tiny_config(n_embd=64)
    exact, half = random_model(config), random_model(config, dtype=torch.bfloat16)
    tokens, targets = some_tokens(8), some_tokens(8, seed=2)
    with torch.no_grad():
        hidden, hidden_half = exact(tokens), half(tokens)
    assert hidden_half.dtype == torch.bfloat16
    assert (hidden_half.float() - hidden).norm() < 0.05 * hidden.norm()
    assert half.loss(tokens, targets).item() == pytest.approx(exact.loss(tokens, targets).item(), rel=0.01)
    assert half.logits(hidden_half).dtype == torch.float32


def test_bfloat16_gradients_are_near_float32_and_stay_float32():
    config = tiny_config(n_embd=64)
    exact, half = random_model(config), random_model(config, dtype=torch.bfloat16)
    tokens, targets = some_tokens(8), some_tokens(8, seed=2)
    for model in (exact, half):
        (model.loss(tokens, targets) / 100).backward()
    for (name, ours), theirs in zip(half.named_parameters(), exact.parameters()):
        assert ours.grad.dtype == torch.float32
        if ours.dim() == 2:
            assert (ours.grad - theirs.grad).norm() < 0.25 * theirs.grad.norm(), name


def test_initialisation_is_a_function_of_the_seed_and_predicts_uniformly():
    config = tiny_config(vocab_size=500, n_embd=64)
    states = []
    for seed in (5, 5, 6):
        model = GPT(config)
        model.initialize(torch.Generator().manual_seed(seed))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])
    tokens, targets = some_tokens(4, 500), some_tokens(4, 500, seed=2)
    assert model.loss(tokens, targets).item() / targets.numel() == pytest.approx(math.log(500), abs=0.01)


def test_initialisation_draws_every_parameter():
    model = GPT(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.initialize(torch.Generator().manual_seed(0))
    state = model.state_dict()
    assert all(value.isfinite().all() for value in state.values())
    for name in ("transformer.wte.weight", "lm_head.weight", "value_embeds.0.weight"):
        rows, padding = state[name].split([50, 14])
        assert padding.abs().max() == 0, name
        state[name] = rows
    assert state["transformer.wte.weight"].std().item() == pytest.approx(0.8, rel=0.1)
    assert state["lm_head.weight"].std().item() == pytest.approx(0.001, rel=0.1)
    for name in ("transformer.h.1.attn.c_q", "transformer.h.1.attn.c_k", "transformer.h.1.attn.c_v", "value_embeds.0"):
        assert state[f"{name}.weight"].std().item() == pytest.approx(32**-0.5, rel=0.1), name
        assert state[f"{name}.weight"].abs().max().item() == pytest.approx((3 / 32) ** 0.5, rel=0.02), name
    for name in ("transformer.h.0.attn.ve_gate", "smear_gate"):
        assert 0 <= state[f"{name}.weight"].min() < 0.004 < 0.016 < state[f"{name}.weight"].max() < 0.02, name
    assert state["transformer.h.1.mlp.c_fc.weight"].abs().max().item() == pytest.approx(0.4 * (3 / 32) ** 0.5, rel=0.02)
    for name in ("transformer.h.1.mlp.c_proj.weight", "transformer.h.1.attn.c_proj.weight", "smear_lambda"):
        assert state[name].abs().max() == 0, name
    assert state["resid_lambdas"].tolist() == pytest.approx([1.15, 1.10, 1.05])
    assert state["x0_lambdas"].tolist() == pytest.approx([0.20, 0.125, 0.05])
    assert state["backout_lambda"].item() == pytest.approx(0.2)


def test_linear_multiplies_in_its_inputs_dtype_and_keeps_float32_weights_and_gradients():
    linear = Linear(4, 3)
    x = torch.arange(8, dtype=torch.bfloat16).view(2, 4)
    y = linear(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, x @ linear.weight.bfloat16().T, rtol=0, atol=0)
    y.sum().backward()
    assert linear.weight.dtype == linear.weight.grad.dtype == torch.float32
    assert linear.weight.grad.tolist() == [[4.0, 6.0, 8.0, 10.0]] * 3
    assert [name for name, _ in linear.named_parameters()] == ["weight"]


@pytest.mark.slow
def test_recompilation_limit_leaves_room_for_several_batch_shapes():
    """Beyond torch's default, 8, which one shape in training and evaluation needs, blocks would run uncompiled."""
    model = random_model(tiny_config(smear=False))
    torch._dynamo.reset()
    model.compile(backend="eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for rows in (1, 2, 3):  # each shape compiles 3 variants: S and L, with a value embedding and without
            model.token_losses(some_tokens(rows), some_tokens(rows))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_equals_eager(recompute):
    config = tiny_config()
    eager, compiled = random_model(config), random_model(config)
    compiled.compile()
    compiled.recompute = recompute
    tokens, targets = some_tokens(), some_tokens(seed=2)
    documents = torch.arange(T).expand(2, T) // 5
    for document_BT in (None, documents):
        losses = [model.loss(tokens, targets, document_BT) for model in (eager, compiled)]
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
        for loss in losses:
            loss.backward()
    for (name, expected), actual in zip(eager.named_parameters(), compiled.parameters()):
        error = (actual.grad - expected.grad).norm() / expected.grad.norm()
        assert error < 1e-4, name


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 4}, {"n_kv_head": 1}, {"value_embeddings": False}], ids=str)
def test_a_model_that_is_laid_out_for_inference_computes_the_same(changes):
    """Fused in float32 to rounding, and packed in bfloat16 as near to float32 as the model that is not."""
    tokens_BT = some_tokens()
    model = random_model(tiny_config(**changes))
    expected = logits_of(model, tokens_BT)
    names = dict(model.named_parameters()).keys()
    half = random_model(model.config, dtype=torch.bfloat16).to(torch.bfloat16)
    plain_error = np.abs(logits_of(half, tokens_BT) - expected).max()
    assert np.abs(logits_of(model.prepare_for_inference(), tokens_BT) - expected).max() < 3e-5, "logits of about 10"
    assert dict(model.named_parameters()).keys() == names
    packed = half.prepare_for_inference()
    for linear in (packed.lm_head, packed.blocks[0].attn.c_qkv):
        assert (linear.packed is not None) == packs_bfloat16(), "where oneDNN has no bfloat16 it goes without"
    assert np.abs(logits_of(packed, tokens_BT) - expected).max() < 2 * plain_error
    query = model.blocks[0].attn.c_q.weight
    query.data.zero_()
    assert (model.blocks[0].attn.c_qkv.weight[: len(query)] == 0).all(), "no second copy that could grow old"
