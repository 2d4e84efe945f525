"""The README's commands as a user runs them, on a few hundred documents: files, scores, a quiet terminal."""

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from nanochat.storage import read_jsonl

ROOT = Path(__file__).parents[2]
MAX_TERMINAL_LINES = 52
MARK = "Secret0f7c1e"
SECRETS = ("NANOCHAT_API_KEYS", "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")

pytestmark = [pytest.mark.ray, pytest.mark.timeout(800)]


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
    environment |= {name: f"{MARK}_{name}" for name in SECRETS}
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


def assert_no_secret(said: str, run_dir: Path) -> None:
    """Nothing of the environment's secrets is on the terminal, in the run directory or in the logs of its Rays."""
    rays = re.findall(r"the logs of Ray's processes are in (\S+)/logs", (run_dir / "ray.log").read_text())
    files = [path for folder in (run_dir, *map(Path, rays)) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert [path for path in files if MARK.encode() in path.read_bytes()] == []
    assert MARK not in said


def losses_and_scores(run_dir: Path) -> tuple[list[dict], list[float]]:
    records = read_jsonl(str(run_dir / "pretrain" / "metrics.jsonl"))
    return [record for record in records if "loss" in record], [r["val_bpb"] for r in records if "val_bpb" in r]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_demo_trains_shows_and_resumes(text, tmp_path, compiled):
    """The first command of the README; the same again finds everything done and trains no step twice."""
    run_dir = tmp_path / "demo"
    flags = (
        "demo", "--run-dir", run_dir, "--corpus.corpus", text, "--pretrain.depth", 1, "--pretrain.num-steps", 4,
        "--sft.num-steps", 2, "--rl.num-steps", 1, "--rl.held-out-problems", 8, "--score-base.max-per-task", 8,
        "--score-chat.max-per-task", 8, "--price", "node=0.36",
    )  # fmt: skip
    said = command("speedrun", *flags, timeout_s=400, compiled=compiled)
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
    assert summary["rl_pass1_before"]["n"] == summary["rl_pass1_after"]["n"] == summary["arithmetic_rl"]["n"] == 8
    (practised,) = [one for one in read_jsonl(str(run_dir / "rl" / "metrics.jsonl")) if "reward" in one]
    assert practised["samples"] >= 128
    assert f"validation {scores[-1]:.4f} bits per byte" in said
    (samples,) = read_jsonl(str(run_dir / "pretrain" / "samples.jsonl"))
    assert samples["step"] == 4
    assert all(isinstance(completion, str) and completion for completion in samples["samples"].values())
    report, walk = (run_dir / "report.html").read_text(), (run_dir / "walk.html").read_text()
    assert f"{scores[-1]:.3f}" in report
    assert walk.count("Not here yet") == 1, "of rollouts alone: after four steps no reply gets a reward"
    assert "A conversation and its mask" in walk
    assert "sft is wrong" in report
    assert "rl is wrong" in report
    assert "Replies and their rewards" in walk
    assert "arithmetic:test_templates" in said
    assert re.search(r"page       http://127.0.0.1:\d+/\n", said)
    assert re.search(r"curl -N http://127.0.0.1:\d+/v1/chat/completions", said)
    assert "answer     " in said, "where CI is set it is asked once"
    assert_no_secret(said, run_dir)
    assert_the_model_can_be_talked_to(run_dir)
    weights = next((run_dir / "pretrain" / "checkpoints" / "step_000004").glob("model*.safetensors"))
    written = weights.stat().st_mtime_ns

    account = usage_of(run_dir, said)
    said = command("speedrun", *flags, timeout_s=280, compiled=compiled)
    assert_quiet(said, [text.parent, run_dir])
    again, scores_again = losses_and_scores(run_dir)
    assert again == losses, "a step was trained again"
    assert scores_again == scores
    assert weights.stat().st_mtime_ns == written
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert read_jsonl(str(run_dir / "usage.jsonl")) == account, "no Ray was started before it served"


def usage_of(run_dir: Path, said: str) -> list[dict]:
    """The account of the stages, after a look at it: one node was there all the time."""
    account = read_jsonl(str(run_dir / "usage.jsonl"))
    stages = [one["stage"] for one in account]
    assert sorted(set(stages), key=stages.index) == ["data", "pretrain", "sft", "rl", "evaluate"]
    assert all(one["elapsed_s"] > one["waiting_s"] >= 0 for one in account)
    cost = sum(one["cost"] for one in account)
    assert cost == pytest.approx(0.36 / 3600 * sum(one["elapsed_s"] for one in account))
    assert f"{cost:.2f} dollars" in said
    return account


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
    assert (
        "checkpoint=nothing: state.json is missing. Name pretrain, sft, rl, or a complete step_ folder." in lost.stderr
    )


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


TOPICS = ("the sky", "cats", "music", "Python", "a recipe", "history", "the moon", "football", "love", "money", "rain",
          "dreams", "books", "trains", "coffee", "war", "peace", "time", "numbers", "the sea")  # fmt: skip
PROMPTS = [f"Tell me about {topic}." for topic in TOPICS] + [f"Why is {topic} important?" for topic in TOPICS[:10]] + [
    "Who are you?", "What can you do?", "Hello", "Hi there!", "How are you today?", "Write a poem.",
    "Write a long story about a dragon.", "Count to one hundred.", "List all countries.", "Repeat the word banana.",
    "asdf qwer zxcv", "1 2 3 4 5 6 7 8", "Spell the word strawberry.", "How many r are in strawberry?",
    "Mia has 37 apples and buys 58 more. How many apples does Mia have now?", "def f(x):", "Wer bist du?",
    "A box holds 24 pens. How many pens are in 6 boxes?", "Explain how a list comprehension works.",
    "What is the meaning of life?",
]  # fmt: skip


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_no_answer_of_the_demos_model_goes_round_in_circles(tmp_path):
    """50 prompts, three seeds, the checkpoint's own sampling: in no answer are any 8 tokens there three times.

    NANOCHAT_DEMO_RUN names the run directory of a demo that is trained; without it one is trained, 8 minutes.
    """
    from nanochat.data.conversations import exchange, render_prompt
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.inference.completions import complete
    from nanochat.inference.engine import Engine
    from nanochat.inference.load import load_model
    from nanochat.inference.requests import Request
    from nanochat.inference.tool_loop import ToolLoop
    from nanochat.run_context import RunContext
    from nanochat.training.checkpoint import named_checkpoint, tokenizer_of

    run_dir = os.environ.get("NANOCHAT_DEMO_RUN")
    if run_dir is None:
        run_dir = str(tmp_path / "demo")
        command("speedrun", "demo", "--run-dir", run_dir, timeout_s=1000, compiled=True)
    checkpoint = named_checkpoint(run_dir, "sft", pytest.fail)
    tokenizer = Tokenizer.load(tokenizer_of(run_dir, checkpoint.folder))
    engine = Engine(load_model(checkpoint, tokenizer, RunContext()), max_running=32)
    ends = frozenset({tokenizer.special("<|assistant_end|>"), tokenizer.bos})
    prompts = [tuple(render_prompt(tokenizer, exchange(prompt, ""))) for prompt in PROMPTS]
    generation = checkpoint.generation | {"top_k": int(checkpoint.generation["top_k"])}
    requests = [
        Request(
            prompt=prompt, max_new_tokens=engine.capacity - len(prompt), stop_tokens=ends, seed=seed,
            **generation,
        )
        for seed in range(3)
        for prompt in prompts
    ]  # fmt: skip
    answers = complete(ToolLoop(engine, tokenizer), requests)
    assert len(answers) == 150
    for request, answer in zip(requests, answers, strict=True):
        found = Counter(tuple(answer.tokens[at : at + 8]) for at in range(len(answer.tokens) - 7))
        assert max(found.values(), default=0) < 3, tokenizer.decode([*request.prompt, *answer.tokens])
