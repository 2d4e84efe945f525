"""Every bad value of the pretraining and cluster configs is refused with value, rule and remedy, all at once."""

import dataclasses
import itertools
import math
import pickle

import pytest

from nanochat.config.cluster import ClusterConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.errors import ConfigError

DEFAULT = "Leave it out for the default."


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("depth", 0, "must be at least 1"),
        ("head_dim", 1, "must be at least 2"),
        ("n_embd", 0, "must be at least 1"),
        ("n_kv_head", -1, "must be at least 1"),
        ("num_steps", 0, "must be at least 1"),
        ("global_batch_tokens", 0, "must be at least 1"),
        ("lr_batch_tokens", 0, "must be at least 1"),
        ("warmup_steps", -1, "must be at least 0"),
        ("micro_batch_rows", 0, "must be at least 1"),
        ("evaluate_every", -1, "must be at least 0"),
        ("sample_every", -1, "must be at least 0"),
        ("checkpoint_every", -1, "must be at least 0"),
        ("node_failure_s", 0.5, "must be at least 1.0"),
        ("keep_checkpoints", 0, "must be at least 1"),
        ("log_every", 0, "must be at least 1"),
        ("validation_tokens", 0, "must be at least 1"),
        ("sample_tokens", 0, "must be at least 1"),
        ("seed", -1, "must be at least 0"),
        ("warmdown_fraction", 1.5, "must lie in [0, 1]"),
        ("warmdown_fraction", math.nan, "must lie in [0, 1]"),
        ("final_lr_factor", -0.1, "must lie in [0, 1]"),
        ("matrix_lr", -0.1, "must be a number from 0 on"),
        ("embedding_lr", math.nan, "must be a number from 0 on"),
        ("unembedding_lr", math.inf, "must be a number from 0 on"),
        ("scalar_lr", -1.0, "must be a number from 0 on"),
        ("weight_decay", -0.1, "must be a number from 0 on"),
    ],
)
def test_a_bad_value_is_named_with_rule_and_remedy(field, value, rule):
    with pytest.raises(ConfigError) as raised:
        PretrainConfig(**{field: value})
    assert str(raised.value) == f"{field}={value}: {rule}. {DEFAULT}"


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_the_horizon_is_a_positive_number(value):
    with pytest.raises(ConfigError, match=r"tokens_per_parameter=.*: must be positive. 12 is a good value"):
        PretrainConfig(tokens_per_parameter=value)


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigError) as raised:
        PretrainConfig(depth=0, log_every=0, final_lr_factor=2)
    for field in ("depth=0", "log_every=0", "final_lr_factor=2"):
        assert f"{field}: must" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("config", [PretrainConfig(), ClusterConfig()])
def test_configs_are_frozen_documented_and_go_through_pickle(config):
    import ast
    import inspect

    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 3
    body = ast.parse(inspect.getsource(type(config))).body[0].body
    for field, after in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr), f"{field.target.id} has no help text"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": 0}, f"num_workers=0: must be at least 1. {DEFAULT}"),
        ({"min_workers": -1}, f"min_workers=-1: must be at least 1. {DEFAULT}"),
        ({"num_workers": 2, "min_workers": 3}, "min_workers=3: must not exceed num_workers=2. Lower it."),
        ({"cpus_per_worker": 0.0}, "cpus_per_worker=0.0: must be positive. 0.5 suits a small machine."),
    ],
)
def test_a_bad_cluster_is_refused(changes, message):
    with pytest.raises(ConfigError) as raised:
        ClusterConfig(**changes)
    assert str(raised.value) == message


def test_good_extremes_are_accepted():
    PretrainConfig(warmdown_fraction=0.0, final_lr_factor=1.0, matrix_lr=0.0, evaluate_every=0, warmup_steps=0)
    ClusterConfig(num_workers=2, min_workers=2, cpus_per_worker=0.25)
