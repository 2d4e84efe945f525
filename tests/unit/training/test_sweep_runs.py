"""The runs of a sweep in this process: plans from budgets, how a run ends, how it goes on."""

import io
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny_pretraining import tiny_config

from nanochat import storage
from nanochat.cluster import sweep
from nanochat.cluster.sweep import _begin, _row, _Story, plan_sweep, run_sweep, train_run
from nanochat.cluster.terminal import Terminal
from nanochat.config.sweep import SweepConfig
from nanochat.errors import ConfigError, DataError
from nanochat.model.scaling import flops_per_token, horizon_tokens
from nanochat.run_context import RunContext
from nanochat.storage import RunFolder, read_json, read_jsonl
from nanochat.training.checkpoint import problem_with, step_folder
from nanochat.training.plan import resolve, with_budget
from nanochat.training.pretrain import Pretraining

ALONE = RunContext(use_gpu=False)


@pytest.fixture
def plan(prepared, tmp_path, on_one_core):
    """Plans runs on the prepared data, which lies in a run directory of its own."""
    data = RunFolder(str(tmp_path / "data"))
    prepared.tokenizer.save(data.tokenizer)
    shutil.copytree(prepared.shards.folder, data.shards)

    def make(*grid, **flags):
        config = SweepConfig(run_dir=str(tmp_path / "sweep"), data_run_dir=data.root, grid=grid)
        return plan_sweep(config, tiny_config(**flags))

    return make


def losses(run):
    return {record["step"]: record["loss"] for record in read_jsonl(run.folder.pretrain.metrics) if "loss" in record}


def test_a_budget_of_the_horizon_changes_nothing():
    config = tiny_config(num_steps=None, global_batch_tokens=None, lr_batch_tokens=None)
    before = resolve(config, 300, 32)
    tokens = horizon_tokens(before.model, config.tokens_per_parameter)
    after = resolve(with_budget(config, 300, 32, "tokens", tokens), 300, 32)
    assert after.num_steps == round(tokens / before.tokens_per_step)
    assert (after.rows_per_step, after.lr_factor) == (before.rows_per_step, before.lr_factor)
    assert after.weight_decay == pytest.approx(before.weight_decay)


@pytest.mark.parametrize(("budget", "amount"), [("tokens", 25_600), ("flops", 1e10)])
def test_steps_batch_and_decay_follow_from_a_budget(budget, amount):
    config = tiny_config(num_steps=None, lr_batch_tokens=None, global_batch_tokens=256)
    once, fourfold = (resolve(with_budget(config, 300, 32, budget, many * amount), 300, 32) for many in (1, 4))
    per_step = 256 * (flops_per_token(once.model, 32) if budget == "flops" else 1)
    assert abs(once.num_steps * per_step - amount) <= per_step / 2
    assert fourfold.weight_decay == pytest.approx(once.weight_decay / 4)
    free = replace(config, global_batch_tokens=None)
    small, large = (resolve(with_budget(free, 300, 32, "tokens", tokens), 300, 32) for tokens in (1e6, 1e9))
    assert small.tokens_per_step < large.tokens_per_step


@pytest.mark.parametrize(("budget", "amount"), [("tokens", 1), ("tokens", 255), ("tokens", 0.1), ("flops", 10)])
def test_a_budget_that_buys_no_step_is_refused(budget, amount):
    with pytest.raises(ConfigError, match=f"{budget}={amount}: buys .* not one step"):
        with_budget(tiny_config(num_steps=None), 300, 32, budget, amount)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (("n_embd=32,33",), "run=n_embd=33: n_embd=33: must be a multiple of head_dim"),
        (("global_batch_tokens=33",), "run=global_batch_tokens=33: global_batch_tokens=33: must be a multiple"),
        (("window_pattern=X",), "run=window_pattern=X: window_pattern='X'"),
    ],
)
def test_a_rule_broken_by_one_run_is_found_before_any_is_begun(plan, tmp_path, grid, message):
    with pytest.raises(ConfigError) as caught:
        plan(*grid)
    assert message in str(caught.value)
    assert not (tmp_path / "sweep").exists()


def test_a_run_ends_once(plan):
    (run,) = plan("seed=0")
    assert not run.has_ended
    train_run(run, ALONE)
    outcome = read_json(run.folder.outcome)
    assert outcome["state"] == "done"
    assert outcome["steps"] == 12
    assert outcome["val_bpb"] == read_jsonl(run.folder.pretrain.metrics)[-1]["val_bpb"]
    before = read_jsonl(run.folder.pretrain.notes)
    train_run(run, ALONE)
    assert read_jsonl(run.folder.pretrain.notes) == before


