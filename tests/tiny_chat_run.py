"""A run directory with a tiny chat model of random weights, all of them, and a tokenizer of bytes."""

from dataclasses import asdict
from pathlib import Path


def write_tiny_chat_run(folder: Path, sequence_len: int = 256) -> Path:
    import torch

    from nanochat.config.model import ModelConfig
    from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
    from nanochat.model.gpt import GPT
    from nanochat.storage import RunFolder
    from nanochat.training.checkpoint import CheckpointWriter

    tokenizer = Tokenizer([], SPLIT_PATTERNS["nanochat"])
    run = RunFolder(str(folder))
    tokenizer.save(run.tokenizer)
    config = ModelConfig(
        sequence_len=sequence_len, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=64
    )
    model = GPT(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=draw).mul_(0.3)
    writer = CheckpointWriter(run.sft.checkpoints, rank=0, world_size=1, keep=1, attempt="only")
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = {"model": asdict(config), "tokenizer_hash": tokenizer.hash, "stage": {"base_sha256": ""}, "generation": {}}
    writer.save(1, tensors, {}, state)
    writer.wait()
    return folder
