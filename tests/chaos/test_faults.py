"""Faults that end a whole pretraining command, or its disk: the same command goes on, and the result is the same."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from test_elastic import PRETRAIN, last_step, losses, notes, prepared  # noqa: F401

from nanochat import storage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
STEPS = 120


@pytest.fixture(scope="module")
def small(text, tmp_path_factory) -> Path:
    """A run directory with a tokenizer and shards, prepared on this machine alone."""
    run = tmp_path_factory.mktemp("small") / "run"
    flags = ("--corpus", text, "--vocab-size", "300", "--sequence-len", "512")
    subprocess.run(
        [sys.executable, "ray_jobs/prepare_data.py", "--run-dir", str(run), *flags], cwd=ROOT, check=True, timeout=180
    )  # fmt: skip
    return run


def command(run: Path, *flags: str) -> list[str]:
    """Pretraining of one worker, a step of which takes some tenths of a second."""
    return [
        sys.executable, "ray_jobs/pretrain.py", "--run-dir", str(run), "--depth", "2", "--head-dim", "16", "--n-embd",
        "32", "--window-pattern", "L", "--num-steps", str(STEPS), "--global-batch-tokens", "4096", "--dtype",
        "float32", "--compile", "off", "--evaluate-every", "0", "--sample-every", "0", "--log-every", "1",
        "--cpus-per-worker", "0.5", "--checkpoint-every", "20", *flags,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def calm(small, tmp_path_factory) -> dict[int, float]:
    """The losses of an undisturbed run."""
    run = tmp_path_factory.mktemp("calm") / "run"
    shutil.copytree(small, run)
    subprocess.run(command(run), cwd=ROOT, check=True, timeout=300, stderr=subprocess.DEVNULL)
    return losses(run / "pretrain")


_jobs: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def none_stays():
    """What a test that failed has left running would disturb the next one."""
    yield
    while _jobs:
        job = _jobs.pop()
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def started(run: Path, until_step: int, **options) -> subprocess.Popen:
    """Start pretraining in a process group of its own, and return when it has done so many steps."""
    job = subprocess.Popen(
        command(run), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )  # fmt: skip
    _jobs.append(job)
    deadline = time.monotonic() + 120
    while last_step(run / "pretrain") < until_step:
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    return job


def process_of(job: subprocess.Popen, title: str) -> psutil.Process:
    """The process of this name among a job's descendants."""
    return next(
        child for child in psutil.Process(job.pid).children(recursive=True) if title in " ".join(child.cmdline())
    )  # fmt: skip


def ended(job: subprocess.Popen, timeout_s: float) -> tuple[str, float]:
    """Wait for a job's end; returns what it said and how long it took."""
    began_s = time.monotonic()
    _, said = job.communicate(timeout=timeout_s)
    took_s = time.monotonic() - began_s
    print(f"exit code {job.returncode} after {took_s:.0f} s: {said.strip().splitlines()[-1][:160]}")
    assert "Traceback" not in said, said
    return said, took_s


@pytest.mark.slow
def test_the_controller_is_killed_then_the_whole_process_group_gets_a_signal(small, calm, tmp_path):
    """Each ends the command soon; the same command goes on each time, and ends the same.

    `timeout` and some schedulers send SIGTERM so: Ray's processes get it, too.
    """
    run = tmp_path / "run"
    shutil.copytree(small, run)
    job = started(run, until_step=30)
    process_of(job, "ray::TrainController").kill()
    said, took_s = ended(job, 240)
    assert job.returncode == 2, said
    assert took_s < 60, said
    job = started(run, until_step=60)
    os.killpg(job.pid, signal.SIGTERM)
    said, took_s = ended(job, 120)
    assert job.returncode in (1, 2, 130), said
    assert took_s < 30, said
    subprocess.run(command(run), cwd=ROOT, check=True, timeout=240, stderr=subprocess.DEVNULL)
    assert losses(run / "pretrain") == calm
    begun = [note for note in notes(run / "pretrain") if "starts at step" in note]
    assert len(begun) == 3
    assert not any(note.endswith("step 0") for note in begun[1:]), begun


PROCESSES = {
    "worker": "ray::RayTrainWorker",
    "control store": "gcs_server",
    "raylet": "raylet/raylet",
    "data coordinator": "ray::SplitCoordinator",
}


