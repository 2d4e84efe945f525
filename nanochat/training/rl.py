"""A chat model, a task and rollouts to a better chat model: sample groups, compare them, push towards the better.

Update t makes policy t + 1 from policy t. The loop takes a batch, updates, publishes the new weights and goes on; how
far sampling may be behind is the source's business (`rollout_queue.py`). A checkpoint is the learner's state and the
first group that is not trained on: nothing is lost with samples that are under way, they are drawn again.

Sources: recipe: karpathy/nanochat chat_rl.py@92d63d4, whose faults are mended: the end token is trained, nothing but
the temperature is between the sampled and the trained distribution, and the loss does not depend on micro-batches.
"""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nanochat.config import generation
from nanochat.config.model import ModelConfig
from nanochat.config.rl import RLConfig
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import ConfigError, TokenizerMismatchError
from nanochat.evaluation.chat import answer
from nanochat.evaluation.statistics import pass_at_k
from nanochat.inference.load import inference_copy
from nanochat.inference.rollouts import Group, Sample, packed_weights
from nanochat.inference.tool_loop import tool_alone
from nanochat.model import scaling
from nanochat.model.gpt import GPT
from nanochat.model.optimizer import StepSchedule
from nanochat.run_context import RunContext
from nanochat.storage import StageFolder
from nanochat.tasks.registry import UNSCORED, load_named
from nanochat.tasks.task import Task
from nanochat.training import plan as planning
from nanochat.training.checkpoint import Checkpoint, load_parameters, newest_checkpoint
from nanochat.training.learner import Command, Learner
from nanochat.training.plan import Plan
from nanochat.training.policy_step import PolicyStep
from nanochat.training.rollout_queue import Batch, RolloutSource
from nanochat.training.sft import MUON_MOMENTUM


@dataclass(frozen=True)
class RLInputs:
    """What the stage reads."""

    tokenizer: Tokenizer
    base: Checkpoint
    """The chat model to begin from."""
    held_out: Task
    """Problems that it is scored on."""
    rollouts: RolloutSource | None
    """The first worker's; None on the others."""
    folder: StageFolder
    """Where the run writes."""


def load_practice(config: RLConfig, folder: str) -> tuple[Task, Task]:
    """Return the task to practise and the one held out, judged by their own rules.

    `folder` is where tasks are downloaded to. Raises: ConfigError if there is nothing to judge replies by, or the
    held-out problems are the practised ones.
    """
    held_out = config.held_out or re.sub(r":\w+$", "", config.task)
    practice = []
    for field, text, split in (("task", config.task, "train"), ("held_out", held_out, "val")):
        try:
            name, task = load_named(field, text, split, folder, config.task_mirror)
        except ConfigError as err:
            if field == "held_out" and config.held_out is None:
                raise ConfigError(f"{err} Or name what is held out with --held-out NAME=PATH:SPLIT.") from err
            raise
        if name in UNSCORED and config.reward is None:
            raise ConfigError(f"{field}={text}: has no right answers. Give a rule with --reward MODULE:FUNCTION.")
        if not len(task):
            raise ConfigError(f"{field}={text}: has no problems. Name another split.")
        practice.append(task)
    if practice[0].split.startswith("test") or practice[0].split.endswith("_test"):
        raise ConfigError(f"task={config.task}: test splits are for scores alone. Practise another split.")
    if (practice[0].name, practice[0].split) == (practice[1].name, practice[1].split) and (
        re.sub(r":\w+$", "", config.task) == re.sub(r":\w+$", "", held_out)
    ):
        raise ConfigError(f"held_out={held_out}: is what is practised. Name another split with --held-out NAME:SPLIT.")
    return practice[0], practice[1]


def resolve_rl(config: RLConfig, base: Checkpoint) -> tuple[Plan, scaling.LearningRates, dict[str, Any]]:
    """Return the plan, the learning rates, and those that are the base checkpoint's.

    The plan's rows and batch factor stay the base model's. Raises: CheckpointError as `inherited_rates`; ConfigError
    if replies could be longer than what the model reads.
    """
    state, rates, inherited = planning.inherited_rates(config, base)
    before, longest = state["plan"], state["model"]["sequence_len"]
    if config.max_new_tokens >= longest:
        raise ConfigError(
            f"max_new_tokens={config.max_new_tokens}: the model reads {longest} tokens, prompt and reply together. "
            "Lower it."
        )
    plan = Plan(
        model=ModelConfig(**state["model"]), num_steps=config.num_steps, rows_per_step=before["rows_per_step"],
        lr_factor=before["lr_factor"], weight_decay=0.0, flops_per_token=before["flops_per_token"],
    )  # fmt: skip
    return plan, rates, inherited


def improve(config: RLConfig, run: RunContext, inputs: RLInputs) -> Checkpoint | None:
    """Practise until the last update or until asked to stop; returns the last checkpoint if it is reached.

    Raises: TrainingDivergedError on a NaN or infinite loss; CheckpointError if the state to resume from does not fit;
    what the source of rollouts raises; torch.OutOfMemoryError, after which the next start uses a smaller micro-batch.
    """
    return PolicyTraining(config, run, inputs).train()


