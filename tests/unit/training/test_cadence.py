"""When checkpoints are due: as told, or as their measured cost has it, the same on every worker."""

import itertools

import pytest
import worker_group
from tiny_pretraining import Run, pretrain_as_worker, tiny_config

from nanochat import storage
from nanochat.run_context import RunContext
from nanochat.storage import StageFolder
from nanochat.training import cadence
from nanochat.training.cadence import WARM_STEPS, Cadence, young_daly_s
from nanochat.training.pretrain import Pretraining


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until told."""
    now = [0.0]
    monkeypatch.setattr(cadence.time, "perf_counter", lambda: now[0])
    return now


def saves(clock, *, step_s=1.0, cost_s=2.0, failures_s=900.0, first=0, steps=400, every=None):
    """Run a loop of steps of `step_s`; returns where it saved and what was noted."""
    notes, at = [], []
    chosen = Cadence(every, failures_s, lambda value: value, notes.append)
    for step in range(first + 1, first + steps):
        clock[0] += 50.0 if step == first + 1 else step_s  # the first one is compiled
        if chosen.due(step):
            clock[0] += cost_s
            chosen.saved(step, cost_s)
            at.append(step)
    return at, notes


def test_the_interval_is_the_one_that_loses_least():
    cost, failures = 3.0, 20_000.0
    best = young_daly_s(cost, failures)

    def lost(interval):
        return cost / interval + interval / 2 / failures

    assert lost(best) == min(lost(best * factor) for factor in (0.5, 0.9, 0.99, 1.0, 1.01, 1.1, 2.0))
    assert young_daly_s(0.0, failures) == 0.0
    assert young_daly_s(1e9, failures) == failures


@pytest.mark.parametrize("first", [0, 137])
def test_the_first_checkpoint_decides_for_all_that_follow(clock, first):
    at, notes = saves(clock, first=first)
    assert at == list(range(first + 1 + WARM_STEPS, first + 400, 60))  # sqrt(2 * 2 s * 900 s) of steps of 1 s
    assert notes == [
        "a checkpoint every 60 steps of 1 s from now on: it stops training for 2 s, and there are 900 s between "
        "failures (Young/Daly)"
    ]


def test_what_costs_nothing_is_done_at_every_step_and_what_costs_too_much_once_a_failure(clock):
    assert set(itertools.starmap(int.__rsub__, itertools.pairwise(saves(clock, cost_s=0.0)[0]))) == {1}
    at, _ = saves(clock, cost_s=1e6, failures_s=50.0)
    assert {after - before for before, after in itertools.pairwise(at)} == {50}


def test_a_step_longer_than_the_interval_is_followed_by_a_checkpoint(clock):
    at, _ = saves(clock, step_s=1000.0, failures_s=600.0, steps=20)
    assert at == list(range(1 + WARM_STEPS, 20))


def test_a_node_that_goes_may_have_the_first_checkpoint_written(clock):
    """One that was not due: its cost decides as well, unless no step came before it."""
    chosen = Cadence(None, 900.0, lambda value: value, print)
    assert not chosen.due(1)
    chosen.saved(1, 50.0)
    clock[0] += 3.0
    assert not chosen.due(4)
    clock[0] += 2.0
    chosen.saved(4, 2.0)
    assert [step for step in range(5, 200) if chosen.due(step)] == [64]


def test_a_cadence_that_is_told_is_kept(clock):
    assert saves(clock, every=90) == ([90, 180, 270, 360], [])
    assert saves(clock, every=0) == ([], [])


def test_two_workers_save_at_the_same_steps(prepared, tmp_path):
    """Each has its own clock; a checkpoint is whole only if both have written their part of it."""
    config = tiny_config(
        num_steps=40, checkpoint_every=None, node_failure_s=1.0, keep_checkpoints=9, evaluate_every=0, sample_every=0
    )
    arguments = (str(tmp_path / "tokenizer"), prepared.shards.folder, config)
    prepared.tokenizer.save(arguments[0])
    worker_group.run_group(2, tmp_path / "two", pretrain_as_worker, *arguments)
    folder = StageFolder(str(tmp_path / "two"))
    notes = [record["note"] for record in storage.read_jsonl(folder.notes) if "Young" in record["note"]]
    steps = storage.list_names(folder.checkpoints)
    assert len(notes) == 1
    assert len(steps) >= 2
    for step in steps:
        names = storage.list_names(storage.join(folder.checkpoints, step))
        assert {"checksums_00_of_02.json", "checksums_01_of_02.json"} <= set(names), step


def test_cadence_changes_no_number(new_run):
    losses = {}
    for name, every in (("told", 5), ("chosen", None)):
        run: Run = new_run(name)
        run(tiny_config(num_steps=30, checkpoint_every=every, node_failure_s=1.0, evaluate_every=0, sample_every=0))
        records = storage.read_jsonl(run.folder.metrics)
        losses[name] = [record["loss"] for record in records if "loss" in record]
    assert losses["told"] == losses["chosen"]
    assert len(losses["told"]) == 30


@pytest.mark.parametrize(("workers", "of_a_node", "nodes"), [(1, 1, 1), (4, 4, 1), (8, 4, 2), (9, 4, 3)])
def test_several_nodes_fail_that_much_sooner(new_run, monkeypatch, workers, of_a_node, nodes):
    monkeypatch.setattr(Pretraining, "shared", lambda self, value: value)
    config, run = tiny_config(node_failure_s=600.0), RunContext(world_size=workers, local_world_size=of_a_node)
    one = Pretraining(config, run, new_run().inputs(config, rows_per_step=8))
    assert one.cadence.failures_s == 600.0 / nodes
