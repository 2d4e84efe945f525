"""Config and weights of a model to Hugging Face's files and back: the part of a folder that has no words in it.

`architecture=stock` is transformers' own `NanoChatForCausalLM`, which unmodified transformers and vLLM load. Any other
model keeps our parameter names under a model type of its own: `modeling_nanochat.py` is its code for transformers,
`nanochat/inference/vllm_model.py` the one for vLLM. Rows that pad the vocabulary stay here: they are untrained, and
others would sample their ids. Both ways the bits of all other rows are the same.

Not covered: smear, which neither target has a place for; writing shards of 5 GB (nanochat's models are small).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from nanochat import storage
from nanochat.config.model import STOCK, ModelConfig
from nanochat.errors import CheckpointError, ConfigError, excerpt
from nanochat.model.gpt import GPT
from nanochat.model.transformers_names import from_transformers, is_stock, to_transformers, transformers_config

MODEL_TYPE = "nanochat_on_ray"
ARCHITECTURE = "NanochatOnRayForCausalLM"
CODE = "modeling_nanochat"
STOCK_TYPE, STOCK_ARCHITECTURE = "nanochat", "NanoChatForCausalLM"
SUMS = "SHA256SUMS"
"""Of the weights, as `sha256sum -c` reads it; a folder without it is read as well."""
LARGEST_JSON_BYTES = 1 << 26
LARGEST = {
    "sequence_len": 1 << 20, "vocab_size": 1 << 20, "n_layer": 1 << 9, "n_head": 1 << 9, "n_kv_head": 1 << 9,
    "n_embd": 1 << 15,
}  # fmt: skip
"""Of a stranger's config: what it says is built before it is compared with the weights."""
LONGEST_PATTERN = 1 << 8
LARGEST_FACTOR = {"rope_theta": 1e12, "qk_gain": 1e3, "norm_eps": 1.0, "logit_softcap": 1e3}
ABOVE_ZERO = ("norm_eps", "rope_theta", "logit_softcap", "qk_gain")
THEIRS = {
    "sequence_len": "max_position_embeddings", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "norm_eps": "rms_norm_eps",
    "logit_softcap": "final_logit_softcapping",
}  # fmt: skip
"""What `NanoChatConfig` calls our fields, where it has another name."""
NOT_HERE = {
    "quantization_config": (), "sliding_window": (), "partial_rotary_factor": (1, 1.0),
}  # fmt: skip
"""Fields of other models' configs that change what is computed, and the values that change nothing."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of weights that are read; float32 holds the values of each."""


def check_exportable(config: ModelConfig) -> None:
    """Raise ConfigError if a model has a part that no target can do."""
    if config.smear:
        raise ConfigError(
            "smear=True: neither transformers nor vLLM gives a model the token before a chunk, so answers would be "
            "wrong without a word. Serve it with the native backend, or train with --smear False."
        )


def own_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return what config.json says of a model of our own type, without what its tokenizer decides."""
    return {
        "model_type": MODEL_TYPE, "architectures": [ARCHITECTURE],
        "auto_map": {"AutoConfig": f"{CODE}.NanochatOnRayConfig", "AutoModelForCausalLM": f"{CODE}.{ARCHITECTURE}"},
        "dtype": str(dtype).removeprefix("torch."), **asdict(config), "windows": config.windows,
        "head_dim": config.head_dim,
    }  # fmt: skip


def own_tensors(tensors: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a model of our own type: under our names, without padding.

    Raises: CheckpointError if one is missing, or there is another.
    """
    with torch.device("meta"):
        expected = {name for name, _ in GPT(config).named_parameters()}
    if different := sorted(expected ^ tensors.keys()):
        raise CheckpointError(f"weights: {different[0]} is missing or not of this model. Use the whole checkpoint.")
    return {
        name: (one[: config.vocab_size] if is_vocabulary(name) else one).to(dtype).contiguous()
        for name, one in tensors.items()
    }


def write_model(folder: str, content: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write weights, then config.json."""
    with storage.atomic_write(storage.join(folder, "model.safetensors")) as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    storage.write_json(storage.join(folder, "config.json"), content)


def stock_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the same for `NanoChatForCausalLM`."""
    return {
        "model_type": STOCK_TYPE, "architectures": [STOCK_ARCHITECTURE], "dtype": str(dtype).removeprefix("torch."),
        **transformers_config(config),
    }  # fmt: skip


def exported_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of config.json that others can do most with. Raises: ConfigError as `check_exportable`."""
    check_exportable(config)
    return stock_config(config, dtype) if is_stock(config) else own_config(config, dtype)


def exported_tensors(tensors: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights that belong to `exported_config`."""
    if not is_stock(config):
        return own_tensors(tensors, config, dtype)
    return {name: one.to(dtype).contiguous() for name, one in to_transformers(tensors, config).items()}


def read_object(folder: str, name: str) -> dict[str, Any]:
    """Return a JSON object of a folder. Raises: CheckpointError if it is not there or is none."""
    path = storage.join(folder, name)
    if not storage.exists(path):
        raise CheckpointError(f"source={folder}: has no {name}. Name a whole folder as Hugging Face's tools write it.")
    if storage.size_bytes(path) > LARGEST_JSON_BYTES:
        raise CheckpointError(f"source={path}: is larger than {LARGEST_JSON_BYTES} bytes. Fetch it again.")
    try:
        content = storage.read_json(path)
    except OSError as err:
        raise CheckpointError(f"source={path}: cannot be read ({excerpt(err)}). Fetch it again.") from err
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"source={path}: is no JSON ({excerpt(err.__cause__ or err)}). Fetch it again.") from err
    if not isinstance(content, dict):
        raise CheckpointError(f"source={path}: must hold an object. Fetch it again.")
    return content