@pytest.mark.soak
@pytest.mark.parametrize("title", PROCESSES.values(), ids=PROCESSES)
def test_whatever_process_is_killed_the_same_command_ends_the_same(small, calm, tmp_path, title):
    """The job goes on by itself, or ends within a minute with an error; the same command goes on then."""
    run = tmp_path / "run"
    shutil.copytree(small, run)
    job = started(run, until_step=30)
    process_of(job, title).kill()
    said, took_s = ended(job, 240)
    if job.returncode:
        assert took_s < 60, said
        subprocess.run(command(run), cwd=ROOT, check=True, timeout=240, stderr=subprocess.DEVNULL)
    assert losses(run / "pretrain") == calm
    assert any("starts at step" in note and not note.endswith("step 0") for note in notes(run / "pretrain"))


@pytest.mark.slow
def test_a_disk_that_fills_up_while_checkpoints_are_written(small, calm, tmp_path):
    """A clear error, the last whole checkpoint stays, and after room was made the same command ends the same."""
    mount = tmp_path / "disk"
    mount.mkdir()
    size = sum(path.stat().st_size for path in small.rglob("*") if path.is_file())
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size + 1_200_000}", "tmpfs", str(mount)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"a small filesystem cannot be mounted here: {made.stderr.strip()}")
    try:
        run = mount / "run"
        shutil.copytree(small, run)
        full = subprocess.run(command(run), cwd=ROOT, timeout=240, stderr=subprocess.PIPE, text=True)
        assert full.returncode == 2, full.stderr
        assert "CheckpointError: checkpoints=" in full.stderr
        assert "No space left on device" in full.stderr
        assert "Make room and run the same command again." in full.stderr
        subprocess.run(["mount", "-o", f"remount,size={size + 200_000_000}", str(mount)], check=True)
        subprocess.run(command(run), cwd=ROOT, check=True, timeout=240, stderr=subprocess.DEVNULL)
        assert losses(run / "pretrain") == calm
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.soak
def test_the_head_is_lost_and_the_job_submitted_again(text, tmp_path):
    """The cluster goes in the middle of a run, all of it; on another one the same command ends the same."""
    from simulated_cluster import simulated_cluster

    run, quiet = tmp_path / "run", tmp_path / "quiet"
    flags = ("--corpus", text, "--vocab-size", "300", "--sequence-len", "512", "--address", "auto", "--by-label")
    train = (*PRETRAIN, "--num-workers", "1", "--checkpoint-every", "20", "--run-dir")
    folder = Path(tempfile.mkdtemp(prefix="sc", dir="/tmp"))
    with simulated_cluster(folder / "a") as cluster:
        cluster.add("data")
        cluster.add("train")
        assert cluster.submit("ray_jobs/prepare_data.py", "--run-dir", str(run), *flags).returncode == 0
        shutil.copytree(run, quiet)
        job = cluster.start(*train, str(run))
        job.wait_for(lambda: last_step(run / "pretrain") > 30, 240)
    job.process.kill()
    with simulated_cluster(folder / "b") as cluster:
        cluster.add("data")
        cluster.add("train")
        assert cluster.submit(*train, str(run), timeout_s=400).returncode == 0
        assert cluster.submit(*train, str(quiet), timeout_s=400).returncode == 0
    shutil.rmtree(folder, ignore_errors=True)
    assert losses(run / "pretrain") == losses(quiet / "pretrain")
    assert sum("starts at step" in note for note in notes(run / "pretrain")) == 2


@pytest.mark.soak
def test_two_jobs_in_one_run_directory(cluster, prepared, tmp_path):  # noqa: F811
    """The second one is refused by name, in a folder and in a bucket; the first one goes on."""
    run = tmp_path / "run"
    shutil.copytree(prepared, run)
    flags = ("--num-workers", "2", "--checkpoint-every", "0", "--run-dir", str(run))
    first = cluster.start(*PRETRAIN, *flags)
    first.wait_for(lambda: last_step(run / "pretrain") > 2, 240)
    second = cluster.submit(*PRETRAIN, *flags)
    assert second.returncode != 0
    assert f"run_dir={run}: another" in second.stdout
    assert "Wait for its end" in second.stdout
    assert storage.exists(str(run / "pretrain" / "config.json"))
    first.wait_for(lambda: last_step(run / "pretrain") > 4, 60)
    first.stop()
    first.process.wait(120)
