"""AdamW against torch and a formula, Muon against a slow float64 reference, the cut of parameters into pieces."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanochat.model.optimizer import (
    MuonAdamW,
    ParameterGroup,
    StepSchedule,
    cut_into_pieces,
    muon_direction,
    polar_express,
)

# Table of the Polar Express paper (arXiv:2505.16932), five iterations, as x -> a x + b x^3 + c x^5.
QUINTICS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def schedule(lr_factor: float = 1.0, momentum: float = 0.9, weight_decay: float = 0.0) -> StepSchedule:
    return StepSchedule(lr_factor=lr_factor, muon_momentum=momentum, muon_weight_decay=weight_decay)


def adamw(*names: str, **changes) -> ParameterGroup:
    return ParameterGroup(**({"kind": "adamw", "names": names, "lr": 0.1} | changes))


def muon(*names: str, lr: float = 0.02) -> ParameterGroup:
    return ParameterGroup(kind="muon", names=names, lr=lr)


def optimizer_of(parameters: dict[str, Tensor], *groups: ParameterGroup) -> MuonAdamW:
    return MuonAdamW(parameters, list(groups), muon_dtype=torch.float32)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def test_adamw_is_that_of_torch_and_of_the_formula():
    groups = [
        adamw("a", lr=0.3, betas=(0.8, 0.995), weight_decay=0.01),
        adamw("b", "c", lr=0.02, betas=(0.96, 0.95), weight_decay=0.5),
    ]
    start = {"a": random(9, 4), "b": random(7, seed=1), "c": random(3, 2, seed=2)}
    ours = {name: leaf(value) for name, value in start.items()}
    torchs = {name: leaf(value) for name, value in start.items()}
    by_formula = {name: value.double().numpy() for name, value in start.items()}
    optimizer = optimizer_of(ours, *groups)
    reference = torch.optim.AdamW(
        [
            {"params": [torchs[name] for name in group.names], "betas": group.betas, "weight_decay": group.weight_decay}
            for group in groups
        ],
        eps=1e-10,
        foreach=False,
    )
    first = {name: np.zeros_like(value) for name, value in by_formula.items()}
    second = {name: np.zeros_like(value) for name, value in by_formula.items()}
    for step in range(1, 7):
        factor = 0.15 * step
        for group, theirs in zip(groups, reference.param_groups, strict=True):
            theirs["lr"] = group.lr * factor
            (beta1, beta2), lr = group.betas, group.lr * factor
            for name in group.names:
                gradient = random(*start[name].shape, seed=100 * step) * 10.0 ** (step - 4)
                ours[name].grad, torchs[name].grad = gradient.clone(), gradient.clone()
                g = gradient.double().numpy()
                first[name] = beta1 * first[name] + (1 - beta1) * g
                second[name] = beta2 * second[name] + (1 - beta2) * g * g
                by_formula[name] *= 1 - lr * group.weight_decay
                root = np.sqrt(second[name] / (1 - beta2**step)) + 1e-10
                by_formula[name] -= lr * first[name] / (1 - beta1**step) / root
        optimizer.step(schedule(factor))
        reference.step()
    for name in start:
        torch.testing.assert_close(ours[name], torchs[name], rtol=0, atol=2e-6)
        np.testing.assert_allclose(ours[name].detach().numpy(), by_formula[name], rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    "shape", [(1, 64, 64), (1, 128, 48), (1, 48, 128), (3, 32, 32), (5, 16, 96), (2, 4, 1), (2, 1, 7)]
)
@pytest.mark.parametrize("decades", [0.5, 1, 2])
def test_polar_express_raises_all_singular_values_to_the_band(shape, decades):
    """The singular vectors stay; of values that span some decades, down to 1e-3 of the norm, each ends in 1 +- 0.15."""
    u, s, vh = torch.linalg.svd(random(*shape).double(), full_matrices=False)
    s_N = torch.logspace(0, -decades, s.shape[-1], dtype=torch.float64)
    assert s_N.min() / s_N.norm() > 1e-3
    y_KMN = polar_express((u * s_N @ vh).float())
    assert y_KMN.dtype == torch.float32
    core_KNN = u.mT @ y_KMN.double() @ vh.mT
    singular = core_KNN.diagonal(dim1=-2, dim2=-1)
    assert 0.85 < singular.min()
    assert singular.max() < 1.15
    assert (core_KNN - torch.diag_embed(singular)).abs().max() < 2e-3
    torch.testing.assert_close(u @ core_KNN @ vh, y_KMN.double(), rtol=0, atol=1e-5)


def test_polar_express_takes_five_steps_of_the_paper():
    """On a diagonal matrix each singular value goes through the five quintics."""
    s_N = torch.logspace(0, -4, 12, dtype=torch.float64)
    x_N = s_N / (1.01 * s_N.norm())
    for a, b, c in QUINTICS:
        x_N = a * x_N + b * x_N**3 + c * x_N**5
    y_KMN = polar_express(torch.diag(s_N.float())[None])
    torch.testing.assert_close(y_KMN[0].double(), torch.diag(x_N), rtol=0, atol=1e-4)
    assert (y_KMN[0].diagonal() >= s_N.float() / s_N.norm()).all()  # none is lowered


def test_polar_express_of_zero_is_zero_and_scale_does_not_matter():
    x_KMN = random(2, 24, 16)
    torch.testing.assert_close(polar_express(x_KMN * 1000), polar_express(x_KMN), rtol=1e-4, atol=1e-5)
    assert torch.equal(polar_express(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


class SlowMuon:
    """Muon of one matrix from its description, in float64, with loops and an SVD."""

    def __init__(self, parameter: np.ndarray) -> None:
        self.p = parameter.astype(np.float64)
        self.momentum = np.zeros_like(self.p)
        self.second = np.zeros(max(self.p.shape))

    def direction(self, gradient: np.ndarray, mu: float) -> np.ndarray:
        rows, columns = gradient.shape
        self.momentum = mu * self.momentum + (1 - mu) * gradient
        x = (1 - mu) * gradient + mu * self.momentum
        target = np.sqrt((x**2).sum() / rows)
        x = np.stack([row / np.sqrt((row**2).sum()) * target for row in x])
        u, s, vh = np.linalg.svd(x / (1.01 * np.sqrt((x**2).sum()) + 1e-6), full_matrices=False)
        for a, b, c in QUINTICS:
            s = a * s + b * s**3 + c * s**5
        s *= np.sqrt(len(s) / (s**2).sum())
        x = u @ np.diag(s) @ vh
        neurons = x if rows >= columns else x.T
        scaled = np.empty_like(neurons)
        for number, neuron in enumerate(neurons):
            self.second[number] = 0.9 * self.second[number] + 0.1 * (neuron**2).mean()
            scaled[number] = neuron / np.sqrt(self.second[number])
        scaled *= np.sqrt((neurons**2).sum() / (scaled**2).sum())
        return scaled if rows >= columns else scaled.T

    def step(self, gradient: np.ndarray, mu: float, lr: float, decay: float) -> None:
        update = self.direction(gradient, mu)
        rows, columns = self.p.shape
        lr *= np.sqrt(max(1.0, rows / columns))
        for m in range(rows):
            for n in range(columns):
                pulls = decay * self.p[m, n] if update[m, n] * self.p[m, n] >= 0 else 0.0
                self.p[m, n] -= lr * (update[m, n] + pulls)


@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20), (9, 1), (2, 12)])
def test_muon_directions_are_those_of_the_slow_reference(shape):
    slow = [SlowMuon(np.zeros(shape)) for _ in range(3)]
    momentum_KMN = torch.zeros(3, *shape)
    second_moment = torch.zeros(3, shape[0], 1) if shape[0] >= shape[1] else torch.zeros(3, 1, shape[1])
    for step in range(5):
        gradient_KMN = random(3, *shape, seed=step) * torch.tensor([1e-3, 1.0, 100.0])[:, None, None]
        mu = 0.85 + 0.02 * step
        direction_KMN = muon_direction(gradient_KMN, momentum_KMN, second_moment, mu, torch.float32)
        for number, one in enumerate(slow):
            expected = one.direction(gradient_KMN[number].double().numpy(), mu)
            np.testing.assert_allclose(direction_KMN[number], expected, rtol=0, atol=2e-4)
            np.testing.assert_allclose(second_moment[number].flatten(), one.second, rtol=2e-3)
    for number, one in enumerate(slow):
        np.testing.assert_allclose(momentum_KMN[number], one.momentum, rtol=0, atol=1e-4 * np.abs(one.momentum).max())


def test_muon_steps_are_those_of_the_slow_reference():
    """Stacked matrices of three shapes, with learning rate, decay and momentum changing from step to step."""
    start = {f"m{n}": random(*shape, seed=n) for n, shape in enumerate([(6, 10), (10, 6), (6, 10), (8, 8), (10, 6)])}
    parameters = {name: leaf(value) for name, value in start.items()}
    slow = {name: SlowMuon(value.numpy()) for name, value in start.items()}
    optimizer = optimizer_of(parameters, muon(*start, lr=0.05))
    for step in range(6):
        mu, factor, decay = 0.85 + 0.02 * step, 0.2 * (step + 1), 0.3 * (1 - step / 6)
        for name, parameter in parameters.items():
            gradient = random(*parameter.shape, seed=50 + step)
            parameter.grad = gradient
            slow[name].step(gradient.double().numpy(), mu, 0.05 * factor, decay)
        optimizer.step(schedule(factor, mu, decay))
        assert all(parameter.grad is None for parameter in parameters.values())
    for name, parameter in parameters.items():
        np.testing.assert_allclose(parameter.detach(), slow[name].p, rtol=0, atol=1e-4)


def test_muon_without_a_gradient_does_not_move_far_or_become_nan():
    parameter = leaf(random(6, 4))
    optimizer = optimizer_of({"m": parameter}, muon("m"))
    parameter.grad = torch.zeros(6, 4)
    optimizer.step(schedule())
    assert torch.equal(parameter, random(6, 4))


def test_half_precision_only_orthogonalises():
    """In bfloat16 the direction has the right norm and is close; state stays float32."""
    exact, close = [
        muon_direction(random(2, 32, 16), torch.zeros(2, 32, 16), torch.zeros(2, 32, 1), 0.9, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert close.dtype == torch.float32
    assert 0 < (exact - close).norm() / exact.norm() < 0.05
    torch.testing.assert_close(close.norm(dim=(1, 2)), torch.full((2,), 4.0), rtol=1e-3, atol=0)


def test_a_parameter_in_no_group_or_in_two_is_noticed():
    parameters = {"a": leaf(random(3)), "b": leaf(random(3))}
    with pytest.raises(AssertionError, match="every parameter is in one group"):
        optimizer_of(parameters, adamw("a"))
    with pytest.raises(AssertionError, match="every parameter is in one group"):
        optimizer_of(parameters, adamw("a", "b"), adamw("c"))


def test_state_written_and_read_back_goes_on_bit_for_bit():
    start = {"table": random(9, 4), "wide": random(4, 9, seed=1), "tall": random(9, 4, seed=2)}
    groups = (adamw("table", weight_decay=0.1), muon("wide", "tall"))

    def run(parameters: dict[str, Tensor], optimizer: MuonAdamW, steps: range) -> None:
        for step in steps:
            for number, parameter in enumerate(parameters.values()):
                parameter.grad = random(*parameter.shape, seed=10 * step + number)
            optimizer.step(schedule(0.5, 0.9, 0.1))

    whole = {name: leaf(value) for name, value in start.items()}
    first = optimizer_of(whole, *groups)
    run(whole, first, range(3))
    resumed = {name: leaf(value.detach()) for name, value in whole.items()}
    second = optimizer_of(resumed, *groups)
    state = {name: value.clone() for name, value in first.state_tensors().items()}
    assert set(state) == {
        "table/exp_avg/0/9", "table/exp_avg_sq/0/9", "wide/momentum/0/4", "wide/second_moment/0/1",
        "tall/momentum/0/9", "tall/second_moment/0/9",
    }  # fmt: skip
    for name, value in second.state_tensors().items():
        assert not value.any()
        value.copy_(state[name])
    second.set_step(3)
    run(whole, first, range(3, 6))
    run(resumed, second, range(3, 6))
    for name in start:
        assert torch.equal(whole[name], resumed[name]), name


shapes = st.lists(st.tuples(st.integers(1, 700), st.integers(1, 40)), min_size=1, max_size=12)


@settings(max_examples=60)
@given(tables=shapes, matrices=shapes, world_size=st.integers(1, 9))
def test_pieces_cover_every_row_once(tables, matrices, world_size):
    named = {f"t{n}": torch.Size(shape) for n, shape in enumerate(tables)}
    named |= {f"m{n}": torch.Size(shape) for n, shape in enumerate(matrices)}
    groups = [adamw(*(n for n in named if n[0] == "t")), muon(*(n for n in named if n[0] == "m"))]
    pieces = cut_into_pieces(named, groups, world_size)
    assert pieces == cut_into_pieces(dict(reversed(named.items())), groups, world_size)
    assert all(0 <= piece.owner < world_size for piece in pieces)
    for name, (rows, _) in named.items():
        own = [piece for piece in pieces if piece.name == name]
        assert [piece.lo for piece in own] == [0] + [piece.hi for piece in own[:-1]]
        assert own[-1].hi == rows
        if name[0] == "m":
            assert len(own) == 1  # Muon needs a matrix whole
        elif len(own) > 1:
            assert [piece.owner for piece in own] == list(range(world_size))
            sizes = [piece.hi - piece.lo for piece in own]
            assert max(sizes) - min(sizes) <= 1
    load = [sum(named[p.name].numel() for p in pieces if p.owner == w and p.name[0] == "m") for w in range(world_size)]
    assert max(load) - min(load) <= max(named[name].numel() for name in named if name[0] == "m")


def test_the_matrices_of_a_deep_model_are_balanced():
    """24 layers of the six matrices of width 1536 over 8 workers."""
    blocks = {"c_q": (1536, 1536), "c_k": (1536, 1536), "c_v": (1536, 1536), "c_proj": (1536, 1536)}
    blocks |= {"fc": (6144, 1536), "mlp_proj": (1536, 6144)}
    named = {f"{layer}.{part}": torch.Size(shape) for layer in range(24) for part, shape in blocks.items()}
    load = [0] * 8
    for piece in cut_into_pieces(named, [muon(*named)], 8):
        load[piece.owner] += named[piece.name].numel()
    assert max(load) * 8 / sum(load) < 1.06
