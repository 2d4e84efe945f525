"""The whole line at once: every stage's config, which of them run, where, and what a node costs."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from nanochat.config.cluster import ClusterConfig
from nanochat.config.corpus import CorpusConfig
from nanochat.config.evaluation import EvaluationConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.replicas import ReplicasConfig
from nanochat.config.rl import RLConfig, RolloutsConfig
from nanochat.config.sft import SftConfig
from nanochat.config.shards import ShardsConfig
from nanochat.config.tokenizer import TokenizerConfig
from nanochat.errors import ConfigError

Stage = Literal["data", "pretrain", "sft", "rl", "evaluate", "serve"]
STAGES: tuple[Stage, ...] = get_args(Stage)
SMOKE_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class LineConfig:
    """From text to a chat model that is scored, and served if asked for; a stage that is complete is passed over."""

    run_dir: str
    """Run directory, a local path or URI."""
    stages: tuple[Stage, ...] = STAGES[:-1]
    """What is done, in the line's order; serve goes on until Ctrl-C."""
    smoke: bool = False
    """First go through all stages but serve in `run_dir`/smoke with ten steps each, on the same nodes."""
    price: tuple[str, ...] = ()
    """Price of a node-hour as KIND=PRICE, for the report; the kind is the node's label `work`, or else: node."""
    port: int = 0
    """Port of the endpoint; 0 = 8000, or any where that is taken."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    rollouts: RolloutsConfig = field(default_factory=RolloutsConfig)
    score_base: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How the base model is scored."""
    score_chat: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How the chat models are scored, each that there is."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    rl_workers: int | None = None
    """Processes that learn in rl; none = as many as train in the stages before."""
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError(f"stages=(): must name one of {', '.join(STAGES)}. Leave it out for all but serve.")
        if self.rl_workers is not None and self.rl_workers < 1:
            raise ConfigError(f"rl_workers={self.rl_workers}: must be at least 1. Leave it out for the default.")
        self.prices()

    def prices(self) -> dict[str, float]:
        """Return the price of a node-hour for each kind of node. Raises: ConfigError for one that is no price."""
        found = {}
        for text in self.price:
            kind, _, amount = text.partition("=")
            try:
                found[kind] = float(amount)
            except ValueError:
                found[kind] = math.nan
            if not (kind and 0 <= found[kind] < math.inf):
                raise ConfigError(f"price={text}: must be KIND=PRICE, dollars for an hour. For example train=98.32")
        return found


def smoke_of(line: LineConfig) -> LineConfig:
    """Return ten steps of every stage, on the same nodes, in a folder beside the real ones.

    Models, batches and rows are the real ones, or memory and speed would not be seen; what pretraining reads, and what
    is validated and scored, is little. The mixture is loaded whole.
    """
    few = {
        "num_steps": SMOKE_STEPS, "checkpoint_every": SMOKE_STEPS // 2, "keep_checkpoints": 1, "sample_every": 0,
        "evaluate_every": 0,
    }  # fmt: skip
    least = 2 * line.shards.sequence_len
    tokenizer = replace(line.tokenizer, max_chars=min(line.tokenizer.max_chars, 20_000_000))
    scores = {"max_per_task": 8}
    return replace(
        line,
        run_dir=f"{line.run_dir.rstrip('/')}/smoke", smoke=False,
        stages=tuple(stage for stage in line.stages if stage != "serve"),
        tokenizer=tokenizer,
        pretrain=replace(line.pretrain, validation_tokens=least, **few),
        sft=replace(line.sft, validation_tokens=least, chat_problems=min(line.sft.chat_problems, 2), **few),
        rl=replace(line.rl, held_out_problems=min(line.rl.held_out_problems, 16), **few),
        score_base=replace(line.score_base, **scores),
        score_chat=replace(line.score_chat, **scores),
    )  # fmt: skip
