"""Pretraining under Ray Train: exactness through kills, worker counts, errors, interruption."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanochat.config.cluster import ClusterConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.errors import ConfigError, DataError, TrainingDivergedError
from nanochat.storage import StageFolder, read_jsonl
from nanochat.training.checkpoint import Checkpoint, step_folder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
TINY = PretrainConfig(
    depth=2, head_dim=16, n_embd=32, window_pattern="L", num_steps=18, global_batch_tokens=8 * 64, warmup_steps=5,
    dtype="float32", compile="off", evaluate_every=9, sample_every=0, sample_tokens=4, checkpoint_every=6, log_every=1,
    log_row_ids=True,
)  # fmt: skip


@pytest.fixture
def pretrain(ray_session, tiny_run):
    """Run TINY on Ray into a folder and return its checkpoint."""
    from nanochat.cluster.trainer import pretrain_worker, train_on_ray
    from nanochat.data.token_shards import TokenShards
    from nanochat.training.plan import resolve

    def train(folder, config=TINY, worker=pretrain_worker, run=tiny_run, **cluster):
        shards = TokenShards.load(str(run / "shards"))
        settings = ClusterConfig(**({"num_workers": 2, "cpus_per_worker": 0.5} | cluster))
        plan = resolve(config, shards.recipe.vocab_size, shards.sequence_len)
        return train_on_ray(
            config, plan, settings, shards, str(run / "tokenizer"), StageFolder(str(folder)), lambda: None, worker
        )

    return train


def losses(folder):
    records = [record for record in read_jsonl(f"{folder}/metrics.jsonl") if "loss" in record]
    return {record["step"]: record["loss"] for record in records}


def notes_of(folder):
    return [record["note"] for record in read_jsonl(f"{folder}/notes.jsonl")]


def rows_of_steps(folder, rank):
    """Row ids by step; a step that was done twice must have had the same rows."""
    found = {}
    for record in read_jsonl(f"{folder}/rows_{rank:02d}.jsonl"):
        assert found.setdefault(record["step"], record["row_ids"]) == record["row_ids"], (
            "a repeated step had other rows"
        )
    return found


def state_of(folder, step):
    checkpoint = Checkpoint(step_folder(f"{folder}/checkpoints", step))
    tensors = dict(checkpoint.model_tensors())
    for rank in range(checkpoint.state["world_size"]):
        from safetensors.torch import load_file

        name = f"optimizer_{rank:02d}_of_{checkpoint.state['world_size']:02d}.safetensors"
        tensors |= load_file(f"{checkpoint.folder}/{name}")
    return tensors


def assert_same_run(folder, expected, last_step):
    """Losses, rows of every batch, weights and optimiser state are equal bit for bit."""
    assert losses(folder) == losses(expected)
    for rank in (0, 1):
        assert rows_of_steps(folder, rank) == rows_of_steps(expected, rank)
    before, after = state_of(expected, last_step), state_of(folder, last_step)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def untouched(pretrain, runs):
    """An uninterrupted run of two workers, made once a module."""
    folder = runs / "untouched"
    if not folder.exists():
        assert pretrain(folder) is not None
    return folder


def test_kills_change_nothing(pretrain, untouched, runs):
    """Kill -9 in a step, during a checkpoint, just after one: same losses, rows, weights, optimiser, bit for bit."""
    from faulty_worker import Kill, worker_with

    folder, marks = runs / "killed", runs / "marks"
    marks.mkdir()
    kills = [Kill("step", rank=1, count=9), Kill("write", rank=0, count=1), Kill("after_save", rank=1, count=1)]
    assert pretrain(folder, worker=worker_with(kills, marks), max_failures=5) is not None
    assert len(list(marks.iterdir())) == 3, "every kill happened"
    assert len([note for note in notes_of(folder) if "failed: " in note]) >= 3, "and was noted with its reason"
    assert_same_run(folder, untouched, 18)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_sixty_kills_change_nothing(pretrain, runs):
    """Twenty kills of each kind, at moments drawn from a seed."""
    from faulty_worker import Kill, worker_with

    config = replace(TINY, num_steps=480, evaluate_every=0)
    assert pretrain(runs / "calm", config) is not None
    draw = random.Random(0)
    places = {"step": 12, "write": 2, "after_save": 1}  # and the largest how-manieth call
    kills = [
        Kill(place, rank=draw.randrange(2), count=draw.randint(1, most), number=number)
        for number in range(20)
        for place, most in places.items()
    ]
    marks = runs / "many_marks"
    marks.mkdir()
    assert pretrain(runs / "stormy", config, worker=worker_with(kills, marks), max_failures=100) is not None
    assert len(list(marks.iterdir())) == 60
    assert_same_run(runs / "stormy", runs / "calm", 480)


def test_two_workers_equal_one(pretrain, untouched, runs):
    folder = runs / "one"
    assert pretrain(folder, num_workers=1) is not None
    one, two = losses(folder), losses(untouched)
    assert one.keys() == two.keys()
    assert max(abs(one[step] - two[step]) for step in one) < 1e-4
    ids = {step: sorted(rows_of_steps(untouched, 0)[step] + rows_of_steps(untouched, 1)[step]) for step in two}
    assert ids == {step: sorted(rows) for step, rows in rows_of_steps(folder, 0).items()}


def test_a_checkpoint_of_two_workers_continues_on_one(pretrain, untouched, runs):
    folder = runs / "continued"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copytree(step_folder(f"{untouched}/checkpoints", 12), step_folder(f"{folder}/checkpoints", 12))
    assert pretrain(folder, num_workers=1) is not None
    got, expected = losses(folder), losses(untouched)
    assert set(got) == set(range(12, 18))
    assert max(abs(got[step] - expected[step]) for step in got) < 1e-4


@pytest.mark.slow
def test_elastic_workers_start_with_what_fits_and_divides(pretrain, untouched, runs):
    """Four are asked for and three fit, which do not divide 8 rows: training begins with two, on the same rows."""
    folder = runs / "elastic"
    assert pretrain(folder, num_workers=4, min_workers=1, cpus_per_worker=1.25) is not None
    assert Checkpoint(step_folder(f"{folder}/checkpoints", 18)).state["world_size"] == 2
    got, expected = losses(folder), losses(untouched)
    assert got.keys() == expected.keys()
    assert max(abs(got[step] - expected[step]) for step in got) < 1e-4


def test_a_damaged_checkpoint_is_passed_over_and_named(pretrain, untouched, runs):
    folder = runs / "damaged"
    shutil.copytree(untouched, folder)
    newest = Path(step_folder(f"{folder}/checkpoints", 18))
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-10] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    assert pretrain(folder) is not None
    notes = notes_of(folder)
    assert any("step_000018 is passed over: model.safetensors is damaged" in note for note in notes)
    assert notes[-1].endswith("starts at step 12")
    assert losses(folder) == losses(untouched)


def test_a_damaged_token_shard_ends_the_run_at_once_and_is_named(pretrain, tiny_run, tmp_path):
    """The error of a task of Ray Data comes out as it was, and is not tried again."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shard = sorted((run / "shards" / "train").glob("*.parquet"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    folder = run / "pretrain"
    with pytest.raises(DataError, match=rf"shards={shard}: is damaged \(row group \d.*prepare_data\.py again"):
        pretrain(folder, replace(TINY, num_steps=400, evaluate_every=0), run=run)
    assert len([note for note in notes_of(folder) if "starts at step" in note]) == 1


