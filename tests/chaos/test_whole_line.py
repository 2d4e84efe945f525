"""The whole line by `ray job submit` on the labelled nodes of a simulated cluster; a node is killed in each stage."""

import json
import shutil
import urllib.request
from pathlib import Path

import pytest
from simulated_cluster import SimulatedCluster

from nanochat import storage
from nanochat.cluster.ingress import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

BY_LABEL = ("--address", "auto", "--by-label")
TRAIN = ("--num-workers", "2", "--dtype", "float32", "--compile", "off", "--evaluate-every", "0", "--sample-every", "0",
         "--global-batch-tokens", "4096", "--log-every", "1")  # fmt: skip
SMALL = ("--depth", "2", "--head-dim", "16", "--n-embd", "32", "--window-pattern", "L", "--num-steps", "120",
         "--checkpoint-every", "10")  # fmt: skip


def losses(folder: Path) -> dict[int, float]:
    """The last record of each step."""
    records = storage.read_jsonl(str(folder / "metrics.jsonl"))
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def steps(folder: Path) -> int:
    return len(losses(folder)) if (folder / "metrics.jsonl").exists() else 0


def killed_once(cluster: SimulatedCluster, work: str, condition, *command: str) -> str:
    """Run a job, kill a node once `condition` holds, bring another one; returns what the job said."""
    job = cluster.start(*command)
    job.wait_for(condition, 240)
    cluster.kill(work)
    cluster.add(work)
    done = job.result(300)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_it_ends_with_a_served_model(cluster, text, tmp_path):
    for work in ("data", "train", "train", "rollouts"):
        cluster.add(work)
    run = tmp_path / "run"
    place = ("--run-dir", str(run))

    flags = ("--corpus", text, "--vocab-size", "300", "--sequence-len", "512")
    tokenizer = run / "tokenizer" / "tokenizer.json"
    killed_once(cluster, "data", tokenizer.exists, "ray_jobs/prepare_data.py", *place, *flags, *BY_LABEL)

    quiet = tmp_path / "quiet"
    shutil.copytree(run, quiet)
    train = ("ray_jobs/pretrain.py", *SMALL, *TRAIN, *BY_LABEL, "--run-dir")
    assert cluster.submit(*train, str(quiet)).returncode == 0
    killed_once(cluster, "train", lambda: steps(run / "pretrain") > 15, *train, str(run))
    assert sorted(losses(run / "pretrain")) == list(range(120))
    assert losses(run / "pretrain") == losses(quiet / "pretrain")
    notes = [record["note"] for record in storage.read_jsonl(str(run / "pretrain" / "notes.jsonl"))]
    assert sum("starts at step" in note for note in notes) == 2, notes

    flags = ("--mixture", "arithmetic*0.05", "--num-steps", "60", "--checkpoint-every", "10", "--chat-problems", "4")
    killed_once(cluster, "train", lambda: steps(run / "sft") > 15, "ray_jobs/sft.py", *place, *flags, *TRAIN, *BY_LABEL)
    assert sorted(losses(run / "sft")) == list(range(60))

    flags = ("--task", "arithmetic", "--num-steps", "8", "--groups-per-step", "2", "--samples-per-group", "4",
             "--max-new-tokens", "16", "--held-out-problems", "8", "--actors", "1", "--cpus-per-actor", "0.5",
             "--dtype", "float32", "--checkpoint-every", "1", "--no-dynamic-sampling")  # fmt: skip
    killed_once(cluster, "rollouts", lambda: steps(run / "rl") > 1, "ray_jobs/rl.py", *place, *flags, *BY_LABEL)
    assert sorted(losses(run / "rl")) == list(range(8))

    flags = ("--models", "sft", "rl", "--tasks", "arithmetic", "spelling", "--max-per-task", "40", "--actors", "2")
    scores = run / "evaluation" / "sft.json"
    said = killed_once(cluster, "train", scores.exists, "ray_jobs/evaluate.py", *place, *flags, *BY_LABEL)
    assert "(n=40)" in said

    check_serving(cluster, place)


def check_serving(cluster: SimulatedCluster, place: tuple[str, ...]) -> None:
    """A replica's node is killed; another one answers."""
    cluster.add("serve")
    (port,) = free_ports(1)

    def answers() -> bool:
        body = {"model": "rl", "messages": [{"role": "user", "content": "1 + 1"}], "max_tokens": 4}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.loads(answer.read())["usage"]["completion_tokens"] > 0
        except OSError:
            return False

    flags = ("--models", "rl", "--port", str(port), "--address", "auto", "--replica-by-label", "--compile", "off")
    job = cluster.start("ray_jobs/serve.py", *place, *flags)
    job.wait_for(answers, 120)
    cluster.kill("serve")
    cluster.add("serve")
    job.wait_for(answers, 120)
    job.stop()
    job.process.wait(60)
