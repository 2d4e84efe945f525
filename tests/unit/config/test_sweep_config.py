"""Lists and grids to the overrides of each run, and what is refused before anything starts."""

import pytest

from nanochat.config.pretrain import PretrainConfig
from nanochat.config.sweep import SweepConfig, expand, overridden
from nanochat.errors import ConfigError


def test_a_grid_is_every_combination_with_the_type_of_its_field():
    runs = expand(SweepConfig(grid=("depth=2,4", "matrix-lr=0.01,1", "window_pattern=SL", "smear=true", "n_embd=null")))
    assert list(runs.values()) == [
        {"depth": depth, "matrix_lr": rate, "window_pattern": "SL", "smear": True, "n_embd": None}
        for depth in (2, 4) for rate in (0.01, 1)
    ]  # fmt: skip
    assert next(iter(runs)) == "depth=2,matrix_lr=0.01,window_pattern=SL,smear=True,n_embd=None"


def test_lines_of_a_file_are_combined_with_the_grid(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"depth": 2}\n\n{"depth": 4, "flops": 1e15}')
    assert list(expand(SweepConfig(runs=str(path), grid=("seed=0,1",)))) == [
        "depth=2,seed=0", "depth=2,seed=1", "depth=4,flops=1e+15,seed=0", "depth=4,flops=1e+15,seed=1",
    ]  # fmt: skip


def test_a_preset_shrinks_by_naming_fewer_values():
    assert len(expand(SweepConfig(preset="scaling_laws"))) == 4 * 7
    small = expand(SweepConfig(preset="scaling_laws", grid=("flops=1e15,2e15", "depth=4")))
    assert list(small.values()) == [{"flops": 1e15, "depth": 4}, {"flops": 2e15, "depth": 4}]
    assert [run["depth"] for run in expand(SweepConfig(preset="miniseries")).values()] == [4, 6, 8, 10, 12, 14, 16]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "grid=(): a sweep needs runs"),
        ({"grid": ("depth",)}, "grid=depth: is not NAME=VALUE"),
        ({"grid": ("depth=2", "depth=4")}, "grid=depth: a name is there twice"),
        ({"grid": ("depth=2,2",)}, "run=depth=2: is there twice"),
        ({"grid": ("layers=2",)}, "run=layers=2: layers is no flag"),
        ({"grid": ("depth=2,2.5",)}, "run=depth=2.5: depth=2.5 is of the wrong kind"),
        ({"grid": ("depth=true",)}, "depth=True is of the wrong kind"),
        ({"grid": ("depth=2,",)}, "depth= is of the wrong kind"),
        ({"grid": ("dtype=float16",)}, "dtype=float16 is of the wrong kind"),
        ({"grid": ("flops=1e15", "tokens=5")}, "run=flops=1e+15,tokens=5: has 2 budgets"),
        ({"grid": ("flops=-1",)}, "flops=-1 must be positive"),
        ({"grid": ("training_s=Infinity",)}, "training_s=inf must be positive"),
        ({"runs": "/nowhere"}, "runs=/nowhere: cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_run_and_the_field(fields, message):
    with pytest.raises(ConfigError) as caught:
        expand(SweepConfig(**fields))
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ['{"depth": 2}\n{"depth": 4', "[2]", ""])
def test_a_file_is_lines_of_objects(tmp_path, text):
    path = tmp_path / "runs.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"is no JSON object|a sweep needs runs"):
        expand(SweepConfig(runs=str(path)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "runs=PATH: line 3 overrides nothing. Leave it out, or give a --grid"),
        ('{"seed": ' + "[" * 100_000, "runs=PATH: line 3 is no JSON object of single values"),
        ('{"seed": ' + "[" * 900 + "]" * 900 + "}", "runs=PATH: line 3 is no JSON object of single values"),
        ('{"seed": {"a": 1}}', "runs=PATH: line 3 is no JSON object of single values"),
        ("7", "runs=PATH: line 3 is no JSON object of single values"),
        ('{"seed": 1, "depth": 2}', "run=seed=1,depth=2: is there twice, before as depth=2,seed=1. Leave one of them"),
        ('{"depth": 2, "flops": 1000000, "seed": 2}', "is there twice, before as seed=2,depth=2,flops=1e+06"),
        ('{"window_pattern": "' + "L" * 300 + '"}', "must have a name of at most 200 characters"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_is_named(tmp_path, line, message):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"depth": 2, "seed": 1}\n\n' + line + "\n")
    if "flops" in line:
        path.write_text('{"seed": 2, "depth": 2, "flops": 1e6}\n\n' + line)
    with pytest.raises(ConfigError) as caught:
        expand(SweepConfig(runs=str(path)))
    assert message.replace("PATH", str(path)) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_line_without_overrides_is_the_grid_alone(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{}\n{"smear": true}')
    assert list(expand(SweepConfig(runs=str(path), grid=("depth=2",)))) == ["depth=2", "smear=True,depth=2"]


def test_names_tell_values_apart_however_close_and_are_short_where_they_can_be():
    runs = expand(SweepConfig(grid=("matrix_lr=0.1234567,0.1234568,0.123457,0.5,1e30,1.0",)))
    assert list(runs) == [f"matrix_lr={value}" for value in ("0.1234567", "0.1234568", "0.123457", "0.5", "1e+30", "1")]
    with pytest.raises(ConfigError, match="run=matrix_lr=1: is there twice"):
        expand(SweepConfig(grid=("matrix_lr=1,1.0",)))


def test_a_name_is_in_the_file_or_in_the_grid(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"depth": 2}')
    with pytest.raises(ConfigError, match=r"grid=depth: is given in .*runs\.jsonl, too"):
        expand(SweepConfig(runs=str(path), grid=("depth=2",)))


def test_overrides_go_over_the_flags_of_all_runs_and_obey_their_rules():
    base = PretrainConfig(depth=8, seed=3)
    assert overridden("x", base, {"depth": 2, "training_s": 60}) == PretrainConfig(depth=2, seed=3)
    with pytest.raises(ConfigError, match=r"run=depth=0: depth=0: must be at least 1"):
        overridden("depth=0", base, {"depth": 0})


@pytest.mark.parametrize("given", [{"num_steps": 5}, {"tokens_per_parameter": 20.0}])
def test_a_budget_and_a_horizon_are_one_too_many(given):
    with pytest.raises(ConfigError, match="follows from the run's budget"):
        overridden("x", PretrainConfig(**given), {"flops": 1e15})
    with pytest.raises(ConfigError, match="follows from the run's budget"):
        overridden("x", PretrainConfig(), {"tokens": 1e9} | given)
    assert overridden("x", PretrainConfig(**given), {"training_s": 60}) == PretrainConfig(**given)


@pytest.mark.parametrize(("field", "value"), [("gpus_per_run", 2), ("gpus_per_run", -1), ("cpus_per_run", 0)])
def test_what_a_run_may_use_is_checked(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value}: "):
        SweepConfig(**{field: value})
