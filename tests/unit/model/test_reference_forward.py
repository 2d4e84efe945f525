"""nanochat's own parameters in, nanochat's own logits and losses out (tests data, `reference/README.md`)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanochat.config.model import ModelConfig
from nanochat.model.gpt import GPT

DATA = os.environ.get("NANOCHAT_TEST_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="NANOCHAT_TEST_DATA is not set")


def load(letter: str) -> tuple[GPT, dict, dict[str, np.ndarray]]:
    folder = Path(str(DATA)) / "reference"
    described = json.loads((folder / f"config_{letter}.json").read_text())
    model = GPT(ModelConfig(**described["model"], smear=described["smear"]))
    state = load_file(folder / f"model_{letter}.safetensors")
    if letter == "a":  # the file holds parameters of smear, which this model has off
        state = {name: value for name, value in state.items() if not name.startswith("smear")}
    model.load_state_dict(state, strict=True)
    with np.load(folder / f"forward_{letter}.npz") as arrays:
        return model, described, {name: arrays[name] for name in arrays.files}


@pytest.mark.parametrize("letter", ["a", "b"])
def test_windows_are_those_of_nanochat(letter):
    model, described, _ = load(letter)
    assert model.config.windows == [left for left, _ in described["window_sizes"]]


@pytest.mark.parametrize("letter", ["a", "b"])
def test_logits_and_losses_are_those_of_nanochat(letter):
    model, _, expected = load(letter)
    tokens, targets = torch.from_numpy(expected["tokens_BT"]), torch.from_numpy(expected["targets_BT"])
    with torch.no_grad():
        logits = model.logits(model(tokens))[:, expected["logits_positions"]].numpy()
    assert np.abs(logits - expected["logits_BTV"]).max() < 1e-4
    token_losses = model.token_losses(tokens, targets).numpy()
    assert np.abs(token_losses - expected["token_losses_BT"]).max() < 1e-4
    num_targets = int((targets >= 0).sum())
    assert num_targets < targets.numel()
    assert token_losses.sum() / num_targets == pytest.approx(float(expected["loss"]), abs=1e-4)
    assert model.loss(tokens, targets).item() / num_targets == pytest.approx(float(expected["loss"]), abs=1e-4)
