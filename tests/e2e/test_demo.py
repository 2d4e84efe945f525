"""The README's commands as a user runs them, on a few hundred documents: files, scores, a quiet terminal."""

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.storage import read_jsonl

ROOT = Path(__file__).parents[2]
MAX_TERMINAL_LINES = 42

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """300 documents of random words: enough distinct pairs for the demo's 4,096 tokens, some hundred rows of 512."""
    draw = random.Random(0)
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprst", "aeiou")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 5))) for _ in range(6000)]
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    with open(path, "w") as file:
        for _ in range(300):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(50, 500)))}) + "\n")
    return path


def command(entry_point: str, *flags: object, timeout_s: float, compiled: bool = False) -> str:
    """Run a command from the source tree and return what the terminal saw."""
    arguments = [sys.executable, f"ray_jobs/{entry_point}.py", *map(str, flags)]
    environment = os.environ | {"CI": "1"} | ({} if compiled else {"TORCH_COMPILE_DISABLE": "1"})
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, cwd=ROOT,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def assert_quiet(said: str, folders: list[Path]) -> None:
    """Few lines, and none of Ray's or of Python's warnings; what the model says is its own."""
    said = said.split("answer     ")[0]
    assert len(said.splitlines()) <= MAX_TERMINAL_LINES, said
    for folder in folders:
        said = said.replace(str(folder), "")
    assert not re.search(r"\bray|pid=|warning|\bINFO\b|traceback", said, re.IGNORECASE), said


def losses_and_scores(run_dir: Path) -> tuple[list[dict], list[float]]:
    records = read_jsonl(str(run_dir / "pretrain" / "metrics.jsonl"))
    return [record for record in records if "loss" in record], [r["val_bpb"] for r in records if "val_bpb" in r]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_demo_trains_shows_and_resumes(text, tmp_path, compiled):
    """The first command of the README; the same again finds everything done and trains no step twice."""
    run_dir = tmp_path / "demo"
    flags = ("--corpus", text, "--depth", 1, "--num-steps", 4, "--sft-steps", 2, "--problems", 8, "--run-dir", run_dir)
    said = command("demo", *flags, timeout_s=200, compiled=compiled)
    assert_quiet(said, [text.parent, run_dir])
    losses, scores = losses_and_scores(run_dir)
    assert [record["step"] for record in losses] == [0, 3]
    assert losses[0]["loss"] == pytest.approx(math.log(4096), abs=0.1)
    assert losses[1]["loss"] < losses[0]["loss"]
    assert len(scores) == 2
    assert scores[1] < scores[0]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["val_bpb"] == scores[-1]
    assert 0 < summary["val_bpb"] < math.inf
    assert summary["arithmetic_base"] == {"accuracy": 0.0, "n": 8}
    assert summary["arithmetic_sft"]["n"] == summary["identity_sft"]["n"] == 8
    assert 0 <= summary["arithmetic_sft"]["accuracy"] <= 1
    assert f"validation {scores[-1]:.4f} bits per byte" in said
    (samples,) = read_jsonl(str(run_dir / "pretrain" / "samples.jsonl"))
    assert samples["step"] == 4
    assert all(isinstance(completion, str) and completion for completion in samples["samples"].values())
    report, walk = (run_dir / "report.html").read_text(), (run_dir / "walk.html").read_text()
    assert f"{scores[-1]:.3f}" in report
    assert "Not here yet" not in walk
    assert "A conversation and its mask" in walk
    assert "sft is wrong" in report
    assert "arithmetic:test_templates" in said
    assert re.search(r"page       http://127.0.0.1:\d+/\n", said)
    assert re.search(r"curl -N http://127.0.0.1:\d+/v1/chat/completions", said)
    assert "answer     " in said, "where CI is set it is asked once"
    assert_the_model_can_be_talked_to(run_dir)
    weights = next((run_dir / "pretrain" / "checkpoints" / "step_000004").glob("model*.safetensors"))
    written = weights.stat().st_mtime_ns

    said = command("demo", *flags, timeout_s=140, compiled=compiled)
    assert_quiet(said, [text.parent, run_dir])
    again, scores_again = losses_and_scores(run_dir)
    assert again == losses, "a step was trained again"
    assert scores_again == scores
    assert weights.stat().st_mtime_ns == written
    assert json.loads((run_dir / "summary.json").read_text()) == summary


def assert_the_model_can_be_talked_to(run_dir: Path) -> None:
    """Chat reads lines from a pipe, commands too, and the viewer prints the mixture with its mask."""
    done = subprocess.run(
        [sys.executable, "ray_jobs/chat.py", "--run-dir", str(run_dir), "--max-new-tokens", "8"], cwd=ROOT, timeout=60,
        input="Who are you?\n/temperature x\n/show\n/quit\nnever read\n", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("> Who are you?\n")
    assert "/temperature x: must be a number" in done.stdout
    assert "<|assistant_end|>" in done.stdout
    assert "never read" not in done.stdout
    shown = command(
        "sft", "--run-dir", run_dir, "--mixture", "arithmetic", "identity", "--show", 2, timeout_s=60
    )  # fmt: skip
    assert shown.count("<|bos|>") == 2
    assert "\x1b[32;7m<|assistant_end|>" in shown
    lost = subprocess.run(
        [sys.executable, "ray_jobs/chat.py", "--run-dir", str(run_dir), "--model", "nothing"], cwd=ROOT, timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip
    assert lost.returncode == 2
    assert "checkpoint=nothing: state.json is missing. Name pretrain, sft, or a complete step_ folder." in lost.stderr


@pytest.mark.slow
def test_the_streaming_benchmark_writes_its_numbers(text, tmp_path):
    said = command(
        "benchmark", "stream", "--corpus", text, "--run-dir", tmp_path / "run", "--json", tmp_path / "stream.json",
        timeout_s=90,
    )  # fmt: skip
    assert_quiet(said, [text.parent, tmp_path])
    written = json.loads((tmp_path / "stream.json").read_text())
    assert written.keys() == {"hardware", "results"}
    assert written["hardware"]["cores"] >= 1
    assert written["hardware"]["device"]
    assert 1e4 < written["results"]["stream_tokens_per_s"] < 1e12
    assert written["results"]["stream_steps"] >= 4
    assert f"{written['results']['stream_tokens_per_s']:,.0f}" in said