def test_an_error_in_the_code_ends_the_run_at_once(pretrain, runs):
    """It is not tried again; what comes out is the worker's own exception, which names its file and line."""

    def broken(job):
        raise KeyError("no such column")

    folder = runs / "broken"
    with pytest.raises(KeyError, match="no such column") as caught:
        pretrain(folder, worker=broken)
    (story,) = caught.value.__notes__
    assert re.search(r"in worker [01]:\n.*test_pretraining\.py\", line \d+, in broken", story, re.DOTALL), story
    path = re.search("the whole story: (.*)", story)[1]
    assert path.startswith(str(folder))
    assert "KeyError: 'no such column'" in Path(path).read_text()
    notes = notes_of(folder)
    assert [note for note in notes if "starts at step" in note] == ["a worker group starts at step 0"]
    assert any(re.fullmatch("worker [01] failed: KeyError: 'no such column'", note) for note in notes)


def test_a_model_that_cannot_fit_ends_the_run_at_once(pretrain, runs):
    config = replace(TINY, depth=64, n_embd=8192)
    with pytest.raises(ConfigError, match=r"^depth=64: needs \d+\.\d\d GiB on each worker \(weights 19") as raised:
        pretrain(runs / "large", config)
    assert "\n" not in str(raised.value)
    assert sum("starts at step" in note for note in notes_of(runs / "large")) == 1


