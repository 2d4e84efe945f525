"""A checkpoint in nanochat's layout loads into our model and computes what the tensors say."""

import json

import pytest
import torch

from nanochat.errors import CheckpointError
from nanochat.model.gpt import GPT
from nanochat.model.nanochat_checkpoint import load_nanochat_checkpoint
from nanochat.training.checkpoint import load_parameters

SIZES = {
    "sequence_len": 32,
    "vocab_size": 70,
    "n_layer": 3,
    "n_head": 2,
    "n_kv_head": 1,
    "n_embd": 32,
    "window_pattern": "SL",
}


def write(folder, state):
    torch.save(state, folder / "model_000010.pt")
    (folder / "meta_000010.json").write_text(json.dumps({"model_config": SIZES}))
    return str(folder / "model_000010.pt"), str(folder / "meta_000010.json")


@pytest.mark.parametrize("smear", [False, True])
def test_loads_and_agrees(tmp_path, smear):
    from nanochat.config.model import ModelConfig

    source = GPT(ModelConfig(**SIZES, smear=True))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        source.transformer["wte"].to(torch.bfloat16).float()
        if not smear:
            source.smear_lambda.zero_()
    state = {f"_orig_mod.{name}": tensor for name, tensor in source.state_dict().items()}
    state["_orig_mod.transformer.wte.weight"] = state["_orig_mod.transformer.wte.weight"].bfloat16()
    config, tensors = load_nanochat_checkpoint(*write(tmp_path, state))
    assert config.smear is smear
    model = GPT(config)
    load_parameters(model, tensors, "test")
    with torch.no_grad():
        source.transformer["wte"].weight.copy_(state["_orig_mod.transformer.wte.weight"].float())
    tokens = torch.randint(0, 70, (2, 20), generator=generator)
    torch.testing.assert_close(model(tokens), source(tokens))


def test_refuses_what_is_no_state_dict(tmp_path):
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load_nanochat_checkpoint(*write(tmp_path, [1, 2]))
    (tmp_path / "meta_000010.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"lacks model_config\.sequence_len"):
        load_nanochat_checkpoint(str(tmp_path / "model_000010.pt"), str(tmp_path / "meta_000010.json"))
