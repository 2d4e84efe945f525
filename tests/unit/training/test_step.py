"""One optimiser step: micro-batches change nothing, documents can be hidden from each other, the loss is a mean."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.config.model import ModelConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.model.gpt import GPT
from nanochat.model.optimizer import MuonAdamW, StepSchedule
from nanochat.model.scaling import parameter_groups
from nanochat.training.plan import learning_rates
from nanochat.training.step import TrainingStep, document_numbers, split_rows

BOS = 1
SCHEDULE = StepSchedule(lr_factor=0.1, muon_momentum=0.9, muon_weight_decay=0.1)


def random_model(seed: int = 0, **changes) -> GPT:
    sizes = {"sequence_len": 16, "vocab_size": 96, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    model = GPT(ModelConfig(**(sizes | changes)))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=draw).mul_(0.2)
    return model


def training_step(model: GPT, micro_batch_rows: int = 8, document_masking: bool = False) -> TrainingStep:
    parameters = dict(model.named_parameters())
    groups = parameter_groups(model.config, list(parameters), learning_rates(PretrainConfig()), 0.1)
    optimizer = MuonAdamW(parameters, groups, muon_dtype=torch.float32)
    return TrainingStep(
        model, optimizer, tokenizer=SimpleNamespace(bos=BOS), document_masking=document_masking,
        micro_batch_rows=micro_batch_rows,
    )  # fmt: skip


def random_rows(rows: int = 8, seed: int = 0, length: int = 17) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 96, (rows, length)).astype(np.uint16)


@given(rows=st.integers(1, 40), bound=st.integers(1, 50))
def test_rows_are_split_evenly_in_order(rows, bound):
    rows_BT1 = np.arange(rows * 3).reshape(rows, 3)
    parts = split_rows(rows_BT1, bound)
    assert np.array_equal(np.concatenate(parts), rows_BT1)
    sizes = {len(part) for part in parts}
    assert len(sizes) == 1
    size = sizes.pop()
    assert size <= bound
    assert not any(rows % larger == 0 for larger in range(size + 1, min(bound, rows) + 1))


def test_documents_are_numbered_by_their_bos():
    tokens_BT = torch.tensor([[1, 5, 6, 1, 1, 7], [5, 6, 1, 7, 8, 9]])
    assert document_numbers(tokens_BT, BOS).tolist() == [[1, 1, 1, 2, 3, 3], [0, 0, 1, 1, 1, 1]]


def test_the_loss_is_the_mean_over_the_tokens_before_the_update():
    model, rows = random_model(), random_rows()
    tokens = torch.from_numpy(rows.astype(np.int64))
    with torch.no_grad():
        log_p = model.logits(model(tokens[:, :-1])).double().log_softmax(-1)
    expected = -log_p.gather(2, tokens[:, 1:, None]).mean()
    result = training_step(model).run(rows, SCHEDULE).result()
    assert result.loss == pytest.approx(float(expected), abs=1e-5)
    assert result.command == 0
    assert training_step(model).run(rows, SCHEDULE, command=2).result().command == 2


def gradients(micro_batch_rows: int) -> dict[str, torch.Tensor]:
    model, rows = random_model(), random_rows()
    step = training_step(model)
    for part in split_rows(rows, micro_batch_rows):
        step.backward(part, rows[:, 1:].size)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("micro_batch_rows", [1, 2, 4])
def test_accumulated_gradients_are_those_of_the_whole(micro_batch_rows):
    whole, parts = gradients(8), gradients(micro_batch_rows)
    for name, gradient in whole.items():
        assert (parts[name] - gradient).norm() <= 2e-6 * gradient.norm(), name


def test_one_times_eight_rows_train_as_four_times_two():
    models, losses = [], []
    for micro_batch_rows in (8, 2):
        model = random_model()
        step = training_step(model, micro_batch_rows)
        losses.append([step.run(random_rows(seed=k), SCHEDULE).result().loss for k in range(6)])
        models.append(model)
    assert losses[0] == pytest.approx(losses[1], abs=3e-6)
    start = random_model()
    for (name, one), other, before in zip(
        models[0].named_parameters(), models[1].parameters(), start.parameters(), strict=True
    ):
        assert (one - other).norm() <= 1e-3 * (one - before).norm(), name
        assert (one - before).norm() > 0, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("document_masking", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_trains_as_a_cpu_does(compiled, document_masking):
    """In float32, updates included, where Muon enlarges rounding; rows have a document that begins in the middle."""
    losses, models = [], []
    for device in ("cpu", "cuda"):
        model = random_model().to(device)
        if compiled and device == "cuda":
            model.compile()
        step = training_step(model, micro_batch_rows=4, document_masking=document_masking)
        rows = [random_rows(seed=k) for k in range(6)]
        for part in rows:
            part[:, 7] = BOS
        results = [step.run(part, SCHEDULE).result() for part in rows]
        losses.append([result.loss for result in results])
        assert all(result.device_s is None if device == "cpu" else 0 < result.device_s < 60 for result in results)
        models.append(model.cpu())
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    start = random_model()
    for (name, one), other, before in zip(
        models[0].named_parameters(), models[1].parameters(), start.parameters(), strict=True
    ):
        assert (one - other).norm() <= 1e-2 * (one - before).norm(), name


def test_no_gradient_outlives_a_step():
    model = random_model()
    step = training_step(model)
    step.run(random_rows(), SCHEDULE)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_with_masking_documents_in_one_row_train_as_in_rows_of_their_own():
    """Two documents packed into a row give the loss and the gradients of each by itself: position is relative."""
    first, second = random_rows(1, 1, 8)[0], random_rows(1, 2, 9)[0]
    first[0] = second[0] = BOS
    packed = np.concatenate([first, second])[None]
    alone = [np.concatenate([first, [BOS]])[None].astype(np.uint16), second[None]]
    outcomes = []
    for masking, rows in ((True, [packed]), (False, alone), (False, [packed])):
        model = random_model(smear=True)
        step = training_step(model, document_masking=masking)
        loss = sum(step.backward(part, 16) for part in rows)
        outcomes.append((loss.item(), [parameter.grad for parameter in model.parameters()]))
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], abs=1e-5)
    for packed_gradient, alone_gradient in zip(outcomes[0][1], outcomes[1][1], strict=True):
        torch.testing.assert_close(packed_gradient, alone_gradient, rtol=1e-3, atol=1e-6)
    assert abs(outcomes[0][0] - outcomes[2][0]) > 1e-4
