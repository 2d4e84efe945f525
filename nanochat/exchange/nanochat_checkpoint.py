"""karpathy/nanochat's own checkpoints to our model: its parameter names are ours, its dtypes are not.

nanochat saves `model_000123.pt` (a torch state dict, embeddings in bf16) beside `meta_000123.json` with the sizes. It
is read with weights_only=True, so a stranger's file cannot run code. Its code has changed under those names, so which
names are there says how the model computes, and two sets are known: that of 2025-10, which is `architecture=stock` with
torch's own epsilon, and that of today. What is neither was computed in a way that nothing in the file tells.

Sources: nanochat checkpoint_manager.py, and gpt.py of 2025-10 and @92d63d4.
Not covered: versions between the two, and its optimiser state.
"""

import pickletools
import re
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import storage
from nanochat.config.model import STOCK, ModelConfig
from nanochat.errors import CheckpointError, ConfigError, excerpt
from nanochat.exchange.hf_model import DTYPES, LONGEST_PATTERN, is_vocabulary
from nanochat.model.gpt import GPT

SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
LARGEST_SIZE = 1 << 24
LARGEST_META_BYTES = 1 << 20
NAMES_CALLS = ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4")
ADMITTED = re.compile(
    r"collections OrderedDict|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)|torch [A-Za-z0-9]+Storage"
)
"""What a state dict's pickle names: nothing that makes memory out of a number."""
SMEAR = ("smear_gate.weight", "smear_lambda")
ADDED = ("value_embeds.", "resid_lambdas", "x0_lambdas", "backout_lambda", "smear_")
"""How the names begin that nanochat has today and had not in 2025-10; so does that of a value embedding's gate."""


