"""nanochat's own checkpoints to our model: its parameter names are ours, its dtypes are not.

nanochat saves `model_000123.pt` (a torch state dict, embeddings in bf16) beside `meta_000123.json` with the sizes. It
is read with weights_only=True, so a stranger's file cannot run code. Source: nanochat checkpoint_manager.py@92d63d4.
Not covered: its optimiser state, and its pickled tokenizer.
"""

from pathlib import Path

import torch
from torch import Tensor

from nanochat import storage
from nanochat.config.model import ModelConfig
from nanochat.errors import CheckpointError

SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
SMEAR = ("smear_gate.weight", "smear_lambda")


def load_nanochat_checkpoint(model_path: str, meta_path: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return config and float32 parameters of a nanochat checkpoint; smear is on if its scalar is not zero.

    Raises: CheckpointError if the file is no state dict of tensors or its sizes are missing.
    """
    sizes = storage.read_json(meta_path).get("model_config", {})
    if missing := [name for name in SIZES[:-1] if name not in sizes]:
        raise CheckpointError(f"meta={meta_path}: lacks model_config.{missing[0]}. Name the meta_*.json of this model.")
    try:
        state = torch.load(Path(model_path), map_location="cpu", weights_only=True)
    except (torch.serialization.pickle.UnpicklingError, RuntimeError, EOFError, OSError) as err:
        raise CheckpointError(f"model={model_path}: cannot be read ({err}). Name a model_*.pt of nanochat.") from err
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"model={model_path}: holds no state dict. Name a model_*.pt of nanochat.")
    tensors = {name.removeprefix("_orig_mod."): tensor.float() for name, tensor in state.items()}
    smear = bool(tensors.get("smear_lambda", torch.zeros(1)).any())
    if not smear:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in SMEAR}
    given = {name: sizes[name] for name in SIZES if name in sizes}
    return ModelConfig(**given, smear=smear), tensors
