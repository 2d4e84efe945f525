"""Rows of tokens to a base model: the training loop with the depth dial's plan and nanochat's schedule."""

import math

from nanochat.config.pretrain import PretrainConfig
from nanochat.inference.completions import complete
from nanochat.inference.engine import Engine
from nanochat.inference.load import inference_copy
from nanochat.inference.requests import Request
from nanochat.model.optimizer import StepSchedule
from nanochat.run_context import RunContext
from nanochat.training import plan as planning
from nanochat.training.checkpoint import Checkpoint
from nanochat.training.learner import Command
from nanochat.training.loop import TrainingInputs, TrainingLoop
from nanochat.training.schedules import schedule_at

SAMPLE_PROMPTS = (
    "The capital of France is",
    "This module provides",
    "Return the number of",
    "The opposite of hot is",
    "Once upon a time",
)
SAMPLE_TEMPERATURE = 0.7


def pretrain(config: PretrainConfig, run: RunContext, inputs: TrainingInputs) -> Checkpoint | None:
    """Train a base model until the last step or until asked to stop; returns the last checkpoint if it is reached.

    Raises: as `TrainingLoop.train`.
    """
    return Pretraining(config, run, inputs).train()


class Pretraining(TrainingLoop[PretrainConfig]):
    """From random parameters, every token of a row a target.

    After `limit_s` seconds of training, restarts included, it ends early, with a checkpoint and a score.
    """

    def __init__(
        self, config: PretrainConfig, run: RunContext, inputs: TrainingInputs, limit_s: float = math.inf
    ) -> None:
        self.limit_s = limit_s
        plan = planning.resolve(config, inputs.tokenizer.vocab_size, inputs.shards.sequence_len)
        rates = planning.learning_rates(config)
        super().__init__(config, run, inputs, plan, rates, document_masking=config.document_masking)

    def schedule(self, step: int) -> StepSchedule:
        """Return nanochat's schedule at an update."""
        return schedule_at(self.config, step, self.plan.num_steps, self.plan.weight_decay)

    def is_over(self) -> bool:
        """Tell whether the horizon or the limit is reached."""
        return self.saved_step == self.plan.num_steps or self.clock.training_s >= self.limit_s

    def _command(self) -> Command:
        is_late = self.context.rank == 0 and self.clock.training_s >= self.limit_s
        return Command.LEAVE if is_late else super()._command()

    def _finish(self, step: int) -> Checkpoint | None:
        if step < self.plan.num_steps and self.is_over():
            self._save(step)
            self._evaluate(step)
        return super()._finish(step)

    def sample(self, step: int) -> None:
        """Let the first worker complete the fixed prompts."""
        if self.context.rank == 0:
            prompts = [(self.tokenizer.bos, *self.tokenizer.encode_ordinary(text)) for text in SAMPLE_PROMPTS]
            tokens, end = self.config.sample_tokens, self.tokenizer.bos
            requests = [
                Request(
                    prompt=prompt, max_new_tokens=tokens, stop_tokens=frozenset({end}), temperature=SAMPLE_TEMPERATURE,
                    top_k=40, seed=self.config.seed + number,
                )
                for number, prompt in enumerate(prompts)
            ]  # fmt: skip
            engine = Engine(
                inference_copy(self.model), max_running=len(prompts), longest=max(map(len, prompts)) + tokens
            )
            completions = complete(engine, requests)
            texts = [self.tokenizer.decode([t for t in one.tokens if t != end]) for one in completions]
            self.metrics.write_samples(step, dict(zip(SAMPLE_PROMPTS, texts, strict=True)))
