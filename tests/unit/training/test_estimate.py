"""The paper estimate, by hand, and what moves it."""

from dataclasses import replace

import pytest

from nanochat.training.estimate import Assumptions, estimate, plan_of

PAPER = estimate(Assumptions())


def test_the_run_is_nanochats():
    """5.84 B tokens; 4.775 GFLOP a token = 6 x 729.8 M + attention of 18 short and 6 long layers."""
    model = plan_of(Assumptions())[1].model
    assert [model.windows.count(512), model.windows.count(2048)] == [18, 6]
    per_token = 6 * 729_810_624 + 12 * 1536 * (18 * 512 + 6 * 2048)
    assert PAPER["tokens"] == 5568 * 2**20
    assert PAPER["flops"] == per_token * 5568 * 2**20


def test_times_follow_from_flops_by_hand():
    by_hand_s = 2.788e19 / (8 * 989e12 * 0.42 * 50 / 41)
    assert PAPER["training_bf16_h"] == pytest.approx(by_hand_s / 3600, rel=1e-3)
    assert PAPER["training_fp8_h"] == pytest.approx(by_hand_s * 50 / 57.8 / 3600, rel=1e-3)
    rest = PAPER["start_s"] + PAPER["validation_s"] + PAPER["checkpoints_s"]
    assert PAPER["whole_fp8_h"] == pytest.approx(PAPER["training_fp8_h"] + rest / 3600)
    assert PAPER["validation_s"] == pytest.approx(23 * 80 * 2**19 / 3 / (PAPER["tokens_per_s_bf16"] * 1.156), rel=1e-3)
    assert PAPER["checkpoint_blocked_s"] == pytest.approx((4 * 1.3841e9 + 8.355e9 / 8) / 2.5e9, rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "factor"),
    [({"gpus": 16}, 0.5), ({"mfu_depth_12": 0.21}, 2.0), ({"ray_speed": 0.5}, 2.0), ({"peak_flops": 2 * 989e12}, 0.5)],
)
def test_each_assumption_acts(changes, factor):
    changed = estimate(replace(Assumptions(), **changes))
    assert changed["training_bf16_h"] == pytest.approx(factor * PAPER["training_bf16_h"])


def test_more_depth_and_more_tokens_take_longer():
    assert estimate(Assumptions(depth=26))["training_fp8_h"] > 1.4 * PAPER["training_fp8_h"]
    assert estimate(Assumptions(tokens_per_parameter=12.0))["training_fp8_h"] == pytest.approx(
        1.5 * PAPER["training_fp8_h"], rel=1e-3
    )
