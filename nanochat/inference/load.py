"""A checkpoint, or a model in training, to one that is ready to answer: its weights in the compute dtype, cast once."""

from typing import Literal

import torch

from nanochat.config.model import ModelConfig
from nanochat.config.training import LearnerConfig
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import TokenizerMismatchError
from nanochat.model.gpt import GPT
from nanochat.run_context import RunContext
from nanochat.training.checkpoint import Checkpoint, load_parameters
from nanochat.training.hardware import choose_hardware


def load_model(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    run: RunContext,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
) -> GPT:
    """Return a checkpoint's model on this process's device, computing in `dtype` (auto = what the hardware multiplies).

    Raises: CheckpointError if it cannot be read; TokenizerMismatchError if it was trained with another tokenizer.
    """
    state = checkpoint.state
    if state["tokenizer_hash"] != tokenizer.hash:
        raise TokenizerMismatchError(
            f"checkpoint={checkpoint.folder}: was trained with another tokenizer. Use it in its own run directory."
        )
    hardware = choose_hardware(LearnerConfig(dtype=dtype), run)
    model = GPT(ModelConfig(**state["model"]), hardware.dtype)
    load_parameters(model, checkpoint.model_tensors(), checkpoint.folder)
    return model.to(hardware.device, hardware.dtype).prepare_for_inference()


def inference_copy(model: GPT) -> GPT:
    """Return a model with the weights in its compute dtype: it computes the same, without casting at each step.

    In bf16 a third of the time of decoding went into casts (depth 4, 2 cores, AMD EPYC, 2026-11-25).
    """
    copy = GPT(model.config, model.compute_dtype).to(model.lm_head.weight.device, model.compute_dtype)
    with torch.no_grad():
        for target, source in zip(copy.parameters(), model.parameters(), strict=True):
            target.copy_(source)
    return copy.prepare_for_inference()