def load_nanochat_checkpoint(model_path: str, meta_path: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return config and float32 parameters of a nanochat checkpoint; smear is on if its scalar is not zero.

    Rows that pad the vocabulary are untrained there and zero here.
    Raises: CheckpointError if the file is no state dict of tensors, its sizes are missing, or a tensor is not as one of
    the two versions has it.
    """
    sizes = _sizes(meta_path)
    tensors = _state_dict(model_path)
    layers = {name.split(".")[2] for name in tensors if name.startswith("transformer.h.")}
    if len(layers) != sizes["n_layer"]:
        raise CheckpointError(
            f"n_layer={sizes['n_layer']}: {model_path} has {len(layers)} layers. Name the meta_*.json of this model."
        )
    try:
        config = _config(sizes, tensors)
    except ConfigError as err:
        raise CheckpointError(f"meta={meta_path}: {err}") from err
    _refuse_other_tensors(model_path, tensors, config)
    tensors = {name: _fitted(model_path, name, tensor, config) for name, tensor in tensors.items()}
    if config.smear and not tensors["smear_lambda"].any():
        tensors = {name: tensor for name, tensor in tensors.items() if name not in SMEAR}
        config = ModelConfig(**sizes)
    return config, tensors


def version_of(config: ModelConfig) -> str:
    """Return which nanochat a config is of."""
    return "today" if config.value_embeddings else "2025-10"


def _sizes(path: str) -> dict[str, Any]:
    """Return the sizes, and the window pattern if there is one, out of a meta file."""
    if not storage.exists(path) or storage.size_bytes(path) > LARGEST_META_BYTES:
        raise CheckpointError(f"meta={path}: is no meta_*.json of nanochat. It must lie beside the model_*.pt.")
    try:
        content = storage.read_json(path)
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"meta={path}: is no JSON ({excerpt(err.__cause__ or err)}). Fetch it again.") from err
    found = content.get("model_config") if isinstance(content, dict) else None
    found = found if isinstance(found, dict) else {}
    for name in SIZES:
        if name not in found:
            raise CheckpointError(f"meta={path}: lacks model_config.{name}. Name the meta_*.json of this model.")
        if type(found[name]) is not int or not 0 < found[name] <= LARGEST_SIZE:
            raise CheckpointError(
                f"meta={path}: has model_config.{name}={excerpt(found[name])}, which is no size. "
                "Name the meta_*.json of this model."
            )
    if unknown := sorted(found.keys() - {*SIZES, "window_pattern"}):
        raise CheckpointError(
            f"meta={path}: has model_config.{excerpt(unknown[0])}, which karpathy/nanochat has not. "
            "How such a model computes is not known here."
        )
    pattern = found.get("window_pattern", "")
    if not isinstance(pattern, str) or len(pattern) > LONGEST_PATTERN:
        raise CheckpointError(
            f"meta={path}: has model_config.window_pattern={excerpt(pattern)}, which is no pattern. "
            "Name the meta_*.json of this model."
        )
    return found


def _state_dict(path: str) -> dict[str, Tensor]:
    """Return the tensors of a file as it has them."""
    try:
        with storage.open_read(path) as file:
            _check_archive(file, storage.size_bytes(path))
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as err:  # of a damaged file each part of torch says so with another class
        raise CheckpointError(f"model={path}: cannot be read ({excerpt(err)}). Name a model_*.pt of nanochat.") from err
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise CheckpointError(f"model={path}: holds no state dict. Name a model_*.pt of nanochat.")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in DTYPES:
            raise CheckpointError(f"model={path}: {excerpt(name)} is {tensor.dtype}, no plain tensor of floats.")
    if sum(tensor.nbytes for tensor in state.values()) > storage.size_bytes(path):
        raise CheckpointError(f"model={path}: its tensors are larger than the file. Fetch it again.")
    return {name.removeprefix("_orig_mod."): tensor.detach() for name, tensor in state.items()}


def _check_archive(file: IO[bytes], size: int) -> None:
    """Raise ValueError if a small file could fill the memory before its tensors are seen.

    torch.save packs nothing and writes each part once; of the calls that weights_only admits, bytearray(10**12) is one.
    Asked is torch's own reader: another, as Python's, may find other parts in the same file.
    """
    reader: Any = torch._C.PyTorchFileReader(file)
    if sum(map(reader.get_record_size, reader.get_all_records())) > size:
        raise ValueError("it is packed, or its parts overlap")
    for opcode, argument, _ in pickletools.genops(reader.get_record("data.pkl")):
        if opcode.name in NAMES_CALLS and not ADMITTED.fullmatch(str(argument)):
            raise ValueError(f"it names {argument or opcode.name}")


def _config(sizes: dict[str, Any], tensors: dict[str, Tensor]) -> ModelConfig:
    """Return the config of the version that the names are of, smear on if it has that part."""
    is_today = "window_pattern" in sizes or any(name.startswith(ADDED) or "ve_gate" in name for name in tensors)
    if not is_today:
        return ModelConfig(**sizes | STOCK | {"norm_eps": None})
    if "window_pattern" not in sizes:
        raise ConfigError("lacks model_config.window_pattern, which the nanochat that has these tensors writes.")
    return ModelConfig(**sizes, smear=True)


def _refuse_other_tensors(path: str, tensors: dict[str, Tensor], config: ModelConfig) -> None:
    """Raise CheckpointError naming a tensor that the version has and the file not, or the reverse, or of other shape.

    Of a padded vocabulary the padding may be missing.
    """
    with torch.device("meta"):
        expected = {name: tuple(one.shape) for name, one in GPT(config).named_parameters()}
    remedy = f"It is not as nanochat of {version_of(config)} has it; how others compute, a file does not tell."
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in expected:
            raise CheckpointError(f"model={path}: has a tensor {excerpt(name)}. {remedy}")
        if name not in tensors:
            raise CheckpointError(f"model={path}: lacks the tensor {name}. {remedy}")
        shape, whole = tuple(tensors[name].shape), expected[name]
        unpadded = (config.vocab_size, *whole[1:]) if is_vocabulary(name) else whole
        if shape not in (whole, unpadded):
            raise CheckpointError(f"model={path}: {name} is of shape {shape}, must be {whole}. {remedy}")


def _fitted(path: str, name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Return a tensor in float32, a vocabulary padded with zeros. Raises: CheckpointError if it holds no numbers."""
    exact = tensor.float()
    if is_vocabulary(name):
        exact = F.pad(exact[: config.vocab_size], (0, 0, 0, config.padded_vocab_size - config.vocab_size))
    if not exact.isfinite().all():
        raise CheckpointError(f"model={path}: {name} is not finite. The training had failed; name an earlier step.")
    return exact
