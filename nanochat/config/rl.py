"""How a chat model is made better at what can be checked: the task, the rollouts, the loss."""

import math
from dataclasses import dataclass
from typing import Literal

from nanochat.config.identity import Identity
from nanochat.config.serving import EngineName
from nanochat.config.training import LearnerConfig, below_least, not_rates, outside_shares
from nanochat.errors import ConfigError

CLIP = {"ppo_clip": (0.2, 0.28), "cispo": (1.0, 4.0), "gspo": (3e-4, 4e-4)}
"""How far below and above 1 the ratio may be. Sources: DAPO; MiniMax-M1, no lower bound; GSPO."""


@dataclass(frozen=True, kw_only=True)
class RLConfig(LearnerConfig):
    """Reinforcement learning; learning rates that are not given are those of the checkpoint it begins from."""

    task: Identity[str] = "gsm8k"
    """What to practise: NAME, NAME=PATH for files of one's own, then :SPLIT (arithmetic:two_step); none = train."""
    held_out: Identity[str | None] = None
    """What to score, in the same form; none = the task's val split."""
    reward: Identity[str | None] = None
    """Function MODULE:NAME(conversation, reply) -> float that judges a reply instead of the task's own rule; 1 or more
    counts as right. What it raises ends the run."""
    task_mirror: str | None = None
    """Base URL to download tasks from, as MIRROR/TASK/FILE; none = their public homes."""
    base: Identity[str | None] = None
    """Checkpoint folder to begin from; none = the newest of the run directory's fine-tuning."""

    num_steps: Identity[int] = 467
    """Updates. nanochat's 467 of 16 groups are one pass over GSM8K's training problems."""
    groups_per_step: Identity[int] = 16
    """Prompts of an update."""
    samples_per_group: Identity[int] = 16
    """Completions of a prompt, which are compared with each other."""
    max_new_tokens: Identity[int] = 256
    """Tokens of a completion at most, what the calculator says included."""
    temperature: Identity[float] = 1.0
    """Of the samples. Every token can be drawn: what top-k or top-p leave out could never be learned from."""
    max_staleness: Identity[int] = 1
    """A sample may be from a policy that is at most so many updates old when it is trained on. 0 = sampling and
    learning take turns, and a run is a function of its config alone."""

    advantage: Identity[Literal["mean", "std", "rloo"]] = "mean"
    """What a reward is compared with: the group's mean, that in standard deviations, or the mean of the others."""
    loss: Identity[Literal["reinforce", "ppo_clip", "cispo", "gspo"]] = "reinforce"
    """How the ratio of the trained policy to the one that sampled is used, and bounded."""
    aggregate: Identity[Literal["token_global", "sequence_mean", "constant"]] = "token_global"
    """Whether tokens or sequences count alike; constant = tokens, divided by as many as an update could have:
    groups_per_step * samples_per_group * max_new_tokens."""
    clip_low: Identity[float | None] = None
    """How far below 1 the ratio may be; none = 0.2 for ppo_clip, 3e-4 for gspo, 1 for cispo."""
    clip_high: Identity[float | None] = None
    """How far above 1 the ratio may be; none = 0.28 for ppo_clip, 4 for cispo, 4e-4 for gspo."""
    tis_cap: Identity[float | None] = 2.0
    """reinforce: weigh tokens by the ratio, at most by this (truncated importance sampling); none = do not. Without
    staleness it is 1, but for what sampling and learning round differently."""
    kl_beta: Identity[float] = 0.0
    """Weight of the KL penalty that holds on to the model it began from; above 0 that stays in memory, too."""
    dynamic_sampling: Identity[bool] = True
    """Fill an update with groups whose rewards differ; the others, without a gradient but kl_beta's, are left out."""
    max_refill: Identity[float] = 3.0
    """dynamic_sampling: sample at most so many times groups_per_step more; then the update has what there is."""
    mask_truncated: Identity[bool] = False
    """Do not train on completions that were cut off at max_new_tokens; their rewards still count for the group."""

    matrix_lr: Identity[float | None] = None
    """Muon's learning rate, before the base model's factor for its batch; none = as the base model's, like the other
    three."""
    embedding_lr: Identity[float | None] = None
    """AdamW's learning rate of the token embedding."""
    unembedding_lr: Identity[float | None] = None
    """AdamW's learning rate of the head."""
    scalar_lr: Identity[float | None] = None
    """AdamW's learning rate of the scalars."""
    first_lr_factor: Identity[float] = 0.1
    """The learning rate at the start, as a share of the base model's peak."""
    warmdown_fraction: Identity[float] = 1.0
    """Share of the updates in which the learning rate falls linearly to zero."""

    warm_start: Identity[bool] = True
    """Begin with the optimiser's moments of the checkpoint: fresh ones move rarely used embeddings at full speed."""

    evaluate_every: int = 60
    """Updates between scores on held-out problems; 0 = only before and after."""
    held_out_problems: Identity[int] = 400
    """Held-out problems that are scored, one greedy reply each."""
    sample_every: int = 10
    """Updates between notes of the best and the worst rollouts; 0 = none."""
    checkpoint_every: int | None = 60
    """Updates between checkpoints; 0 = only at the end, none = as many as lose least time, by what the first costs."""
    compile: Literal["auto", "off"] = "off"
    """torch.compile; off, since rows have many widths and each is compiled anew."""

    def problems(self) -> list[str]:
        """Return a message for each field whose value breaks its rule."""
        found = super().problems()
        found += below_least(
            self, num_steps=1, groups_per_step=1, samples_per_group=2, max_new_tokens=1, max_staleness=0,
            evaluate_every=0, held_out_problems=0, sample_every=0,
        )  # fmt: skip
        found += outside_shares(self, "first_lr_factor", "warmdown_fraction")
        found += not_rates(
            self, "matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "clip_low", "clip_high", "tis_cap",
            "kl_beta", "max_refill",
        )  # fmt: skip
        if self.tis_cap == 0:
            found.append("tis_cap=0: would weigh all tokens by nothing. Leave it out, or say none.")
        if self.loss == "reinforce" and (self.clip_low, self.clip_high) != (None, None):
            found.append("clip_low and clip_high: do nothing with loss=reinforce. Take another loss, or use tis_cap.")
        if self.clip_low is not None and self.clip_low > 1:
            found.append(f"clip_low={self.clip_low}: must be at most 1, where the ratio has no lower bound.")
        if not 0 < self.temperature < math.inf:
            found.append(f"temperature={self.temperature}: must be above 0, or all samples are the same. 1 is good.")
        if self.reward is not None and not all(self.reward.partition(":")):
            found.append(f"reward={self.reward}: must be MODULE:FUNCTION. For example rewards:length_of_reply.")
        return found

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The least and the most that the ratio may be, None = unbounded."""
        if self.loss == "reinforce":
            return None, self.tis_cap
        low, high = CLIP[self.loss]
        low = low if self.clip_low is None else self.clip_low
        high = high if self.clip_high is None else self.clip_high
        return 1 - low, 1 + high

    @property
    def most_groups(self) -> int:
        """Groups that are sampled for an update at most."""
        refilled = round(self.groups_per_step * (1 + self.max_refill), 6)  # 100 * 1.15 is a little less than 115
        return int(refilled) if self.dynamic_sampling else self.groups_per_step


@dataclass(frozen=True, kw_only=True)
class RolloutsConfig:
    """Who samples; none of it changes what is learned, but for rounding."""

    actors: int | None = None
    """Processes that sample; none = one per GPU that the learner leaves, or for every second core of this machine."""
    cpus_per_actor: float = 0.5
    """Logical CPUs that one reserves."""
    gpus_per_actor: float | None = None
    """GPUs that one reserves where the run is on GPUs; none = 1, or a half of the only one."""
    running: int = 64
    """Completions that one works on at a time."""
    backend: EngineName = "native"
    """Who computes them: the engine of this project, or vLLM where it is installed (make vllm, or the extra vllm)."""
    timeout_s: float = 300.0
    """The run ends with an error if no group of samples has come for so long; one reward may take half of it."""

    @property
    def reward_timeout_s(self) -> float:
        """How long a reward function may take for one reply."""
        return self.timeout_s / 2

    def __post_init__(self) -> None:
        found = below_least(self, actors=1, running=1)
        found += [
            f"{name}={value}: must be above 0. Leave it out for the default."
            for name in ("cpus_per_actor", "gpus_per_actor", "timeout_s")
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        if found:
            raise ConfigError(" ".join(found))
