"""Learning rate, momentum and decay at the corners of their schedules, by hand."""

import math

import pytest

from nanochat.config.pretrain import PretrainConfig
from nanochat.training.schedules import lr_factor, muon_momentum, schedule_at

CONFIG = PretrainConfig()  # warm-up 40 steps, warm-down over 65 %, to 5 %


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 1 / 40),
        (19, 0.5),
        (38, 39 / 40),
        (39, 1.0),
        (40, 1.0),
        (350, 1.0),  # the warm-down has 650 of 1,000 steps
        (351, 649 / 650 + 1 / 650 * 0.05),
        (675, 0.5 + 0.5 * 0.05),
        (999, 1 / 650 + 649 / 650 * 0.05),
    ],
)
def test_learning_rate(step, factor):
    assert lr_factor(CONFIG, step, 1000) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("step", "momentum"),
    [
        (0, 0.85),
        (200, 0.91),
        (399, 0.85 + 0.12 * 399 / 400),
        (400, 0.97),
        (699, 0.97),
        (700, 0.97),  # the warm-down has 1,300 of 2,000 steps
        (1350, 0.935),
        (1999, 0.97 - 0.07 * 1299 / 1300),
    ],
)
def test_momentum(step, momentum):
    assert muon_momentum(CONFIG, step, 2000) == pytest.approx(momentum)


def test_a_short_run_is_still_warming_its_momentum_when_it_warms_down():
    assert muon_momentum(CONFIG, 290, 300) == pytest.approx(0.85 + 0.12 * 290 / 400)


@pytest.mark.parametrize(("step", "share"), [(0, 1.0), (250, 0.5 + math.sqrt(0.5) / 2), (500, 0.5), (1000, 0.0)])
def test_weight_decay_falls_along_a_cosine(step, share):
    schedule = schedule_at(CONFIG, step, 1000, weight_decay=0.2)
    assert schedule.muon_weight_decay == pytest.approx(0.2 * share, abs=1e-12)
    assert schedule.lr_factor == lr_factor(CONFIG, step, 1000)
    assert schedule.muon_momentum == muon_momentum(CONFIG, step, 1000)


def test_without_warm_up_and_warm_down_the_rate_is_constant():
    config = PretrainConfig(warmup_steps=0, warmdown_fraction=0.0)
    assert {lr_factor(config, step, 10) for step in range(10)} == {1.0}
    assert muon_momentum(config, 500, 1000) == pytest.approx(0.97)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 41, 300, 5000])
def test_the_rate_stays_above_zero_to_the_last_step(num_steps):
    factors = [lr_factor(CONFIG, step, num_steps) for step in range(num_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
