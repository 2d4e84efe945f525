"""The full forward, our engine, transformers and vLLM say the same of the same weights; a part left out is seen."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from naive_gpt import randomise

from nanochat.config.model import ModelConfig, stock
from nanochat.exchange import modeling_nanochat
from nanochat.exchange.hf_model import exported_config, exported_tensors, write_model
from nanochat.inference import engine, vllm_engine
from nanochat.inference.completions import complete
from nanochat.inference.drawing import draw
from nanochat.inference.engine import Engine
from nanochat.inference.load import inference_copy
from nanochat.inference.requests import InferenceEngine, Request
from nanochat.inference.vllm_engine import VllmEngine
from nanochat.model.gpt import GPT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FULL = ModelConfig(sequence_len=512, vocab_size=300, n_layer=4, n_head=4, n_kv_head=2, n_embd=128)
"""Windows of 128 tokens in all layers but the last; a vocabulary that is padded."""
MODELS = {"full": FULL, "stock": stock(replace(FULL, n_head=3, n_kv_head=1, n_embd=192))}
PROMPTS, NEW_TOKENS, LONGEST = 200, 4, 400


def random_model(config: ModelConfig) -> GPT:
    model = GPT(config)
    randomise(model)
    return model.eval()


def prompts() -> list[list[int]]:
    """Of all lengths from 1 to 400, the edges of chunks, pages and windows among them; some begin alike."""
    draw = random.Random(0)
    edges = [1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 130, 255, 256, 257, 399, 400]
    lengths = edges + [draw.randint(1, LONGEST) for _ in range(PROMPTS - len(edges))]
    shared = [draw.randrange(300) for _ in range(LONGEST)]
    found = []
    for number, length in enumerate(lengths):
        alike = draw.randint(0, length) if number % 3 == 0 else 0
        found.append(shared[:alike] + [draw.randrange(300) for _ in range(length - alike)])
    return found


@pytest.fixture
def greedy(monkeypatch):
    """Asks an engine for greedy tokens of all prompts, and for the logits that they were taken from."""
    kept: dict[tuple[int, int], torch.Tensor] = {}

    def keeping_draw(logits, answers):
        for row, answer in enumerate(answers):
            kept[id(answer.request), answer.said] = logits[row].clone()
        return draw(logits, answers)

    for module in (engine, vllm_engine):
        monkeypatch.setattr(module, "draw", keeping_draw)

    def ask(of: InferenceEngine, prompts: list[list[int]]) -> tuple[list[list[int]], list[torch.Tensor]]:
        asked = [Request(prompt=tuple(prompt), max_new_tokens=NEW_TOKENS) for prompt in prompts]
        kept.clear()
        tokens = [one.tokens for one in complete(of, asked)]
        return tokens, [torch.stack([kept[id(one), said] for said in range(NEW_TOKENS)]) for one in asked]

    return ask


def vllm_of(
    config: ModelConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32, compiled: bool = False
) -> VllmEngine:
    """Return vLLM with chunks of prompts, a prefix cache, and prompts beside sequences that decode."""
    cpu = torch.device("cpu")
    return VllmEngine(
        config, weights, dtype=dtype, device=cpu, max_running=32, step_tokens=96, compiled=compiled
    )  # fmt: skip


def full_forward(model: GPT, asked: list[list[int]]) -> tuple[list[list[int]], list[torch.Tensor]]:
    """The whole row through the model for every token."""
    tokens, logits = [], []
    for prompt in asked:
        row, of_row = list(prompt), []
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                of_row.append(model.logits(model(torch.tensor([row])))[0, -1])
            row.append(int(of_row[-1].argmax()))
        tokens.append(row[len(prompt) :])
        logits.append(torch.stack(of_row))
    return tokens, logits


def worst(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def transformers_model(config: ModelConfig, model: GPT, folder: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    content = exported_config(config, torch.float32) | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    write_model(folder, content, exported_tensors(model.state_dict(), config, torch.float32))
    (Path(folder) / "modeling_nanochat.py").write_bytes(Path(modeling_nanochat.__file__).read_bytes())
    is_own = content["model_type"] != "nanochat"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=is_own).eval()


def last_logits(theirs: torch.nn.Module, row: list[int]) -> torch.Tensor:
    """Return the logits of a row's last places, one for each new token."""
    with torch.no_grad():
        return theirs(torch.tensor([row])).logits[0, -NEW_TOKENS:]


