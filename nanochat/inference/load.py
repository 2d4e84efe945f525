"""A checkpoint, or a model in training, to one that is ready to answer: its weights in the compute dtype, cast once."""

from typing import Literal

import torch

from nanochat.config.serving import ServingConfig
from nanochat.config.training import LearnerConfig
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import ConfigError
from nanochat.inference.engine import Engine
from nanochat.inference.requests import InferenceEngine
from nanochat.inference.vllm_engine import VllmEngine
from nanochat.model.gpt import GPT
from nanochat.model.int8 import convert_to_int8, multiplies_int8
from nanochat.run_context import RunContext
from nanochat.training.checkpoint import Checkpoint, config_of, load_parameters
from nanochat.training.hardware import Hardware, can_compile, choose_hardware, multiplies_bfloat16


def load_model(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    run: RunContext,
    dtype: Literal["auto", "bfloat16", "float32", "int8"] = "auto",
) -> GPT:
    """Return a checkpoint's model on this process's device, computing in `dtype` (auto = what the hardware multiplies).

    int8 = in bfloat16, with the large linear layers in 8-bit integers. Raises: CheckpointError if it cannot be read;
    TokenizerMismatchError if it was trained with another tokenizer; ConfigError if int8 is not for this hardware.
    """
    config = config_of(checkpoint, tokenizer)
    hardware = choose_hardware(LearnerConfig(dtype="bfloat16" if dtype == "int8" else dtype), run)
    if dtype == "int8":
        check_int8(hardware)
    model = GPT(config, hardware.dtype)
    load_parameters(model, checkpoint.model_tensors(), checkpoint.folder)
    model = model.to(hardware.device, hardware.dtype)
    return convert_to_int8(model) if dtype == "int8" else model.prepare_for_inference()


def check_int8(hardware: Hardware | None = None) -> None:
    """Raise ConfigError if hardware, none = this process's, has no products of 8-bit integers."""
    hardware = hardware or choose_hardware(LearnerConfig(), RunContext())
    if not (multiplies_int8(hardware.device) and multiplies_bfloat16(hardware.device)):
        raise ConfigError(
            f"dtype=int8: is for CPUs with AVX512-VNNI and AVX512-BF16; this process computes on {hardware.name}. "
            "Leave it out."
        )


def load_engine(
    checkpoint: Checkpoint, tokenizer: Tokenizer, config: ServingConfig, cache_tokens: int | None
) -> InferenceEngine:
    """Return the engine that a config names with a checkpoint's model, for requests of at most the model's row.

    On a CPU a core is left to the event loop and the proxy: products on all of them wait for the slowest. With
    `compile: auto` its first step takes seconds.

    Raises: as `load_model`; ConfigError if the device has no room, or vLLM is not there or cannot compute the model.
    """
    if config.backend == "native":
        model = load_model(checkpoint, tokenizer, RunContext(), config.dtype)
        device = model.lm_head.weight.device
        leave_a_core(device)
        return Engine(
            model, max_running=config.max_running, cache_tokens=cache_tokens, compiled=_is_compiled(config, device)
        )
    assert config.dtype != "int8", "its config says so"
    hardware = choose_hardware(LearnerConfig(dtype=config.dtype), RunContext())
    leave_a_core(hardware.device)
    return VllmEngine(
        config_of(checkpoint, tokenizer), checkpoint.model_tensors(), dtype=hardware.dtype, device=hardware.device,
        max_running=config.max_running, cache_tokens=cache_tokens, compiled=_is_compiled(config, hardware.device),
    )  # fmt: skip


def _is_compiled(config: ServingConfig, device: torch.device) -> bool:
    return config.compile == "auto" and can_compile(device) is None


def leave_a_core(device: torch.device) -> None:
    """On a CPU, compute on all cores but one."""
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))


def inference_copy(model: GPT) -> GPT:
    """Return a model with the weights in its compute dtype: it computes the same, without casting at each step.

    In bf16 a third of the time of decoding went into casts (depth 4, 2 cores, AMD EPYC, 2026-11-25).
    """
    copy = GPT(model.config, model.compute_dtype).to(model.lm_head.weight.device, model.compute_dtype)
    with torch.no_grad():
        for target, source in zip(copy.parameters(), model.parameters(), strict=True):
            target.copy_(source)
    return copy.prepare_for_inference()
