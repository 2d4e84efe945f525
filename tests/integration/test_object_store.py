"""Run directories in an object store: every stage, exact resume, storage that is slow and fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from object_store import BUCKET, FlakyS3, flaky_s3
from test_pretraining import losses, notes_of, rows_of_steps

from nanochat import storage
from nanochat.cluster.environment import set_ray_environment
from nanochat.storage import RunFolder
from nanochat.training.checkpoint import Checkpoint, newest_of

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def store():
    with flaky_s3() as front:
        yield front


@pytest.fixture(autouse=True)
def reliable(store: FlakyS3):
    store.failing = store.wait_s = 0.0
    fsspec.config.conf.pop("s3", None)


@pytest.fixture(scope="module")
def ray_session(store, tmp_path_factory):
    """A Ray whose processes find the store."""
    set_ray_environment()
    from nanochat.cluster.session import session, start_ray
    from nanochat.config.cluster import ClusterConfig

    with session(ClusterConfig(), str(tmp_path_factory.mktemp("ray"))):
        start_ray()
        yield


def speedrun(run_dir: str, *flags: object) -> str:
    arguments = [sys.executable, "ray_jobs/speedrun.py", "demo", "--run-dir", run_dir, *map(str, flags)]
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400, cwd=ROOT,
        env=os.environ | {"CI": "1", "TORCH_COMPILE_DISABLE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.long
def test_the_whole_line_lives_in_a_bucket(store, tiny_run):
    """From text in the bucket to an answer of the endpoint; the same command again trains nothing."""
    for path in tiny_run.parent.glob("text_*.jsonl"):
        with storage.atomic_write(f"s3://{BUCKET}/text/{path.name}") as file:
            file.write(path.read_bytes())
    run_dir = f"s3://{BUCKET}/line"
    flags = (
        "--corpus.corpus", f"s3://{BUCKET}/text/*.jsonl", "--tokenizer.vocab-size", 300, "--pretrain.depth", 1,
        "--pretrain.num-steps", 4, "--sft.num-steps", 2, "--rl.num-steps", 1, "--rl.held-out-problems", 8,
        "--score-base.max-per-task", 8, "--score-chat.max-per-task", 8,
    )  # fmt: skip
    said = speedrun(run_dir, *flags)
    assert "answer     " in said
    folder = RunFolder(run_dir)
    for path in (folder.report, folder.walk, folder.summary, folder.usage, folder.rl.groups):
        assert storage.size_bytes(path) > 0
    assert json.loads(fsspec.open(folder.summary).open().read())["arithmetic_sft"]["n"] == 8
    before = {stage: newest_of(getattr(folder, stage), print).weights_sha256 for stage in ("pretrain", "sft", "rl")}
    account = storage.read_jsonl(folder.usage)
    assert "answer     " in speedrun(run_dir, *flags)
    assert before == {
        stage: newest_of(getattr(folder, stage), print).weights_sha256 for stage in ("pretrain", "sft", "rl")
    }
    assert storage.read_jsonl(folder.usage) == account, "no stage started a Ray"


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_refused_not_created(store):
    arguments = [sys.executable, "ray_jobs/speedrun.py", "demo", "--run-dir", "s3://nowhere/run"]
    done = subprocess.run(arguments, stderr=subprocess.PIPE, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert "run_dir=s3://nowhere/run: cannot be written" in done.stderr
    assert not fsspec.filesystem("s3").exists("nowhere")


@pytest.mark.long
def test_a_slow_and_failing_store_and_kills_change_nothing(store, ray_session, tiny_run, tmp_path):
    """One request in twenty is refused, each waits 20 ms, a worker dies in a step and one during a checkpoint."""
    from dataclasses import replace

    from faulty_worker import Kill, worker_with
    from test_pretraining import TINY

    from nanochat.cluster.trainer import pretrain_worker, train_on_ray
    from nanochat.config.cluster import ClusterConfig
    from nanochat.data.token_shards import TokenShards
    from nanochat.storage import StageFolder
    from nanochat.training.plan import resolve

    shards = TokenShards.load(str(tiny_run / "shards"))
    plan = resolve(TINY, shards.recipe.vocab_size, shards.sequence_len)
    config = replace(TINY, log_row_ids=True)

    def train(folder: str, worker=pretrain_worker) -> Checkpoint | None:
        cluster = ClusterConfig(num_workers=2, cpus_per_worker=0.5, max_failures=5)
        return train_on_ray(
            config, plan, cluster, shards, str(tiny_run / "tokenizer"), StageFolder(folder), lambda: None, worker
        )

    calm = train(str(tmp_path / "calm"))
    store.failing, store.wait_s = 0.05, 0.02
    folder = f"s3://{BUCKET}/flaky"
    marks = tmp_path / "marks"
    marks.mkdir()
    # in the 14th step: the save at step 12 has waited until the one at step 6 was written, however slow the store
    kills = [Kill("step", rank=1, count=14), Kill("write", rank=0, count=1)]
    flaky = train(folder, worker_with(kills, marks))
    store.failing = store.wait_s = 0.0
    assert len(list(marks.iterdir())) == 2, "every kill happened"
    assert store.refused > 10
    assert losses(folder) == losses(tmp_path / "calm")
    for rank in (0, 1):
        assert rows_of_steps(folder, rank) == rows_of_steps(tmp_path / "calm", rank)
    assert flaky is not None
    assert calm is not None
    assert flaky.weights_sha256 == calm.weights_sha256
    assert any("starts at step 6" in note or "starts at step 12" in note for note in notes_of(folder))
