"""nanochat's own ten training steps, from its own parameters (tests data, `reference/README.md`)."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanochat.config.model import ModelConfig
from nanochat.model.gpt import GPT
from nanochat.model.optimizer import MuonAdamW, StepSchedule
from nanochat.model.scaling import LearningRates, parameter_groups

RATES = LearningRates(matrix=0.02, embedding=0.2, unembedding=0.004, scalar=0.5)
BOUND = {1: 2e-3, 10: 1e-2}  # of the distance between reference and start, per tensor


@pytest.mark.parametrize("letter", ["a", "b"])
def test_ten_steps_are_those_of_nanochat(test_data, letter):
    folder = test_data / "reference"
    described = json.loads((folder / f"config_{letter}.json").read_text())
    config = ModelConfig(**described["model"], smear=described["smear"])
    model = GPT(config)
    start = load_file(folder / f"model_{letter}.safetensors")
    parameters = dict(model.named_parameters())
    assert all(name in parameters or name.startswith("smear") for name in start)
    model.load_state_dict({name: start[name] for name in parameters}, strict=True)
    optimizer = MuonAdamW(parameters, parameter_groups(config, list(parameters), RATES, 1.0), muon_dtype=torch.float32)
    with np.load(folder / f"training_{letter}.npz") as arrays:
        rows_SBT1, losses_S = torch.from_numpy(arrays["rows_SBT1"]), arrays["losses_S"]
    assert len(rows_SBT1) == 10
    for k, rows_BT1 in enumerate(rows_SBT1):
        loss = model.loss(rows_BT1[:, :-1], rows_BT1[:, 1:]) / rows_BT1[:, 1:].numel()
        loss.backward()
        assert loss.item() == pytest.approx(float(losses_S[k]), abs=1e-4), f"step {k}"
        optimizer.step(
            StepSchedule(lr_factor=0.1 * (k + 1), muon_momentum=0.85 + 0.01 * k, muon_weight_decay=0.1 * (1 - k / 10))
        )
        if k + 1 in BOUND:
            trained = load_file(folder / f"trained_{letter}_step{k + 1:02d}.safetensors")
            apart = {
                name: float((p.detach() - trained[name]).norm() / (trained[name] - start[name]).norm())
                for name, p in parameters.items()
            }
            worst = max(apart, key=apart.__getitem__)
            assert apart[worst] <= BOUND[k + 1], f"{worst} after step {k + 1}"
