"""The line's presets: what they are, what a smoke run keeps of them, prices."""

import dataclasses
from types import SimpleNamespace

import pytest

from nanochat.cluster import nodes, rl_job
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
    for name in ("cluster", "rl_workers", "corpus", "rollouts"):
        assert getattr(smoke, name) == getattr(line, name)
    assert smoke.tokenizer.max_chars <= 20_000_000
    for stage in (smoke.pretrain, smoke.sft, smoke.rl):
        assert (stage.checkpoint_every, stage.keep_checkpoints, stage.evaluate_every, stage.sample_every) == (
            5,
            1,
            0,
            0,
        )
    assert smoke.pretrain.validation_tokens == smoke.sft.validation_tokens == 2 * line.shards.sequence_len
    assert (smoke.sft.chat_problems, smoke.rl.held_out_problems) <= (2, 16)
    assert smoke.score_base.max_per_task == smoke.score_chat.max_per_task == 8
    assert dataclasses.replace(smoke.rl, num_steps=line.rl.num_steps).samples_per_group == line.rl.samples_per_group


ROOMS = {"1x12gb": (1, 1, 0.5, True), "1x24gb": (1, 1, 0.5, True), "speedrun": (2, 6, 0.0, True),
         "multinode": (8, 8, 0.0, True)}  # fmt: skip


@pytest.mark.parametrize("name", ROOMS)
def test_a_presets_practice_has_room_where_nodes_come_when_they_are_asked_for(name, monkeypatch):
    """(learners, actors, the share of a GPU, on GPUs): also while the head is alone, on cluster.yaml's groups."""
    line = PRESETS[name][1]
    gpus = line.cluster.num_workers if line.cluster.num_workers < 8 else 8
    group = {"CPU": 192, "GPU": gpus}
    groups = [
        SimpleNamespace(name=work, resources=group, max_count=2 if line.cluster.by_label else 1)
        for work in ("train", "rollouts")[: 1 + line.cluster.by_label]
    ]
    here = [] if line.cluster.num_workers > 1 else [{"Alive": True, "Labels": {}, "Resources": group}]
    head = {"Alive": True, "Labels": {"work": "head"}, "Resources": {"CPU": 0}}
    monkeypatch.setattr(nodes.ray, "nodes", lambda: [head, *here])
    monkeypatch.setattr(nodes.state, "get_cluster_config", lambda: SimpleNamespace(node_group_configs=groups))
    cluster = dataclasses.replace(line.cluster, num_workers=line.rl_workers or line.cluster.num_workers)
    assert rl_job.share_machines(cluster, line.rollouts, print) == ROOMS[name]


def test_prices_are_checked():
    line = PRESETS["demo"][1]
    assert dataclasses.replace(line, price=("train=98.32", "data=0")).prices() == {"train": 98.32, "data": 0.0}
    for wrong in ("train", "train=", "=3", "train=x", "train=-1", "train=nan", "train=inf"):
        with pytest.raises(ConfigError, match=rf"^price={wrong}: must be KIND=PRICE, .*train=98\.32"):
            dataclasses.replace(line, price=(wrong,))
    with pytest.raises(ConfigError, match=r"^stages=\(\): must name one of data, pretrain"):
        dataclasses.replace(line, stages=())
