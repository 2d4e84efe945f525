"""The full forward, our engine, transformers and vLLM say the same of the same weights; a part left out is seen."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from naive_gpt import randomise

from nanochat.config.model import ModelConfig, stock
from nanochat.exchange import modeling_nanochat
from nanochat.exchange.hf_model import exported_config, exported_tensors, write_model
from nanochat.inference import vllm_engine
from nanochat.inference.completions import complete
from nanochat.inference.engine import Engine
from nanochat.inference.requests import Request
from nanochat.inference.vllm_engine import VllmEngine
from nanochat.model.gpt import GPT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FULL = ModelConfig(sequence_len=512, vocab_size=300, n_layer=4, n_head=4, n_kv_head=2, n_embd=128)
"""Windows of 128 tokens in all layers but the last; a vocabulary that is padded."""
MODELS = {"full": FULL, "stock": stock(FULL)}
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


def requests(asked: list[list[int]]) -> list[Request]:
    return [Request(prompt=tuple(prompt), max_new_tokens=NEW_TOKENS) for prompt in asked]


class Watched:
    """A VllmEngine whose logits are kept: those of each request's new tokens."""

    def __init__(self, config: ModelConfig, weights: dict[str, torch.Tensor], **options) -> None:
        self.logits: dict[tuple[int, int], torch.Tensor] = {}
        self.engine = VllmEngine(
            config, weights, dtype=torch.float32, device=torch.device("cpu"), max_running=32, step_tokens=96, **options
        )

    def complete(self, asked: list[Request]) -> tuple[list[list[int]], list[torch.Tensor]]:
        """Greedy tokens of each request, and the logits that they were taken from."""
        first = self.engine._next_id + 1
        found = [one.tokens for one in complete(self.engine, asked)]
        return found, [
            torch.stack([self.logits[first + number, said] for said in range(NEW_TOKENS)])
            for number in range(len(asked))
        ]


@pytest.fixture
def watched(monkeypatch):
    """Makes VllmEngines whose logits are kept."""
    made: list[Watched] = []

    def draw(logits, answers, original=vllm_engine.draw):
        for row, answer in enumerate(answers):
            for one in made:
                if answer.id in one.engine._answers and one.engine._answers[answer.id] is answer:
                    one.logits[answer.id, answer.said] = logits[row].clone()
        return original(logits, answers)

    monkeypatch.setattr(vllm_engine, "draw", draw)

    def make(config, weights, **options) -> Watched:
        made.append(Watched(config, weights, **options))
        return made[-1]

    return make


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


@pytest.mark.parametrize("name", MODELS)
def test_four_implementations_agree_over_200_prompts(name, watched, tmp_path):
    config = MODELS[name]
    model, asked = random_model(config), prompts()
    tokens, logits = full_forward(model, asked)
    assert min(float(one.std()) for one in logits) > 1
    assert len({token for of_one in tokens for token in of_one}) > 100
    assert [one.tokens for one in complete(Engine(model, max_running=32), requests(asked))] == tokens

    theirs = transformers_model(config, model, str(tmp_path))
    for prompt, of_prompt, expected in zip(asked, tokens, logits, strict=True):
        row = torch.tensor([[*prompt, *of_prompt[:-1]]])
        with torch.no_grad():
            actual = theirs(row).logits[0, -NEW_TOKENS:]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)
        assert actual.argmax(-1).tolist() == of_prompt

    vllm = watched(config, model.state_dict())
    for _ in range(2):  # the second time most is in the prefix cache
        actual_tokens, actual = vllm.complete(requests(asked))
        assert actual_tokens == tokens
        assert worst(actual, logits) < 1e-3
    assert vllm.engine.load().prefix_hits > 5_000


ZEROED = {
    "value_embeddings": r"value_embeds\.", "gates": r"ve_gate", "resid_lambdas": "resid_lambdas",
    "x0_lambdas": "x0_lambdas", "backout": "backout_lambda", "attention": r"attn\.c_proj", "mlp": r"mlp\.c_proj",
}  # fmt: skip
CHANGED = {
    "windows": {"window_pattern": "L"}, "soft-cap": {"logit_softcap": 30.0}, "gain": {"qk_gain": 1.0},
    "rotation": {"rope_theta": 90_000.0}, "epsilon": {"norm_eps": 1e-2},
}  # fmt: skip


@pytest.mark.parametrize("part", [*ZEROED, *CHANGED, "none"])
def test_a_part_that_is_left_out_is_seen(part, watched):
    import re

    model = random_model(FULL)
    asked = [prompt for prompt in prompts()[:20] if len(prompt) > 1]
    _, logits = full_forward(model, asked)
    weights = {
        name: torch.zeros_like(tensor) if re.search(ZEROED.get(part, "^$"), name) else tensor
        for name, tensor in model.state_dict().items()
    }
    vllm = watched(replace(FULL, **CHANGED.get(part, {})), weights)
    _, actual = vllm.complete(requests(asked))
    assert (worst([one[:1] for one in actual], [one[:1] for one in logits]) < 1e-3) == (part == "none")
