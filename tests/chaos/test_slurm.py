"""deploy/slurm.sbatch on two simulated nodes: a run whose time is up is queued again and goes on."""

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from simulated_slurm import OWN, simulated_slurm

from nanochat import storage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]

PROJECT = Path(__file__).parents[2]
SBATCH = str(PROJECT / "deploy" / "slurm.sbatch")
ENVIRONMENT = {
    "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "25",  # how long a node stays that has lost its head; `ray stop` takes 16
}  # fmt: skip
START_S = 360.0
"""Enough for two Rays of some ten processes each on two busy cores."""
WORDS = ["red", "green", "blue", "apple", "pear", "runs", "sleeps", "over", "under", "the", "a", "quick"]
PREPARE = (
    f"python {PROJECT}/ray_jobs/prepare_data.py --corpus text.jsonl --vocab-size 300 --sequence-len 64 --run-dir run"
)
TRAIN = f"""exec python {PROJECT}/ray_jobs/pretrain.py --run-dir run --depth 2 --head-dim 16 --n-embd 32
    --window-pattern L --num-steps 600 --global-batch-tokens 512 --dtype float32 --compile off --evaluate-every 0
    --sample-every 0 --checkpoint-every 200 --log-every 1 --num-workers 2 --cpus-per-worker 3"""
"""A node has four CPUs: the two workers cannot be on one."""
COMMAND = ("bash", "-c", f"{PREPARE} && {' '.join(TRAIN.split())}")


@pytest.fixture
def slurm():
    if subprocess.run([OWN[0], "--map-root-user", *OWN[1:], "true"], capture_output=True).returncode:
        pytest.skip("this user may not make namespaces")
    folder = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))  # short: Ray's sockets lie in it
    try:
        with simulated_slurm(folder) as slurm:
            yield slurm
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def steps(folder: Path) -> list[int]:
    if not (folder / "metrics.jsonl").exists():
        return []
    return sorted({record["step"] for record in storage.read_jsonl(str(folder / "metrics.jsonl")) if "loss" in record})


@pytest.mark.soak
def test_a_run_is_queued_again_and_goes_on(slurm, tmp_path):
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(20, 200)))}) for _ in range(400)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    run, log = tmp_path / "run", tmp_path / "log"

    job = slurm.sbatch(SBATCH, *COMMAND, cwd=tmp_path, **ENVIRONMENT)
    deadline = time.monotonic() + START_S
    while len(steps(run / "pretrain")) < 20:
        assert job.result(0.2) is None, log.read_text()[-6000:]
        assert time.monotonic() < deadline, log.read_text()[-6000:]
    job.signal(signal.SIGTERM)
    assert job.result(START_S) == 130, log.read_text()[-6000:]
    assert slurm.requeued.read_text() == "requeue 1"
    done = steps(run / "pretrain")
    assert len(done) < 600, "it has ended before it was stopped"

    slurm.requeued.unlink()
    job = slurm.sbatch(SBATCH, *COMMAND, cwd=tmp_path, restarts=1, **ENVIRONMENT)
    assert job.result(2 * START_S) == 0, log.read_text()[-6000:]
    assert not slurm.requeued.exists()
    assert steps(run / "pretrain") == list(range(600))
    notes = [record["note"] for record in storage.read_jsonl(str(run / "pretrain" / "notes.jsonl"))]
    assert any(f"starts at step {len(done)}" in note for note in notes), notes

    token = slurm.folder / "home" / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() not in log.read_text()


@pytest.mark.soak
def test_a_failed_start_is_no_success(slurm, tmp_path):
    log = tmp_path / "log"
    broken = slurm.folder / "bin" / "ray"  # `ray start` fails, as on a port that is taken
    real = Path(sys.executable).with_name("ray")
    broken.write_text(f'#!/bin/sh\n[ "$1" = start ] && exit 1\nexec {real} "$@"\n')
    broken.chmod(0o755)
    job = slurm.sbatch(SBATCH, "true", cwd=tmp_path, **ENVIRONMENT)
    assert job.result(START_S) == 1, log.read_text()[-4000:]
    assert "not come to its end" in log.read_text()
