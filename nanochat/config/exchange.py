"""What others' models are made into here, and how."""

from dataclasses import dataclass
from typing import Literal

from nanochat.config.identity import Identity
from nanochat.config.training import below_least
from nanochat.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A checkpoint as a Hugging Face folder, for transformers, vLLM and all that reads such folders."""

    run_dir: str = "runs/demo"
    """Run directory, a local path or URI."""
    model: str = "sft"
    """Which model: rl, sft, pretrain, or a checkpoint folder."""
    output: str
    """Folder to write, a local path or URI: empty, or not there yet."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights: float32 gives back the checkpoint bit for bit, bfloat16 takes half of the room."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """A model that was trained elsewhere, to go on with here."""

    source: Identity[str]
    """Folder of karpathy/nanochat with model_*.pt and meta_*.json (~/.cache/nanochat/base_checkpoints/d20), or a
    Hugging Face folder with config.json, *.safetensors and tokenizer.json."""
    run_dir: str
    """Run directory to write into, a local path or URI."""
    step: int | None = None
    """karpathy/nanochat: which of the folder's checkpoints; none = the newest."""
    tokenizer: str | None = None
    """karpathy/nanochat: tokenizer.pkl or its folder; none = beside the model, or in the tree that it lies in."""
    stage: Literal["pretrain", "sft"] | None = None
    """What the model is here: pretrain, or sft if it was fine-tuned on conversations; none = as the source says."""

    def __post_init__(self) -> None:
        if found := below_least(self, step=0):
            raise ConfigError(" ".join(found))


@dataclass(frozen=True, kw_only=True)
class ImportedConfig:
    """What config.json has of a stage whose model was imported, in place of the stage's own config."""

    origin: Identity[str]
    """What was imported, and what can be done with it."""
    mixture: tuple[str, ...] = ()
    """Tasks that it was fine-tuned on, as ray_jobs/sft.py names them: none are known."""
