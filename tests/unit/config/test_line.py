"""The line's presets: what they are, what a smoke run keeps of them, prices."""

import dataclasses

import pytest

from nanochat.config.line import LineConfig, smoke_of
from nanochat.config.presets import PRESETS
from nanochat.errors import ConfigError
from nanochat.training.plan import resolve


def plan_of(line: LineConfig):
    return resolve(line.pretrain, line.tokenizer.vocab_size, line.shards.sequence_len)


def test_the_speedrun_is_the_recipe_of_nanochats_run():
    """Source: the steps and the batch that nanochat derives at depth 24 and ratio 8."""
    plan = plan_of(PRESETS["speedrun"][1])
    assert (plan.num_steps, plan.tokens_per_step) == (5568, 1 << 20)
    assert plan.rows_per_step % 8 == 0


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_workers_divide_its_rows(name):
    line = PRESETS[name][1]
    assert plan_of(line).rows_per_step % line.cluster.num_workers == 0


@pytest.mark.parametrize("name", PRESETS)
def test_a_smoke_run_is_the_same_model_batch_and_place_for_ten_steps(name):
    line = PRESETS[name][1]
    smoke = smoke_of(line)
    assert smoke.run_dir == f"{line.run_dir}/smoke"
    assert smoke.pretrain.num_steps == smoke.sft.num_steps == smoke.rl.num_steps == 10
    assert "serve" not in smoke.stages
    assert not smoke.smoke
    real, tried = plan_of(line), plan_of(smoke)
    assert (tried.model, tried.rows_per_step) == (real.model, real.rows_per_step)
    assert (smoke.cluster, smoke.corpus, smoke.rollouts) == (line.cluster, line.corpus, line.rollouts)
    assert dataclasses.replace(smoke.rl, num_steps=line.rl.num_steps).samples_per_group == line.rl.samples_per_group


def test_prices_are_checked():
    line = PRESETS["demo"][1]
    assert dataclasses.replace(line, price=("train=98.32", "data=0")).prices() == {"train": 98.32, "data": 0.0}
    for wrong in ("train", "train=", "=3", "train=x", "train=-1", "train=nan", "train=inf"):
        with pytest.raises(ConfigError, match=rf"^price={wrong}: must be KIND=PRICE, .*train=98\.32"):
            dataclasses.replace(line, price=(wrong,))
    with pytest.raises(ConfigError, match=r"^stages=\(\): must name one of data, pretrain"):
        dataclasses.replace(line, stages=())
