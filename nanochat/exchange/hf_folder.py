"""A checkpoint to a folder that Hugging Face's tools read, and such a folder back to a checkpoint's parts.

Beside config and weights (`hf_model.py`) lie the tokenizer and its chat template (`hf_tokenizer.py`), how to sample,
the model card, and for what transformers does not know the code (`modeling_nanochat.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources

import torch
from torch import Tensor

from nanochat import storage
from nanochat.config.exchange import ExportConfig
from nanochat.config.model import ModelConfig
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import CheckpointError, ConfigError, excerpt
from nanochat.exchange.hf_model import (
    CODE,
    MODEL_TYPE,
    SUMS,
    check_exportable,
    exported_config,
    exported_tensors,
    read_model,
    read_object,
    write_model,
    write_sums,
)
from nanochat.exchange.hf_tokenizer import chat_template, tokenizer_config, tokenizer_from_json, tokenizer_json
from nanochat.exchange.model_card import model_card
from nanochat.model.transformers_names import is_stock
from nanochat.training.checkpoint import config_of, named_checkpoint, tokenizer_of

UNFINISHED = "export_unfinished"
"""A file that is there as long as an export is being written: what one that was ended has left is written again."""
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", f"{CODE}.py",
         "README.md", "model.safetensors", "config.json", SUMS)  # fmt: skip
"""All that an export may write."""
KIND = "nanochat_on_ray"
"""The key in config.json under which is said what a model can do that its architecture does not tell."""
SAMPLING = {
    "temperature": (0, 2), "top_k": (0, 1 << 20), "top_p": (1e-6, 1), "min_p": (0, 1), "repetition_penalty": (0.01, 10),
}  # fmt: skip
"""What a checkpoint says of sampling where a request does not, and within which bounds."""


@dataclass(frozen=True)
class HfModel:
    """What such a folder holds."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    """float32, under our names, the vocabulary padded with zeros."""
    tokenizer: Tokenizer
    is_chat: bool
    """Whether it was fine-tuned on conversations."""
    generation: dict[str, float] = field(default_factory=dict)
    """Sampling parameters where a request names none."""


def write_folder(
    folder: str, config: ModelConfig, tensors: Mapping[str, Tensor], tokenizer: Tokenizer, *, is_chat: bool,
    generation: Mapping[str, float], dtype: torch.dtype = torch.float32, card: str | None = None,
) -> None:  # fmt: skip
    """Write all files, weights last. Raises: ConfigError if the model cannot be exported."""
    content = exported_config(config, dtype)
    end = tokenizer.special("<|assistant_end|>") if is_chat else tokenizer.bos
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": end, "pad_token_id": tokenizer.bos}
    sampling = {name: generation[name] for name in SAMPLING if name in generation}
    objects = {
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": tokenizer_config(tokenizer, config.sequence_len, is_chat),
        "generation_config.json": ids
        | {"eos_token_id": sorted({end, tokenizer.bos})}
        | ({"do_sample": sampling["temperature"] > 0} if "temperature" in sampling else {})
        | sampling,
    }
    texts = {"chat_template.jinja": chat_template()} if is_chat else {}
    if content["model_type"] == MODEL_TYPE:
        texts[f"{CODE}.py"] = resources.files("nanochat.exchange").joinpath(f"{CODE}.py").read_text("utf-8")
    if card is not None:
        texts["README.md"] = card
    for name, one in objects.items():
        storage.write_json(storage.join(folder, name), one)
    for name, text in texts.items():
        with storage.atomic_write(storage.join(folder, name)) as file:
            file.write(text.encode())
    write_model(folder, content | ids | {KIND: {"is_chat": is_chat}}, exported_tensors(tensors, config, dtype))
    write_sums(folder)


def export_checkpoint(config: ExportConfig, note: Callable[[str], None]) -> str:
    """Write the folder that a config asks for and return its path; `note` hears of damaged checkpoints.

    Raises: CheckpointError if there is no such model; ConfigError if it cannot be exported, or the folder holds files.
    """
    checkpoint = named_checkpoint(config.run_dir, config.model, note)
    tokenizer = Tokenizer.load(tokenizer_of(config.run_dir, checkpoint.folder))
    model = config_of(checkpoint, tokenizer)
    check_exportable(model)
    folder = storage.absolute(config.output)
    found = storage.list_names(folder)
    if found and not any(name.startswith(UNFINISHED) for name in found):
        raise ConfigError(f"output={folder}: holds {found[0]} already. Name another folder with --output.")
    card = model_card(config.run_dir, checkpoint, is_stock(model))
    try:
        storage.write_json(storage.join(folder, UNFINISHED), {})
        for name in found:  # of an export that was ended, perhaps of another model
            if name in FILES or name.endswith(".partial"):
                storage.remove(storage.join(folder, name))
        write_folder(
            folder, model, checkpoint.model_tensors(), tokenizer, is_chat=checkpoint.is_chat,
            generation=checkpoint.generation, dtype=getattr(torch, config.dtype), card=card,
        )  # fmt: skip
        storage.remove(storage.join(folder, UNFINISHED))
    except OSError as err:
        raise ConfigError(
            f"output={folder}: cannot be written ({excerpt(err)}). Make room there and run the same command again, or "
            "name another folder."
        ) from err
    return folder


def read_folder(folder: str) -> HfModel:
    """Return what a folder of a NanoChat model holds, ours or transformers' own; nothing in it is run.

    Raises: CheckpointError, ConfigError or DataError naming the file, field or tensor that does not fit.
    """
    if UNFINISHED in storage.list_names(folder):
        raise CheckpointError(f"source={folder}: is of an export that was ended. Run export.py again, as before.")
    config, tensors = read_model(folder)
    tokenizer = tokenizer_from_json(read_object(folder, "tokenizer.json"), storage.join(folder, "tokenizer.json"))
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"vocab_size={config.vocab_size}: the tokenizer in {folder} has {tokenizer.vocab_size} tokens. "
            "Both must be of one model."
        )
    told = read_object(folder, "config.json").get(KIND)
    has_template = storage.exists(storage.join(folder, "chat_template.jinja"))
    is_chat = bool(told.get("is_chat")) if isinstance(told, dict) else has_template
    return HfModel(config, tensors, tokenizer, is_chat, _generation(folder))


def _generation(folder: str) -> dict[str, float]:
    if not storage.exists(storage.join(folder, "generation_config.json")):
        return {}
    content = read_object(folder, "generation_config.json")
    found = {name: content[name] for name in SAMPLING if content.get(name) is not None}
    if content.get("do_sample") is False:
        found["temperature"] = 0.0
    for name, value in found.items():
        low, high = SAMPLING[name]
        is_number = isinstance(value, int if name == "top_k" else int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            raise CheckpointError(
                f"source={folder}: generation_config.json has {name}={excerpt(value)}, must be a number from {low} to "
                f"{high}. Mend it, or delete the file."
            )
    return found
