"""Nodes that leave and come while a model is pretrained: the same rows, the same losses, little done twice."""

import itertools
import shutil
import time
from pathlib import Path

import pytest
from simulated_cluster import SimulatedCluster

from nanochat import storage
from nanochat.training.checkpoint import steps_found

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

STEPS = 240
ROWS = 16
PRETRAIN = (
    "ray_jobs/pretrain.py", "--address", "auto", "--by-label", "--depth", "2", "--head-dim", "16", "--n-embd", "32",
    "--window-pattern", "L", "--num-steps", str(STEPS), "--global-batch-tokens", str(ROWS * 512), "--dtype", "float32",
    "--compile", "off", "--evaluate-every", "0", "--sample-every", "0", "--log-every", "1", "--log-row-ids",
    # at rates that train in a calm way: what two workers round otherwise than one stays as small as it is
    "--matrix-lr", "0.0005", "--embedding-lr", "0.01", "--unembedding-lr", "0.0005", "--scalar-lr", "0.005",
)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(cluster, text, tmp_path_factory) -> Path:
    """A run directory with shards; the cluster has a node for data and two for training."""
    for work in ("data", "train", "train"):
        cluster.add(work)
    run = tmp_path_factory.mktemp("prepared") / "run"
    flags = ("--corpus", text, "--vocab-size", "300", "--sequence-len", "512", "--address", "auto", "--by-label")
    done = cluster.submit("ray_jobs/prepare_data.py", "--run-dir", str(run), *flags)
    assert done.returncode == 0, done.stdout[-3000:]
    return run


@pytest.fixture(scope="module")
def calm(cluster, prepared, tmp_path_factory) -> Path:
    """The same training on two workers to its end, without disturbance."""
    run = tmp_path_factory.mktemp("calm") / "run"
    shutil.copytree(prepared, run)
    done = cluster.submit(*PRETRAIN, "--num-workers", "2", "--checkpoint-every", "0", "--run-dir", str(run))
    assert done.returncode == 0, done.stdout[-3000:]
    return run / "pretrain"


def losses(folder: Path) -> dict[int, float]:
    records = storage.read_jsonl(str(folder / "metrics.jsonl"))
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def last_step(folder: Path) -> int:
    return max(losses(folder), default=-1) if (folder / "metrics.jsonl").exists() else -1


def rows(folder: Path) -> dict[int, set[int]]:
    """The rows of each global step over all workers; a step that was done twice must have had the same."""
    by_start: dict[int, dict[int, list[list[int]]]] = {}
    for rank in (0, 1):
        for record in storage.read_jsonl(str(folder / f"rows_{rank:02d}.jsonl")):
            by_start.setdefault(record["step"], {}).setdefault(rank, []).append(record["row_ids"])
    found = {}
    for step, of_ranks in by_start.items():
        alone = {tuple(sorted(ids)) for ids in of_ranks.get(0, []) if len(ids) == ROWS}
        halves = {tuple(sorted([*a, *b])) for a in of_ranks.get(0, []) if len(a) < ROWS for b in of_ranks.get(1, [])}
        assert len(alone | halves) == 1, f"step {step} had different rows"
        found[step] = set(next(iter(alone | halves)))
    return found


def workers_in_turn(folder: Path) -> list[int]:
    """How many workers did each step, in the order of time; steps that were done again are there twice."""
    return [ROWS // len(record["row_ids"]) for record in storage.read_jsonl(str(folder / "rows_00.jsonl"))]


def notes(folder: Path) -> list[str]:
    return [record["note"] for record in storage.read_jsonl(str(folder / "notes.jsonl"))]


@pytest.mark.slow
def test_two_workers_one_two_again(cluster: SimulatedCluster, prepared: Path, calm: Path, tmp_path: Path):
    """A node dies: one worker goes on; another node comes: two again. Same rows of each step, losses within 1e-5."""
    run = tmp_path / "run"
    shutil.copytree(prepared, run)
    folder = run / "pretrain"
    job = cluster.start(
        *PRETRAIN, "--num-workers", "2", "--min-workers", "1", "--checkpoint-every", "5", "--run-dir", str(run)
    )  # fmt: skip
    job.wait_for(lambda: last_step(folder) > 15, 240)
    cluster.kill("train")
    job.wait_for(lambda: workers_in_turn(folder)[-1] == 1, 240)
    cluster.add("train")
    job.wait_for(lambda: workers_in_turn(folder)[-1] == 2, 240)
    done = job.result(400)
    assert done.returncode == 0, done.stdout[-6000:]
    workers = workers_in_turn(folder)
    changes = [after for before, after in itertools.pairwise(workers) if after != before]
    assert changes == [1, 2], workers
    assert rows(folder) == rows(calm)
    got, expected = losses(folder), losses(calm)
    assert sorted(got) == list(range(STEPS))
    assert max(abs(got[step] - expected[step]) for step in got) < 1e-5


@pytest.mark.long
def test_a_drained_node_costs_little(cluster: SimulatedCluster, prepared: Path, calm: Path, tmp_path: Path):
    """Half a minute's notice: checkpoints are written just in time, so little is done again; the losses are equal."""
    run = tmp_path / "run"
    shutil.copytree(prepared, run)
    folder = run / "pretrain"
    job = cluster.start(*PRETRAIN, "--num-workers", "2", "--checkpoint-every", "0", "--run-dir", str(run))
    job.wait_for(lambda: last_step(folder) > 5, 240)
    cluster.drain("train", 30)
    gone_s = time.monotonic() + 30
    job.wait_for(lambda: any("will be taken away" in note for note in notes(folder)), 30)
    job.wait_for(lambda: time.monotonic() > gone_s - 2, 40)
    written = max(steps_found(str(folder / "checkpoints")))
    cluster.kill("train")
    cluster.add("train")
    done = job.result(400)
    assert done.returncode == 0, done.stdout[-6000:]
    said = notes(folder)
    assert sum("will be taken away" in note for note in said) == 2, said
    assert f"a worker group starts at step {written}" in said, said
    assert losses(folder) == losses(calm)
    assert rows(folder) == rows(calm)
