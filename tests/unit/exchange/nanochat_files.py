"""Models in karpathy/nanochat's layout: its state dicts, of 2025-10 and of today, and a tokenizer as it pickles one."""

import json
import pickle
from pathlib import Path

import rustbpe
import tiktoken
import torch

from nanochat.config.model import STOCK, ModelConfig
from nanochat.data.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERNS
from nanochat.model.gpt import GPT

TEXT = "The old man and the sea: 12 boats, 345 fish; caf\u00e9 \u4e2d\u6587\u5b57 \U0001f41f fish fish, isn't it? " * 3
SIZES = {"sequence_len": 640, "vocab_size": 300, "n_layer": 5, "n_head": 4, "n_kv_head": 2, "n_embd": 48}
TODAY = SIZES | {"window_pattern": "SSSL"}


def config_of(sizes: dict[str, object]) -> ModelConfig:
    """Return how the nanochat of these sizes computes: that of today has a window pattern, and always smear."""
    if "window_pattern" in sizes:
        return ModelConfig(**sizes, smear=True)
    return ModelConfig(**sizes | STOCK | {"norm_eps": None})


def randomised(config: ModelConfig, seed: int = 0) -> GPT:
    """Return a model whose every parameter shows in its logits; embeddings hold what bfloat16 can."""
    model = GPT(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(generator=draw)
            if value.dim() == 1:
                value.mul_(0.3).add_(0.7)
            elif name == "lm_head.weight":
                value.mul_(6 * value.shape[1] ** -0.5)
            elif "wte" in name or "value_embeds" in name:
                value.copy_(value.bfloat16().float())
            else:
                value.mul_(1.5 * value.shape[1] ** -0.5)
    return model


def state_dict(model: GPT) -> dict[str, torch.Tensor]:
    """Return what nanochat saves: names as torch.compile leaves them, embeddings in bfloat16."""
    return {
        f"_orig_mod.{name}": value.bfloat16() if "wte" in name or "value_embeds" in name else value.clone()
        for name, value in model.state_dict().items()
    }


def write_checkpoint(folder: Path, state: object, sizes: object, step: int = 650) -> tuple[str, str]:
    """Write the two files that the model is in, and those that are not looked at."""
    folder.mkdir(parents=True, exist_ok=True)
    model, meta = folder / f"model_{step:06d}.pt", folder / f"meta_{step:06d}.json"
    torch.save(state, model)
    meta.write_text(json.dumps({"step": step, "val_bpb": 0.81, "model_config": sizes, "user_config": {"run": "x"}}))
    (folder / f"optim_{step:06d}_rank0.pt").write_bytes(b"not looked at")
    return str(model), str(meta)


def trained(vocab_size: int = 300) -> dict[str, object]:
    """Return what nanochat's RustBPETokenizer makes its encoding of, trained by rustbpe itself."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator([TEXT], vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERNS["nanochat"])
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    specials = {name: len(ranks) + number for number, name in enumerate(SPECIAL_TOKENS)}
    return {
        "name": "rustbpe", "pat_str": trainer.get_pattern(), "mergeable_ranks": ranks, "special_tokens": specials,
    }  # fmt: skip


def write_tokenizer(folder: Path, vocab_size: int = 300) -> tiktoken.Encoding:
    """Write tokenizer.pkl, and the file that is not looked at."""
    folder.mkdir(parents=True, exist_ok=True)
    encoding = tiktoken.Encoding(**trained(vocab_size))
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    (folder / "token_bytes.pt").write_bytes(b"not looked at")
    return encoding