def test_a_lost_run_goes_on_from_its_checkpoint_exactly(plan, monkeypatch):
    calm, lost = plan("keep_checkpoints=2,3")
    train_run(calm, ALONE)
    whole = Pretraining.schedule

    def breaks(self, step):
        if step == 7:
            raise RuntimeError("a peer is gone")
        return whole(self, step)

    monkeypatch.setattr(Pretraining, "schedule", breaks)
    with pytest.raises(RuntimeError, match="a peer is gone"):
        train_run(lost, ALONE)
    assert not lost.has_ended
    assert len(storage.list_names(lost.folder.pretrain.errors)) == 1
    monkeypatch.setattr(Pretraining, "schedule", whole)
    train_run(lost, ALONE)
    assert [record["note"].rsplit(" ", 1)[1] for record in read_jsonl(lost.folder.pretrain.notes)] == ["0", "6"]
    assert losses(lost) == losses(calm)
    assert read_json(lost.folder.outcome)["val_bpb"] == read_json(calm.folder.outcome)["val_bpb"]


def test_an_error_that_would_come_again_ends_the_run_with_its_reason(plan):
    (run,) = plan("matrix_lr=1e30")
    train_run(run, ALONE)
    outcome = read_json(run.folder.outcome)
    assert outcome["state"] == "failed"
    assert outcome["reason"].startswith("TrainingDivergedError: loss=nan: not finite at step ")
    assert run.has_ended
    (story,) = storage.list_files(run.folder.pretrain.errors)
    with storage.open_read(story) as file:
        assert b"Traceback" in file.read()


def test_a_time_budget_ends_a_run_with_a_checkpoint_and_a_score(plan):
    short, long = plan("training_s=1e-9,1e9", evaluate_every=0)
    train_run(short, ALONE)
    train_run(long, ALONE)
    outcome = read_json(short.folder.outcome)
    assert (outcome["state"], outcome["steps"]) == ("done", 2), "a look at the clock before each step"
    assert outcome["val_bpb"] == read_jsonl(short.folder.pretrain.metrics)[-1]["val_bpb"]
    assert problem_with(step_folder(short.folder.pretrain.checkpoints, 2)) is None
    assert read_json(long.folder.outcome)["steps"] == 12


def test_a_run_that_was_lost_too_often_has_its_reason_and_is_tried_again(plan, tmp_path):
    """Of the error file that Tune leaves, the last line says why."""
    (run,) = plan("seed=0")
    (tmp_path / "error.txt").write_text("Failure # 1\n  File ...\nRuntimeError: a peer is gone\n")
    said = io.StringIO()
    story = _Story([run], Terminal(said))
    trial = SimpleNamespace(config={"run": 0}, error_file=str(tmp_path / "error.txt"))
    story.on_trial_start(trial=trial)
    story.on_trial_recover(trial=trial)
    story.on_trial_error(trial=trial)
    assert said.getvalue().splitlines() == [
        "start      seed=0", "again      seed=0: RuntimeError: a peer is gone",
        "failed     seed=0: RuntimeError: a peer is gone; the same command tries it again",
    ]  # fmt: skip
    row = _row(run, story.lost["seed=0"])
    assert (row["state"], row["val_bpb"]) == ("failed", None)
    assert row["reason"].startswith("RuntimeError: a peer is gone")
    assert not run.has_ended
    assert _row(run, None)["state"] == "stopped"


def test_a_stopped_run_is_not_begun(plan):
    (run,) = plan("seed=0")
    with storage.atomic_write(run.folder.pretrain.stop) as file:
        file.write(b"stop\n")
    train_run(run, ALONE)
    assert not storage.exists(run.folder.pretrain.notes)
    assert not run.has_ended


def test_other_flags_or_other_data_are_refused_in_the_folder_of_a_run(plan):
    (run,) = plan("depth=2")
    _begin(run)
    plan("depth=2")
    with pytest.raises(ConfigError, match=r"pretrain\.matrix_lr=0\.5 \(was 0\.02\): .*depth=2"):
        plan("depth=2", matrix_lr=0.5)
    stage = read_json(run.folder.pretrain.config)
    stage["resolved"]["shards"] = "others"
    storage.write_json(run.folder.pretrain.config, stage)
    with pytest.raises(DataError, match=r"depth=2.*was made with other token shards"):
        plan("depth=2")


def test_the_longest_runs_are_started_first_and_those_that_ended_not_at_all(plan, tmp_path, monkeypatch):
    """Longest by FLOPs: fewer steps of a deeper model cost more."""
    runs = plan("num_steps=4,5", "depth=1,6")
    storage.write_json(plan("num_steps=4", "depth=1")[0].folder.outcome, {"state": "failed", "reason": "told so"})
    started: list[str] = []
    monkeypatch.setattr(sweep, "start_ray", lambda: None)
    monkeypatch.setattr(sweep, "_tuner", lambda config, due, *_: started.extend(run.name for run in due))
    monkeypatch.setattr(sweep, "fit_watched", lambda tuner, watch: None)
    with pytest.raises(KeyboardInterrupt):  # as some are left to do
        run_sweep(SweepConfig(run_dir=str(tmp_path / "sweep")), runs, Terminal(io.StringIO()))
    assert started == ["num_steps=5,depth=6", "num_steps=4,depth=6", "num_steps=5,depth=1"]