def read_model(folder: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return our config and float32 weights under our names, the vocabulary padded with zeros.

    Raises: CheckpointError or ConfigError naming the file, field or tensor that does not fit.
    """
    content = read_object(folder, "config.json")
    kind = content.get("model_type")
    if kind not in (MODEL_TYPE, STOCK_TYPE):
        raise CheckpointError(
            f"source={folder}: config.json has model_type={excerpt(kind)}, must be {STOCK_TYPE} or {MODEL_TYPE}. "
            "Name a folder of a NanoChat model."
        )
    config = _own_config(folder, content) if kind == MODEL_TYPE else _stock_config(folder, content)
    return config, _fitted(folder, _tensors(folder), config, kind == STOCK_TYPE)


def _own_config(folder: str, content: dict[str, Any]) -> ModelConfig:
    given = {one.name: content[one.name] for one in fields(ModelConfig) if one.name in content}
    config = _made(folder, given)
    if content.get("windows", config.windows) != config.windows:
        raise CheckpointError(
            f"source={folder}: config.json has windows={excerpt(content['windows'])}, must be {config.windows} by "
            "window_pattern. Fetch it again."
        )
    return config


def _stock_config(folder: str, content: dict[str, Any]) -> ModelConfig:
    """Return our config for `NanoChatConfig`'s fields. Raises: ConfigError for a value that we have no part for."""
    ropes = {name: content[name] for name in ("rope_scaling", "rope_parameters") if content.get(name) is not None}
    for name, rope in ropes.items():
        if not isinstance(rope, dict):
            raise CheckpointError(f"source={folder}: config.json has {name}={excerpt(rope)}, must be an object.")
    theta = next((rope["rope_theta"] for rope in ropes.values() if "rope_theta" in rope), content.get("rope_theta"))
    theirs = {"vocab_size": 50304, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 6,
              "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "final_logit_softcapping": 15.0}  # fmt: skip
    value = {name: content.get(name, default) for name, default in theirs.items()}
    if absent := [name for name in theirs if value[name] is None]:
        raise CheckpointError(
            f"source={folder}: config.json has {absent[0]}=None, must be a number. Name another model."
        )
    kv_heads = content.get("num_key_value_heads")
    given = STOCK | {
        "sequence_len": value["max_position_embeddings"], "vocab_size": value["vocab_size"],
        "n_layer": value["num_hidden_layers"], "n_head": value["num_attention_heads"], "n_embd": value["hidden_size"],
        "n_kv_head": value["num_attention_heads"] if kv_heads is None else kv_heads,
        "rope_theta": STOCK["rope_theta"] if theta is None else theta,
        "norm_eps": value["rms_norm_eps"], "logit_softcap": value["final_logit_softcapping"],
    }  # fmt: skip
    config = _made(folder, given, THEIRS)
    wanted = transformers_config(config)
    for name in ("intermediate_size", "hidden_act", "attention_bias", "tie_word_embeddings"):
        if content.get(name, wanted[name]) != wanted[name]:
            raise ConfigError(f"{name}={excerpt(content[name])}: must be {wanted[name]} here. Name another model.")
    known = {"rope_theta": config.rope_theta, "rope_type": "default", "type": "default"}
    for name, value in (item for rope in ropes.values() for item in rope.items()):
        if name not in known or value != known[name]:
            raise ConfigError(f"rope: {excerpt(name)}={excerpt(value)}: positions are turned otherwise here. "
                              "Name another model.")  # fmt: skip
    for name, none in NOT_HERE.items():
        if content.get(name) not in (None, *none):
            raise ConfigError(f"{name}={excerpt(content[name])}: there is no such thing here. Name another model.")
    types = content.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(one != "full_attention" for one in types)):
        raise ConfigError(f"layer_types={excerpt(types)}: must be full_attention here. Name another model.")
    if content.get("head_dim") not in (None, config.head_dim):
        raise ConfigError(f"head_dim={excerpt(content['head_dim'])}: must be {config.head_dim}. Name another model.")
    return config


def _made(folder: str, given: dict[str, Any], spelled: Mapping[str, str] = MappingProxyType({})) -> ModelConfig:
    defaults = asdict(ModelConfig())
    for name, value in given.items():
        said = f"source={folder}: config.json has {spelled.get(name, name)}={excerpt(repr(value))}, must be"
        expected = float if name == "norm_eps" else type(defaults[name])
        fits = isinstance(value, expected) or (expected is float and isinstance(value, int))
        if (isinstance(value, bool) and expected is not bool) or not (fits or (name == "norm_eps" and value is None)):
            raise CheckpointError(f"{said} {expected.__name__}. Fetch it again.")
        if isinstance(value, int | float) and name in LARGEST_FACTOR:
            if not abs(value) <= LARGEST_FACTOR[name]:
                raise CheckpointError(f"{said} at most {LARGEST_FACTOR[name]:g}. Fetch it again.")
            if name in ABOVE_ZERO and value <= 0:
                raise CheckpointError(f"{said} above 0. Fetch it again.")
        if isinstance(value, str) and len(value) > LONGEST_PATTERN:
            raise CheckpointError(f"{said} at most {LONGEST_PATTERN} letters. Name another model.")
        if isinstance(value, int) and name in LARGEST and not 0 < value <= LARGEST[name]:
            raise CheckpointError(f"{said} 1 to {LARGEST[name]}. Name another model.")
    return ModelConfig(**given)


def _tensors(folder: str) -> dict[str, Tensor]:
    """Return the tensors of all files of weights."""
    names = {"model.safetensors"}
    if storage.exists(storage.join(folder, "model.safetensors.index.json")):
        index = read_object(folder, "model.safetensors.index.json").get("weight_map")
        names = {str(name) for name in index.values()} if isinstance(index, dict) else set()
    tensors, sums = {}, _sums(folder)
    for name in sorted(names):
        path = storage.join(folder, name)
        if "/" in name or not name.endswith(".safetensors") or not storage.exists(path):
            raise CheckpointError(f"source={folder}: has no weights {excerpt(name)}. Fetch all files of the model.")
        try:
            with storage.open_read(path) as file:
                data = file.read()
            if name in sums and hashlib.sha256(data).hexdigest() != sums[name]:
                raise CheckpointError(
                    f"source={path}: is not what {SUMS} says. Fetch it again; if you changed it, delete {SUMS}."
                )
            tensors |= load(data)
        except (SafetensorError, ValueError, OSError) as err:
            raise CheckpointError(f"source={path}: cannot be read ({excerpt(err)}). Fetch it again.") from err
    return tensors


def write_sums(folder: str) -> None:
    """Write the hash of the weights in a folder."""
    name = "model.safetensors"
    with storage.atomic_write(storage.join(folder, SUMS)) as file:
        file.write(f"{storage.sha256_file(storage.join(folder, name))}  {name}\n".encode())


def _sums(folder: str) -> dict[str, str]:
    """Return the hash that a folder has of each file, none where it has none."""
    path = storage.join(folder, SUMS)
    if not storage.exists(path) or storage.size_bytes(path) > LARGEST_JSON_BYTES:
        return {}
    try:
        with storage.open_read(path) as file:
            lines = file.read().decode().splitlines()
    except (OSError, ValueError) as err:
        raise CheckpointError(f"source={path}: cannot be read ({excerpt(err)}). Fetch it again.") from err
    return {name.lstrip(" *"): digest for digest, _, name in (line.partition(" ") for line in lines)}


def _fitted(folder: str, found: dict[str, Tensor], config: ModelConfig, stock: bool) -> dict[str, Tensor]:
    """Return tensors under our names, padded. Raises: CheckpointError naming what is missing, unknown or misshapen."""
    with torch.device("meta"):
        own = {name: tensor for name, tensor in GPT(config).named_parameters()}
    expected = to_transformers(own, config) if stock else own_tensors(own, config, torch.float32)
    for name in sorted(expected.keys() | found.keys()):
        if name not in expected:
            raise CheckpointError(f"source={folder}: has a tensor {excerpt(name)} that this architecture lacks.")
        if name not in found:
            raise CheckpointError(f"source={folder}: lacks the tensor {name}. Fetch all files of the model.")
        if found[name].shape != expected[name].shape:
            raise CheckpointError(
                f"source={folder}: {name} is of shape {tuple(found[name].shape)}, must be "
                f"{tuple(expected[name].shape)} by config.json."
            )
        if found[name].dtype not in DTYPES or not found[name].isfinite().all():
            raise CheckpointError(f"source={folder}: {name} must hold finite floating-point numbers. Name another.")
    floats = {name: tensor.float() for name, tensor in found.items()}
    if stock:
        return from_transformers(floats, config)
    spare = config.padded_vocab_size - config.vocab_size
    return {name: F.pad(one, (0, 0, 0, spare)) if is_vocabulary(name) else one for name, one in floats.items()}


def is_vocabulary(name: str) -> bool:
    """Tell whether a parameter, by our name, has a row for each token."""
    return name in ("transformer.wte.weight", "lm_head.weight") or name.startswith("value_embeds.")