class PolicyTraining(Learner[RLConfig]):
    """From a chat model, by rewards."""

    generation = generation.CHAT

    def __init__(self, config: RLConfig, run: RunContext, inputs: RLInputs) -> None:
        plan, rates, _ = resolve_rl(config, inputs.base)
        super().__init__(config, run, inputs.tokenizer, inputs.folder, plan, rates)
        self.base, self.held_out, self.rollouts = inputs.base, inputs.held_out, inputs.rollouts
        self.updates_before = inputs.base.state["updates"] if config.warm_start else 0
        self.next_group = 0
        self.empty_steps = 0
        """Steps without an update: no group had a gradient."""
        self.training_s = 0.0
        self._sync: dict[str, float] = {}

    @property
    def frozen_copies(self) -> int:
        """One, if a KL penalty holds on to the model that it began from."""
        return int(self.config.kl_beta > 0)

    def begin(self) -> None:
        """Load the base checkpoint. Raises: TokenizerMismatchError if it has another tokenizer."""
        if self.base.state["tokenizer_hash"] != self.tokenizer.hash:
            raise TokenizerMismatchError(
                f"base={self.base.folder}: was trained with another tokenizer. Use the run directory it comes from."
            )
        load_parameters(self.model, self.base.model_tensors(), self.base.folder)
        if self.config.warm_start:
            self.base.optimizer_tensors(self.optimizer.state_tensors())

    def stage_state(self) -> dict[str, Any]:
        """Return which chat model this is from: the hash of its weights."""
        return {"base_sha256": self.base.weights_sha256}

    def schedule(self, step: int) -> StepSchedule:
        """Return a learning rate that falls to zero at the end."""
        config = self.config
        left = (config.num_steps - step) / max(1.0, config.warmdown_fraction * config.num_steps)
        factor = config.first_lr_factor * min(1.0, left)
        return StepSchedule(lr_factor=factor, muon_momentum=MUON_MOMENTUM, muon_weight_decay=0.0)

    def train(self) -> Checkpoint | None:
        """See `improve`."""
        is_first = self.context.rank == 0
        newest = newest_checkpoint(self.folder.checkpoints, self.folder.note) if is_first else None
        step = self.shared(newest or 0)
        if is_first:
            self.folder.note(f"a worker group starts at step {step}")
        if state := self.restore(step):
            self.next_group, self.training_s = state["position"]["next_group"], state["loop"]["training_s"]
            self.empty_steps = state["loop"]["empty_steps"]
            self.optimizer.set_step(state["updates"])
        rows = self.planned_rows(self.config.groups_per_step * self.config.samples_per_group)
        self.step = PolicyStep(
            self.config, self.model, self.optimizer, banned=tool_alone(self.tokenizer),
            most_tokens=rows * self.plan.model.sequence_len, reference=self._reference,
        )  # fmt: skip
        try:
            step = self._train(step)
        except torch.OutOfMemoryError:
            self.lower_memory_limit(rows)
            raise
        finally:
            if self.rollouts is not None:
                self.rollouts.close()
        if self.saved_step != step:
            self._save(step)
        return self.finish(step)

    def _train(self, step: int) -> int:
        """Run updates until the last one or until asked to stop; returns the step that would come next."""
        if self.rollouts is not None and step < self.plan.num_steps:
            self.rollouts.begin(self.next_group, step)
            self._publish(step)
        command = Command.NOTHING
        while True:
            if step == self.plan.num_steps and self.rollouts is not None:
                self.rollouts.close()  # no more samples are needed
            if step in (0, self.plan.num_steps) or self._due(self.config.evaluate_every, step):
                self._evaluate(step)
            if command == Command.LEAVE or step == self.plan.num_steps:
                return step
            command = self._update(step)
            step += 1
            is_due = step < self.plan.num_steps and self.cadence.due(step)
            if is_due or (command == Command.SAVE and step < self.plan.num_steps):
                self._save(step)

    def _update(self, step: int) -> Command:
        """Take a batch, update, and publish the next policy; returns the first worker's command."""
        start_s = time.perf_counter()
        taken = None if self.rollouts is None else self.rollouts.take()
        batch, command = self.shared((taken, self.command()))
        waited_s = time.perf_counter() - start_s
        figures = self.step.run(batch, self.schedule(step))
        if not math.isfinite(figures["loss"]):
            raise self.diverged("loss", figures["loss"], step)
        self.next_group = batch.next_group
        if figures["trained_tokens"] == 0:
            self.empty_steps += 1
            if self.empty_steps == 1 and self.context.rank == 0:
                self.folder.note(
                    f"update {step + 1} trained nothing: in no group did rewards differ. If that goes on: an easier "
                    "task, more samples_per_group, a higher temperature"
                )
        if step + 1 < self.plan.num_steps and command != Command.LEAVE:
            self._publish(step + 1)
        step_s = time.perf_counter() - start_s
        self.training_s += step_s
        self._log(step, batch, figures, step_s, waited_s)
        return command

    def _due(self, every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _publish(self, version: int) -> None:
        """Give the weights to who samples."""
        if self.rollouts is not None:
            start_s = time.perf_counter()
            weights = packed_weights(self.model)
            self.rollouts.publish(version, weights)
            self._sync = {"sync_bytes": float(len(weights)), "sync_s": time.perf_counter() - start_s}

    def _reference(self) -> GPT:
        """Return the model that the KL penalty holds on to."""
        model = GPT(self.plan.model, self.hardware.dtype).to(self.hardware.device)
        load_parameters(model, self.base.model_tensors(), self.base.folder)
        return model.requires_grad_(False)

    def _log(self, step: int, batch: Batch, figures: dict[str, float], step_s: float, waited_s: float) -> None:
        """Write what an update says, which groups it was made of, and now and then its best and worst samples."""
        if self.rollouts is None:
            return
        tokens = sum(len(s.tokens) - sum(s.is_forced) for group in batch.sampled for s in group.samples)
        samples = len(batch.sampled) * self.config.samples_per_group
        record = {"step": step} | figures | rollout_figures(batch) | self._sync | self.rollouts.figures()
        record |= {
            "lr_factor": self.schedule(step).lr_factor, "step_s": step_s, "learner_idle_share": waited_s / step_s,
            "samples": samples, "samples_per_s": samples / step_s, "tokens_per_s": tokens / step_s,
            "training_s": self.training_s, "eta_s": (self.plan.num_steps - step - 1) * step_s,
            "peak_memory_bytes": self.hardware.peak_memory_bytes(),
        }  # fmt: skip
        self.metrics.write(record)
        self.metrics.write_groups(step, [group.id for group in batch.groups], [group.id for group in batch.dropped])
        is_last = step == self.plan.num_steps - 1
        if self.config.sample_every and (is_last or step % self.config.sample_every == 0):
            self.metrics.write_samples(step, shown_rollouts(batch.sampled))

    def _evaluate(self, step: int) -> None:
        """Score greedy replies to the held-out problems, every worker its share."""
        count = min(self.config.held_out_problems, len(self.held_out))
        if not count:
            return
        asked = [self.held_out[index] for index in range(count)[self.context.rank :: self.context.world_size]]
        replies = answer(
            inference_copy(self.model), self.tokenizer, asked, max_new_tokens=self.config.max_new_tokens
        )  # fmt: skip
        rewards = [self.held_out.reward(one, reply.text) for one, reply in zip(asked, replies, strict=True)]
        sums = torch.tensor([sum(rewards), sum(reward >= 1 for reward in rewards)], dtype=torch.float64)
        if self.context.world_size > 1:
            sums = sums.float().to(self.hardware.device)
            dist.all_reduce(sums)
        reward, right = (sums / count).tolist()
        self.metrics.write({"step": step, "held_out_reward": reward, "held_out_pass_at_1": right, "held_out_n": count})

    def _save(self, step: int) -> None:
        """Save the learner and where its groups stand."""
        position = {"seed": self.config.seed, "next_step": step, "next_group": self.next_group}
        state = {
            "position": position, "document_masking": False, "updates": self.updates_before + step - self.empty_steps,
            "loop": {"training_s": self.training_s, "empty_steps": self.empty_steps},
        }  # fmt: skip
        self.save(step, state)


def rollout_figures(batch: Batch) -> dict[str, float]:
    """Return what the samples of a batch were like; shares are of samples, but the zero-variance share is of groups."""
    groups = batch.sampled
    if not groups:
        return {}
    samples = [sample for group in groups for sample in group.samples]
    size = len(groups[0].samples)
    right = [sum(reward >= 1 for reward in group.rewards) for group in groups]
    ages = [batch.number - version for sample in samples for version in sample.versions[:1]]
    figures = {
        "reward": mean([sample.reward for sample in samples]),
        "completion_tokens": mean([float(len(sample.tokens)) for sample in samples]),
        "truncated_share": mean([float(sample.is_truncated) for sample in samples]),
        "zero_variance_share": mean([float(min(group.rewards) == max(group.rewards)) for group in groups]),
        "staleness": mean(ages),
        "staleness_max": float(max(ages, default=0)),
        "sampled_s": mean([group.sampled_s for group in groups]),
    }
    for k in (2**power for power in range(size.bit_length())):
        figures[f"pass_at_{k}"] = mean([pass_at_k(size, count, k) for count in right])
    return figures


def mean(values: Sequence[float]) -> float:
    """Return the mean, 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def shown_rollouts(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return the best and the worst sample as people read them."""
    every: list[tuple[Group, Sample]] = [(group, sample) for group in groups for sample in group.samples]
    if not every:
        return []
    best, worst = max(every, key=lambda one: one[1].reward), min(every, key=lambda one: one[1].reward)
    return [
        {
            "which": which, "group": group.id, "question": group.question, "reply": sample.shown,
            "reward": sample.reward, "tokens": len(sample.tokens), "truncated": sample.is_truncated,
        }
        for which, (group, sample) in (("best", best), ("worst", worst))
    ]  # fmt: skip
