"""How much of fifteen minutes is useful when a worker is killed every minute."""

import random
import shutil
import signal
import statistics
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from test_faults import ROOT, command, small  # noqa: F401

from nanochat import storage

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(2400)]

MINUTES = 15
STEP_TOKENS = 32768


def test_goodput_under_a_kill_a_minute(small, tmp_path: Path):  # noqa: F811
    """Useful steps of all that were executed, and useful time of all time; the kills are at moments drawn by a seed."""
    run = tmp_path / "run"
    shutil.copytree(small, run)
    flags = ("--num-steps", "3000", "--global-batch-tokens", str(STEP_TOKENS), "--num-workers", "2", "--log-row-ids",
             "--max-failures", "1000", "--node-failure-s", "60")  # fmt: skip
    arguments = command(run, *flags)
    cadence = arguments.index("--checkpoint-every")
    del arguments[cadence : cadence + 2]  # what the run chooses itself
    began_s = time.monotonic()
    with open(tmp_path / "said", "w") as said:
        job = subprocess.Popen(arguments, cwd=ROOT, stderr=said)
    draw, kills = random.Random(0), 0
    for minute in range(1, MINUTES):
        time.sleep(max(0.0, began_s + 60 * minute + draw.uniform(-15, 15) - time.monotonic()))
        assert job.poll() is None, (tmp_path / "said").read_text()
        workers = [
            child for child in psutil.Process(job.pid).children(recursive=True)
            if "ray::RayTrainWorker" in " ".join(child.cmdline())
        ]  # fmt: skip
        if workers:
            draw.choice(workers).send_signal(signal.SIGKILL)
            kills += 1
    time.sleep(max(0.0, began_s + 60 * MINUTES - time.monotonic()))
    job.send_signal(signal.SIGINT)
    returncode = job.wait(120)
    all_s = time.monotonic() - began_s
    assert returncode == 130, (tmp_path / "said").read_text()
    folder = run / "pretrain"
    executed = [record["step"] for record in storage.read_jsonl(str(folder / "rows_00.jsonl"))]
    useful = max(executed) + 1
    assert set(executed) == set(range(useful)), "no step is missing"
    records = [record for record in storage.read_jsonl(str(folder / "metrics.jsonl")) if "loss" in record]
    step_s = STEP_TOKENS / statistics.median(record["tokens_per_s"] for record in records)
    notes = [record["note"] for record in storage.read_jsonl(str(folder / "notes.jsonl"))]
    print(
        f"{kills} kills in {all_s:.0f} s: {useful} useful of {len(executed)} executed steps "
        f"({useful / len(executed):.1%}), {useful * step_s:.0f} s of steps ({useful * step_s / all_s:.1%} of the time)"
    )
    print("\n".join(note for note in notes if "checkpoint" in note)[-2000:])
    assert kills >= MINUTES - 3
    assert sum("starts at step" in note for note in notes) >= kills
    assert useful / len(executed) > 0.5
