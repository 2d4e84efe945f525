"""How a base model becomes one that answers: the mixture of tasks, and what is not inherited from the base model."""

from dataclasses import dataclass
from typing import Literal

from nanochat.config.identity import Identity
from nanochat.config.training import TrainingConfig, below_least, not_rates, outside_shares


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainingConfig):
    """Supervised fine-tuning; what is not given is taken from the base checkpoint, and shown."""

    mixture: Identity[tuple[str, ...]] = ("arithmetic", "identity", "spelling")
    """Tasks to train on: NAME, NAME=PATH for files of one's own, then *EPOCHS (gsm8k*4) or ~SHARE of the whole
    (smoltalk~0.5). Names: see nanochat/tasks/registry.py; messages=FILE.jsonl is any file of conversations."""
    joined: Identity[float] = 0.0
    """Share of conversations that go on with another of the mixture, so that a change of subject is learned."""
    identity: Identity[str | None] = None
    """TOML file with the character of the identity task: name, maker, facts, tone; none = nanochat's own."""
    malformed: Identity[Literal["error", "drop"]] = "error"
    """What a conversation that breaks the form does: end the run with file and line, or be left out and counted.
    One longer than a row is always left out and counted: cut short, its end would be missing."""
    task_mirror: str | None = None
    """Base URL to download tasks from, as MIRROR/TASK/FILE; none = their public homes."""
    validation_conversations: Identity[int] = 200
    """Conversations of each task for validation: of its val split, or held out, at most a twentieth, from train."""
    base: Identity[str | None] = None
    """Checkpoint folder to begin from; none = the newest of the run directory's pretraining."""

    num_epochs: Identity[float] = 1.0
    """Passes over the packed mixture."""
    num_steps: Identity[int | None] = None
    """Steps; none = from num_epochs."""
    global_batch_tokens: Identity[int | None] = None
    """Tokens of a step over all workers; none = as the base model's."""
    matrix_lr: Identity[float | None] = None
    """Muon's learning rate, before the base model's factor for its batch, which stays; none = as the base model's, like
    the other three."""
    embedding_lr: Identity[float | None] = None
    """AdamW's learning rate of the token embedding."""
    unembedding_lr: Identity[float | None] = None
    """AdamW's learning rate of the head."""
    scalar_lr: Identity[float | None] = None
    """AdamW's learning rate of the scalars."""
    first_lr_factor: Identity[float] = 0.8
    """The learning rate at the start, as a share of the base model's peak."""
    warmdown_fraction: Identity[float] = 0.5
    """Share of the steps in which the learning rate falls linearly to zero."""
    weight_decay: Identity[float] = 0.0
    """Muon's weight decay."""
    warm_start: Identity[bool] = True
    """Begin with the optimiser's moments of the base checkpoint."""
    document_masking: Identity[bool] = True
    """Hide the other conversations of a packed row."""

    chat_problems: int = 32
    """Problems of each task that are put to the model whenever it samples; 0 = none."""

    def problems(self) -> list[str]:
        """Return a message for each field whose value breaks its rule."""
        found = super().problems()
        found += below_least(
            self, validation_conversations=1, num_steps=1, global_batch_tokens=1, chat_problems=0
        )  # fmt: skip
        found += outside_shares(self, "joined", "first_lr_factor", "warmdown_fraction")
        found += not_rates(self, "matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "weight_decay")
        if not self.mixture:
            found.append("mixture=(): must name a task. arithmetic needs no download.")
        if not 0 < self.num_epochs < 1000:
            found.append(f"num_epochs={self.num_epochs}: must lie in (0, 1000). 1 is a good value.")
        return found
