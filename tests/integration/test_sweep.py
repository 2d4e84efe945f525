"""A sweep on a real Ray, by its command: one process killed, one run failing, table and picture; then nothing to do."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat.storage import read_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
RUNS = [
    {"n_embd": 16, "flops": 2e9},
    {"n_embd": 32, "flops": 2e9},
    {"n_embd": 64, "flops": 2e9},
    {"n_embd": 32, "tokens": 153_600, "keep_checkpoints": 2},
    {"n_embd": 32, "tokens": 153_600, "keep_checkpoints": 3},
    {"n_embd": 32, "matrix_lr": 1e30, "num_steps": 20},
]
KILLED, CALM, FAILING = "n_embd=32,tokens=153600,keep_checkpoints=2", "n_embd=32,tokens=153600,keep_checkpoints=3", 5
FLAGS = (
    "--depth 2 --head-dim 16 --window-pattern L --global-batch-tokens 512 --warmup-steps 5 --dtype float32 "
    "--compile off --evaluate-every 0 --sample-every 0 --checkpoint-every 20 --log-every 1"
).split()


def command(tiny_run, folder):
    runs = folder / "runs.jsonl"
    runs.write_text("".join(json.dumps(run) + "\n" for run in RUNS))
    places = ["--run-dir", str(folder / "sweep"), "--data-run-dir", str(tiny_run), "--runs", str(runs)]
    return [sys.executable, str(ROOT / "ray_jobs" / "sweep.py"), *places, *FLAGS]


def starts(folder):
    """(process, step) of each start of a run."""
    notes = [record["note"] for record in read_jsonl(str(folder / "pretrain" / "notes.jsonl"))]
    found = [re.fullmatch(r"process (\d+) on .* starts at step (\d+)", note) for note in notes]
    return [(int(one[1]), int(one[2])) for one in found if one]


def kill_after_a_checkpoint(run, job):
    """SIGKILL the process that trains a run once its first checkpoint is there; returns its id."""
    while not (run / "pretrain" / "checkpoints" / "step_000020" / "checksums_00_of_01.json").exists():
        assert job.poll() is None, "the sweep runs"
        assert not (run / "outcome.json").exists(), "the run is not over"
        time.sleep(0.05)
    ((process, step),) = starts(run)
    assert step == 0
    os.kill(process, signal.SIGKILL)
    return process


def losses(run):
    return {r["step"]: r["loss"] for r in read_jsonl(str(run / "pretrain" / "metrics.jsonl")) if "loss" in r}


def test_six_runs_one_killed_one_failing(tiny_run, tmp_path):
    call, sweep = command(tiny_run, tmp_path), tmp_path / "sweep"
    with open(tmp_path / "said", "w") as said, subprocess.Popen(call, stderr=said, cwd=ROOT) as job:
        try:
            killed = kill_after_a_checkpoint(sweep / KILLED, job)
            assert job.wait(timeout=500) == 0
        finally:
            job.terminate()
    print((tmp_path / "said").read_text())

    with open(sweep / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["done"] * 5 + ["failed"]
    assert rows[FAILING]["reason"].startswith("TrainingDivergedError: ")
    assert all(0 < float(row["val_bpb"]) < 8 for row in rows[:FAILING])
    assert all(abs(float(row["trained_flops"]) / 2e9 - 1) < 0.2 for row in rows[:3])
    first, second = starts(sweep / KILLED)
    assert (first[0], first[1]) == (killed, 0)
    assert second[1] >= 20
    assert len(losses(sweep / CALM)) == 300
    assert losses(sweep / KILLED) == losses(sweep / CALM), "bit for bit"
    assert rows[3]["val_bpb"] == rows[4]["val_bpb"]

    said = (tmp_path / "said").read_text()
    assert re.search(rf"^again      {KILLED}: .* worker process has died", said, re.MULTILINE)
    assert len(re.findall(r"^n_embd=.*  (?:done|failed: TrainingDivergedError.*)$", said, re.MULTILINE)) == 6
    page = (sweep / "report.html").read_text()
    assert "flops=2e+09" in re.search("<svg.*</svg>", page, re.DOTALL)[0]
    assert page.count("<circle") == 5
    assert not (sweep / "ray_tune").exists()

    before = {path: path.stat().st_mtime_ns for path in sweep.rglob("pretrain/*")}
    again = subprocess.run(call, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60, check=True)
    assert "6 runs, 0 of them to do" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in sweep.rglob("pretrain/*")} == before