@pytest.mark.parametrize("name", MODELS)
def test_four_implementations_agree_over_200_prompts(name, greedy, tmp_path):
    config = MODELS[name]
    model, asked = random_model(config), prompts()
    tokens, logits = full_forward(model, asked)
    assert min(float(one.std()) for one in logits) > 1
    assert len({token for of_one in tokens for token in of_one}) > 100
    theirs = transformers_model(config, model, str(tmp_path))
    for prompt, of_prompt, expected in zip(asked, tokens, logits, strict=True):
        actual = last_logits(theirs, [*prompt, *of_prompt[:-1]])
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)
        assert actual.argmax(-1).tolist() == of_prompt

    for of in (
        lambda: Engine(model, max_running=32, step_tokens=96),
        lambda: Engine(inference_copy(model), max_running=32, step_tokens=96, compiled=True),
        lambda: vllm_of(config, model.state_dict()),
        lambda: vllm_of(config, model.state_dict(), compiled=True),
    ):
        ours = of()
        for _ in range(2):  # the second time most is in the prefix cache
            actual_tokens, actual_logits = greedy(ours, asked)
            assert actual_tokens == tokens
            assert worst(actual_logits, logits) < 1e-3
        if isinstance(ours, Engine) and ours.compiled is not None:
            assert ours.compiled.is_compiled
        assert ours.load().prefix_hits > 5_000


def test_in_bfloat16_vllm_is_as_close_as_our_engine(greedy):
    model, asked = random_model(FULL), prompts()[:60]
    _, exact = full_forward(model, asked)
    halves = GPT(FULL, torch.bfloat16)
    halves.load_state_dict(model.state_dict())
    ours = Engine(halves.bfloat16().prepare_for_inference(), max_running=32, step_tokens=96)
    errors = []
    for of in (ours, vllm_of(FULL, model.state_dict(), torch.bfloat16)):
        _, found = greedy(of, asked)  # the first token's logits: after it each goes its own way
        errors.append(torch.stack([(a[0] - b[0]).abs().mean() for a, b in zip(found, exact, strict=True)]).mean())
    assert 0 < errors[1] < 1.2 * errors[0]
    assert errors[0] < 0.05 * torch.stack([one[0] for one in exact]).std()


ZEROED = {
    "value_embeddings": r"value_embeds\.", "gates": r"ve_gate", "resid_lambdas": "resid_lambdas",
    "x0_lambdas": "x0_lambdas", "backout": "backout_lambda", "attention": r"attn\.c_proj", "mlp": r"mlp\.c_proj",
}  # fmt: skip
CHANGED = {
    "windows": {"window_pattern": "L"}, "soft-cap": {"logit_softcap": 30.0}, "gain": {"qk_gain": 1.0},
    "rotation": {"rope_theta": 90_000.0}, "epsilon": {"norm_eps": 1e-2},
}  # fmt: skip


@pytest.mark.parametrize("part", [*ZEROED, *CHANGED, "none"])
def test_a_part_that_is_left_out_is_seen_in_each(part, greedy, tmp_path):
    model = random_model(FULL)
    asked = [prompt for prompt in prompts()[:20] if len(prompt) >= NEW_TOKENS]
    _, logits = full_forward(model, asked)
    weights = {
        name: torch.zeros_like(tensor) if re.search(ZEROED.get(part, "^$"), name) else tensor
        for name, tensor in model.state_dict().items()
    }
    config = replace(FULL, **CHANGED.get(part, {}))
    lacking = GPT(config).eval()
    lacking.load_state_dict(weights)
    theirs = transformers_model(config, lacking, str(tmp_path))
    of_engines = [greedy(one, asked)[1] for one in (Engine(lacking), vllm_of(config, weights))]
    first = [[of_prompt[:1] for of_prompt in found] for found in (logits, *of_engines)]
    first.append([last_logits(theirs, prompt)[-1:] for prompt in asked])
    assert [worst(found, first[0]) < 1e-3 for found in first[1:]] == [part == "none"] * 3
