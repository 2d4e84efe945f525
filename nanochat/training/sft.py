"""A base model and packed conversations to a model that answers: the training loop, on what the assistant says.

Begins with the base checkpoint's parameters and, warm, its optimiser's moments. Loss and validation count the tokens
that `conversations.supervised` names; conversations of one row do not see each other.

Sources: recipe: karpathy/nanochat chat_sft.py@92d63d4. What is not given follows from the base checkpoint.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nanochat.config import generation
from nanochat.config.model import ModelConfig
from nanochat.config.sft import SftConfig
from nanochat.data.conversations import Conversation, exchange, supervised
from nanochat.errors import ConfigError, TokenizerMismatchError
from nanochat.evaluation.chat import answer, judge
from nanochat.inference.load import inference_copy
from nanochat.model import scaling
from nanochat.model.optimizer import StepSchedule
from nanochat.run_context import RunContext
from nanochat.tasks.task import Task
from nanochat.training import plan as planning
from nanochat.training.checkpoint import Checkpoint, load_parameters
from nanochat.training.loop import TrainingInputs, TrainingLoop
from nanochat.training.plan import Plan

SAMPLE_QUESTIONS = ("Who are you?", "What is 37 + 58?", "Why is the sky blue?")
MUON_MOMENTUM = 0.90
"""Where the base model's schedule ends."""


@dataclass(frozen=True)
class SftInputs(TrainingInputs):
    """What fine-tuning reads."""

    base: Checkpoint
    """The checkpoint to begin from."""
    held_out: Sequence[Task]
    """The mixture's tasks, of each the conversations held out."""


@dataclass(frozen=True)
class SftPlan:
    """What a run trains, resolved against its base checkpoint."""

    plan: Plan
    rates: scaling.LearningRates
    inherited: dict[str, Any]
    """Values that were not given, and are the base model's."""


def resolve_sft(config: SftConfig, base: Checkpoint, rows_per_epoch: int) -> SftPlan:
    """Return the whole plan; the base may itself be fine-tuned.

    Raises: ConfigError if the batch is no whole number of rows; CheckpointError if the checkpoint does not say how it
    was trained.
    """
    state, rates, inherited = planning.inherited_rates(config, base)
    before, model = state["plan"], ModelConfig(**state["model"])
    batch = config.global_batch_tokens
    if batch is None:
        batch = inherited["global_batch_tokens"] = before["rows_per_step"] * model.sequence_len
    if batch % model.sequence_len:
        raise ConfigError(
            f"global_batch_tokens={batch}: must be a multiple of the row's {model.sequence_len} tokens. "
            f"{max(1, batch // model.sequence_len) * model.sequence_len} is one."
        )
    rows = batch // model.sequence_len
    plan = Plan(
        model=model,
        num_steps=config.num_steps or max(1, int(config.num_epochs * rows_per_epoch) // rows),
        rows_per_step=rows,
        lr_factor=before["lr_factor"],
        weight_decay=config.weight_decay,
        flops_per_token=before["flops_per_token"],
    )
    return SftPlan(plan, rates, inherited)


def finetune(config: SftConfig, run: RunContext, inputs: SftInputs) -> Checkpoint | None:
    """Fine-tune until the last step or until asked to stop; returns the last checkpoint if it is reached.

    Raises: as `TrainingLoop.train`.
    """
    return FineTuning(config, run, inputs).train()


class FineTuning(TrainingLoop[SftConfig]):
    """From a base checkpoint, what the assistant says as targets."""

    generation = generation.CHAT

    def __init__(self, config: SftConfig, run: RunContext, inputs: SftInputs) -> None:
        resolved = resolve_sft(config, inputs.base, inputs.shards.rows("train"))
        super().__init__(
            config, run, inputs, resolved.plan, resolved.rates, document_masking=config.document_masking,
            supervised=functools.partial(supervised, inputs.tokenizer),
        )  # fmt: skip
        self.base, self.held_out = inputs.base, inputs.held_out
        self.updates_before = inputs.base.state["updates"] if config.warm_start else 0

    def begin(self) -> None:
        """Load the base checkpoint. Raises: TokenizerMismatchError if it was trained with another tokenizer."""
        base = self.base
        if base.state["tokenizer_hash"] != self.tokenizer.hash:
            raise TokenizerMismatchError(
                f"base={base.folder}: was trained with another tokenizer. Use the run directory that it comes from."
            )
        load_parameters(self.model, base.model_tensors(), base.folder)
        if self.config.warm_start:
            base.optimizer_tensors(self.optimizer.state_tensors())

    def stage_state(self) -> dict[str, Any]:
        """Return which base model this is: the hash of its weights."""
        return {"base_sha256": self.base.weights_sha256}

    def schedule(self, step: int) -> StepSchedule:
        """Return a constant learning rate that falls to zero at the end; Muon's momentum stays where it was."""
        config, num_steps = self.config, self.plan.num_steps
        warmdown_steps = max(1, round(config.warmdown_fraction * num_steps))
        factor = config.first_lr_factor * min(1.0, (num_steps - step) / warmdown_steps)
        return StepSchedule(lr_factor=factor, muon_momentum=MUON_MOMENTUM, muon_weight_decay=config.weight_decay)

    def sample(self, step: int) -> None:
        """Put held-out problems to the model, every worker its share, and let the first answer a few questions."""
        run, model = self.context, inference_copy(self.model)
        scores: dict[str, float] = {}
        for task in self.held_out:
            if task.kind == "unscored" or not self.config.chat_problems:
                continue
            problems = range(min(self.config.chat_problems, len(task)))
            judged = judge(model, self.tokenizer, task, problems[run.rank :: run.world_size])
            right = torch.tensor(float(sum(one.is_right for one in judged)), device=self.hardware.device)
            if run.world_size > 1:
                dist.all_reduce(right)
            scores[task.name] = right.item() / len(problems)
        if scores:
            self.metrics.write({"step": step} | {f"chat_{name}": score for name, score in scores.items()})
        if run.rank == 0:
            asked: list[Conversation] = [exchange(question, "") for question in SAMPLE_QUESTIONS]
            asked += [task[0] for task in self.held_out]
            replies = answer(model, self.tokenizer, asked, max_new_tokens=self.config.sample_tokens)
            questions = [conversation.messages[-2].text for conversation in asked]
            texts = [reply.shown for reply in replies]
            self.metrics.write_samples(step, dict(zip(questions, texts, strict=True)))
