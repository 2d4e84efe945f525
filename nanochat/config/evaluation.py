"""Which models are scored, and on what."""

from dataclasses import dataclass
from typing import Literal

from nanochat.config.training import below_least, not_rates
from nanochat.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Scores of one or more models, each with n and its standard error."""

    models: tuple[str, ...] = ()
    """Models to score: stages of the run directory (pretrain, sft, rl) or checkpoint folders; none = those
    before and after reinforcement learning, or hf."""
    hf: str | None = None
    """Folder of a local `transformers` model to score as well, on CORE."""
    tasks: tuple[str, ...] = ("arithmetic", "identity", "spelling")
    """Tasks to put to the models: NAME, NAME=PATH for files of one's own, then :SPLIT (arithmetic:test_templates)."""
    identity: str | None = None
    """TOML file with the character of the identity task; none = nanochat's own."""
    core: str | None = None
    """Folder of an evaluation bundle: its table of tasks, its baselines, its data."""
    bits_per_byte: bool = False
    """Also measure bits per byte on the run directory's validation shards."""
    max_per_task: int | None = None
    """Score at most this many problems of each task, drawn by the seed (CORE: the first of its own fixed shuffle);
    few-shot examples come from all of them."""
    samples: int = 1
    """Replies to each problem that is answered in words; above 1, pass@k is reported for every power of two up to it,
    and a temperature is needed."""
    temperature: float = 0.0
    """Of the replies; 0 = the likeliest token."""
    max_new_tokens: int = 256
    """Tokens of a reply at most."""
    seed: int = 0
    """Of the draws."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute dtype. What is computed together changes the rounding alone: about 1e-6 of a score in float32."""
    batch_tokens: int | None = None
    """Tokens that are scored together; none = what suits the device."""
    actors: int | None = None
    """Processes that share the work; none = one per GPU, or one on CPU."""
    task_mirror: str | None = None
    """Base URL to download tasks from, as MIRROR/TASK/FILE; none = their public homes."""

    def __post_init__(self) -> None:
        found = below_least(self, max_per_task=1, samples=1, seed=0, max_new_tokens=1, batch_tokens=1, actors=1)
        found += not_rates(self, "temperature")
        if self.samples > 1 and self.temperature == 0:
            found.append(f"samples={self.samples}: replies at temperature 0 are all the same. Set --temperature 1.")
        if self.hf and not self.core:
            found.append(f"hf={self.hf}: a transformers model is scored on CORE alone. Give a bundle with --core.")
        if found:
            raise ConfigError(" ".join(found))
