"""Exported folders in vLLM as its users load them: stock without a line of ours, the full model by the plugin alone."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from naive_gpt import randomise

from nanochat.cluster.ingress import free_ports
from nanochat.config.model import ModelConfig, stock
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.exchange.hf_folder import write_folder
from nanochat.model.gpt import GPT
from nanochat.serving.prompts import chat_prompt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TOKENIZER = Tokenizer([b"th", b"the", b" t", b" the", b"in"], SPLIT_PATTERNS["nanochat"])
FULL = ModelConfig(
    sequence_len=512, vocab_size=TOKENIZER.vocab_size, n_layer=4, n_head=4, n_kv_head=2, n_embd=128, window_pattern="SL"
)
MODELS = {"full": FULL, "stock": stock(FULL)}
MESSAGES = [{"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "the end\n"}]}]  # fmt: skip
NEW_TOKENS, EACH = 16, 4
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
folder, implementation, prompts, each, messages, tokens = json.load(sys.stdin)
model = LLM(folder, model_impl=implementation, dtype="float32", enforce_eager=True, max_num_batched_tokens=96,
            max_num_seqs=8, enable_chunked_prefill=True, max_logprobs=-1, logprobs_mode="raw_logits",
            kv_cache_memory_bytes=1 << 27)
params = SamplingParams(temperature=0, max_tokens=each, ignore_eos=True, logprobs=-1, detokenize=False)
told = []
for _ in range(2):
    for one in model.generate([{"prompt_token_ids": ids} for ids in prompts], params):
        rows = [[row[token].logprob for token in sorted(row)] for row in one.outputs[0].logprobs]
        told.append([list(one.outputs[0].token_ids), rows])
chat = model.chat(messages, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))[0]
from vllm.model_executor.models.registry import ModelRegistry
said = {"answers": told, "prompt": list(chat.prompt_token_ids), "chat": list(chat.outputs[0].token_ids),
        "knows_us": "NanochatOnRayForCausalLM" in ModelRegistry.get_supported_archs()}
print("\\nTOLD", json.dumps(said))
"""


def random_model(config: ModelConfig) -> GPT:
    model = GPT(config).eval()
    randomise(model)
    return model


def by_vllm(folder: Path, implementation: str, prompts: list[list[int]], plugins: str | None) -> dict:
    """What vLLM says of a folder, in a process that imports nothing of ours unless its plugin does."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VLLM_PLUGINS")}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                    "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
    environment |= {} if plugins is None else {"VLLM_PLUGINS": plugins}
    asked = json.dumps([str(folder), implementation, prompts, EACH, MESSAGES, NEW_TOKENS])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, cwd=folder, capture_output=True, text=True, timeout=250,
        input=asked,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    return json.loads(line.removeprefix("TOLD "))


@pytest.mark.parametrize(("name", "implementation", "plugins"), [("stock", "transformers", ""), ("full", "auto", None)])
def test_vllm_loads_the_folder_and_says_what_we_say(name, implementation, plugins, tmp_path):
    config = MODELS[name]
    model, folder = random_model(config), tmp_path / "folder"
    write_folder(str(folder), config, model.state_dict(), TOKENIZER, is_chat=True, generation={})
    draw = torch.Generator().manual_seed(0)
    lengths = [1, 31, 32, 33, 127, 128, 129, 255, 400, *torch.randint(1, 401, (191,), generator=draw).tolist()]
    prompts = [torch.randint(250, (length,), generator=draw).tolist() for length in lengths]
    told = by_vllm(folder, implementation, prompts, plugins)
    assert told["knows_us"] == (name == "full"), "stock is loaded without our plugin"
    for number, (tokens, logits) in enumerate(told["answers"]):
        row = torch.tensor([[*prompts[number % len(prompts)], *tokens]])
        with torch.no_grad():
            expected = model.logits(model(row))[0, -EACH - 1 : -1]
        torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-3)
        assert tokens == expected.argmax(-1).tolist()
    assert told["prompt"] == chat_prompt(TOKENIZER, MESSAGES, 9)
    row = torch.tensor([[*told["prompt"], *told["chat"]]])
    with torch.no_grad():
        assert told["chat"] == model.logits(model(row))[0, -NEW_TOKENS - 1 : -1].argmax(-1).tolist()


def test_its_own_server_says_what_we_say_compiled_as_it_compiles(tmp_path):
    """As the model card starts it, of the package for CPUs."""
    model, folder = random_model(FULL), tmp_path / "folder"
    write_folder(str(folder), FULL, model.state_dict(), TOKENIZER, is_chat=True, generation={})
    (port,) = free_ports(1)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = ("--model", str(folder), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32")
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *command], env=environment, cwd=tmp_path,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        body = {"messages": MESSAGES, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body | {"return_token_ids": True}).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        deadline_s = time.monotonic() + 200
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    told = json.load(answer)
                break
            except (ConnectionError, urllib.error.URLError):
                assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
                assert time.monotonic() < deadline_s, "it does not begin"
                time.sleep(0.5)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    prompt = chat_prompt(TOKENIZER, MESSAGES, 9)
    assert told["prompt_token_ids"] == prompt
    row = [*prompt, *told["choices"][0]["token_ids"]]
    with torch.no_grad():
        expected = model.logits(model(torch.tensor([row])))[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    assert row[len(prompt) :] == expected
    assert len(expected) == NEW_TOKENS


def test_smear_and_several_gpus_are_refused_by_the_plugin_too():
    from types import SimpleNamespace

    from nanochat.exchange.modeling_nanochat import NanochatOnRayConfig
    from nanochat.inference.vllm_model import NanochatOnRayForCausalLM

    def config(smear: bool = False, quantized: bool = False, **sizes: int) -> SimpleNamespace:
        parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1} | sizes
        return SimpleNamespace(
            model_config=SimpleNamespace(hf_config=NanochatOnRayConfig(**vars(replace(FULL, smear=smear)))),
            parallel_config=SimpleNamespace(**parallel),
            quant_config=object() if quantized else None,
        )

    for asked, message in (
        (config(quantized=True), "quantization: this model has none"),
        (config(smear=True), "smear=True: vLLM cannot do it"),
        (config(tensor_parallel_size=2), "tensor_parallel_size=2: must be 1"),
        (config(pipeline_parallel_size=4), "pipeline_parallel_size=4: must be 1"),
    ):
        with pytest.raises(ValueError, match=message):
            NanochatOnRayForCausalLM(vllm_config=asked)