def test_divergence_names_step_and_checkpoint(pretrain, runs):
    from faulty_worker import worker_whose_weights_turn_nan

    folder = runs / "diverged"
    with pytest.raises(TrainingDivergedError, match=r"not finite at step 8; the last good one is .*step_000006"):
        pretrain(folder, worker=worker_whose_weights_turn_nan(8), num_workers=1)
    assert len([note for note in notes_of(folder) if "starts at step" in note]) == 1


def command(run_dir):
    flags = "--depth 2 --head-dim 16 --n-embd 32 --window-pattern L --num-steps 200 --global-batch-tokens 512"
    more = "--dtype float32 --compile off --evaluate-every 0 --sample-every 0 --checkpoint-every 100 --log-every 10"
    return [sys.executable, str(ROOT / "ray_jobs/pretrain.py"), "--run-dir", str(run_dir), "--cpus-per-worker", "0.5",
            *flags.split(), *more.split()]  # fmt: skip


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def test_interrupt_checkpoints_and_the_same_command_resumes(tiny_run, tmp_path):
    """Ctrl-C leaves with a checkpoint; a killed driver too is no loss; the terminal stays quiet."""
    run_dir = tmp_path / "run"
    shutil.copytree(tiny_run, run_dir)
    metrics = run_dir / "pretrain" / "metrics.jsonl"

    def steps():
        return len(losses(run_dir / "pretrain")) if metrics.exists() else 0

    first = subprocess.Popen(command(run_dir), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: steps() >= 2 or first.poll() is not None, 90)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130, said
    assert "run the same command to go on" in said
    assert len(said.splitlines()) < 12, said
    stopped_at = max(int(name.name[5:]) for name in (run_dir / "pretrain" / "checkpoints").iterdir())
    assert 0 < stopped_at < 200

    second = subprocess.Popen(command(run_dir), stderr=subprocess.PIPE, text=True, start_new_session=True)
    before = steps()
    wait_for(lambda: steps() > before + 1 or second.poll() is not None, 90)
    second.send_signal(signal.SIGKILL)
    second.communicate(timeout=60)
    assert second.returncode == -9

    last = subprocess.run(command(run_dir), stderr=subprocess.PIPE, text=True, timeout=120)
    assert last.returncode == 0, last.stderr
    assert sorted(losses(run_dir / "pretrain")) == [*range(0, 200, 10), 199]
    notes = notes_of(run_dir / "pretrain")
    assert notes[1] == f"a worker group starts at step {stopped_at}"
    assert json.loads((run_dir / "pretrain" / "config.json").read_text())["identity"]["pretrain.depth"] == 2


def test_another_identity_is_refused_with_the_difference(tiny_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(tiny_run, run_dir)
    (run_dir / "pretrain").mkdir()
    from nanochat.provenance import begin_stage

    begin_stage(str(run_dir / "pretrain"), {"pretrain": PretrainConfig(depth=3)})
    done = subprocess.run(command(run_dir), stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert "pretrain.depth=2 (was 3)" in done.stderr
    assert "--run-dir" in done.stderr
