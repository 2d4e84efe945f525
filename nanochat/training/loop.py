"""Rows of tokens to checkpoints: the loop of every stage that trains, the same alone in a process and under Ray Train.

A stage is a TrainingLoop that says what it begins from, its schedule, and what it samples.

The stream decides where the run stands: its first rows carry the step that comes next, and the checkpoint of that step
is loaded. Nothing else is remembered, so a killed run and an untouched one compute the same numbers.

Sources: the loop's parts are nanochat's (base_train.py@92d63d4); the recipe for exact resume is this project's.
"""

import gc
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from nanochat import storage
from nanochat.config.training import TrainingConfig
from nanochat.data.row_order import RowReader, StepRows
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import CheckpointError
from nanochat.evaluation.bits_per_byte import bits_per_byte, count_nats_and_bytes
from nanochat.model import scaling
from nanochat.run_context import RunContext
from nanochat.storage import StageFolder
from nanochat.training import plan as planning
from nanochat.training.checkpoint import Checkpoint, step_folder
from nanochat.training.learner import Command, Learner
from nanochat.training.metrics import StepClock
from nanochat.training.step import RunningStep, StepResult, Supervised, TrainingStep, split_rows


@dataclass(frozen=True)
class TrainingInputs:
    """What a stage reads."""

    tokenizer: Tokenizer
    shards: TokenShards
    stream: Iterable[StepRows]
    """This worker's rows, from the step that comes next on, without end or up to the last step."""
    folder: StageFolder
    """Where the run writes."""


def local_stream(reader: RowReader, rows_per_step: int, first_step: int = 0) -> Iterator[StepRows]:
    """Yield all rows of each step from `first_step` on, without end: the stream of a run in one process."""
    for step in itertools.count(first_step):
        first = step * rows_per_step
        ids = reader.order.locate(first, rows_per_step)
        yield StepRows(step, ids, reader.read(first, rows_per_step))


Config = TypeVar("Config", bound=TrainingConfig)


class TrainingLoop(Learner[Config]):
    """The state of one worker's loop.

    `document_masking` hides the other documents of a row; with `supervised` only those tokens are trained on.
    """

    def __init__(
        self,
        config: Config,
        run: RunContext,
        inputs: TrainingInputs,
        plan: planning.Plan,
        rates: scaling.LearningRates,
        *,
        document_masking: bool,
        supervised: Supervised | None = None,
    ) -> None:
        super().__init__(config, run, inputs.tokenizer, inputs.folder, plan, rates)
        self.inputs = inputs
        self.document_masking, self.supervised = document_masking, supervised
        self.stream: Iterator[StepRows] = iter(inputs.stream)
        self.token_bytes_V = torch.from_numpy(self.tokenizer.token_bytes()).to(self.hardware.device)
        self.clock = StepClock(self.plan, self.hardware)
        self.val_bpb: float | None = None

    def sample(self, step: int) -> None:
        """Show what the model says; every worker calls it."""

    def train(self) -> Checkpoint | None:
        """Train until the last step or until asked to stop; returns the last checkpoint if the horizon is reached.

        Raises: TrainingDivergedError on a NaN or infinite loss; CheckpointError if the state to resume from does not
        fit; TokenizerMismatchError if it was trained with another tokenizer; torch.OutOfMemoryError, after which the
        next start uses a smaller micro-batch.
        """
        try:
            return self._run()
        finally:
            gc.unfreeze()
            gc.enable()

    def _run(self) -> Checkpoint | None:
        batch = next(self.stream)
        step = batch.step
        self._restore(step)
        self.step = self._training_step(self._fit_micro_batch(batch.rows_BT1))
        self.clock.skip()
        try:
            return self._finish(self._train(step, batch))
        except torch.OutOfMemoryError:
            self.lower_memory_limit(self.step.micro_batch_rows)
            raise

    def _train(self, step: int, batch: StepRows) -> int:
        """Run steps until the last one or until asked to stop; returns the step that would come next."""
        stopped = False
        while step < self.plan.num_steps and not stopped:
            if self._due(self.config.evaluate_every, step):
                self._evaluate(step)
            if step > 0 and self._due(self.config.sample_every, step):
                self._sample(step)
            running = self.step.run(batch.rows_BT1, self.schedule(step), self._command())
            coming = self._next_rows(running) if step + 1 < self.plan.num_steps else None
            result = running.result()
            if not math.isfinite(result.loss):
                raise self.diverged("loss", result.loss, step)
            self._log(step, batch, result)
            stopped = result.command == Command.LEAVE
            step += 1
            is_due = step < self.plan.num_steps and self.cadence.due(step)
            if is_due or (result.command == Command.SAVE and step < self.plan.num_steps):
                self._save(step)
            if coming is not None:
                batch = coming
                assert batch.step == step, f"the stream is at step {batch.step}, the loop at {step}"
            self._tame_garbage_collector(step)
        return step

    def _finish(self, step: int) -> Checkpoint | None:
        """Write the last checkpoint; at the horizon also evaluate and sample."""
        if self.saved_step != step:
            self._save(step)
        if step == self.plan.num_steps:
            self._sample(step)
            self._evaluate(step)  # the score says that all is done
        return self.finish(step)

    def _restore(self, step: int) -> None:
        """Load the checkpoint of `step`, or begin."""
        state = self.restore(step)
        if state is None:
            return
        if state["manifest_hash"] != self.inputs.shards.manifest_hash:
            raise CheckpointError(
                f"checkpoint={step_folder(self.folder.checkpoints, step)}: was trained on other token shards than "
                f"those of {self.inputs.shards.folder}. Put those back, or start anew in another --run-dir."
            )
        self.val_bpb = state["loop"]["val_bpb"]
        self.clock.training_s = state["loop"]["training_s"]

    def _fit_micro_batch(self, rows_BT1: np.ndarray) -> int:
        """Choose the micro-batch from free memory, then try it: halve on out-of-memory, at one row recompute."""
        size = self.planned_rows(len(rows_BT1))
        while True:
            size = len(split_rows(rows_BT1, size)[0])
            trial = self._training_step(size)
            try:
                for _ in range(1 if size == len(rows_BT1) else 2):  # the second one finds gradients allocated
                    trial.backward(rows_BT1[:size], global_tokens=1)
                return self._least(size)
            except torch.OutOfMemoryError:
                if size == 1 and self.model.recompute:
                    raise
                if size == 1:
                    self.model.recompute = True
                    self.folder.note("out of memory with one row: activations are recomputed from now on")
                else:
                    size //= 2
                    self.folder.note(f"out of memory: the micro-batch is halved to {size} rows, the global batch stays")
            finally:
                self.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

    def _training_step(self, micro_batch_rows: int) -> TrainingStep:
        return TrainingStep(
            self.model, self.optimizer, tokenizer=self.tokenizer, document_masking=self.document_masking,
            micro_batch_rows=micro_batch_rows, supervised=self.supervised,
        )  # fmt: skip

    def _least(self, size: int) -> int:
        """Return the least size of all workers, which then share validation batches of equal shape."""
        if self.context.world_size > 1:
            least = torch.tensor(size, device=self.hardware.device)
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
            size = int(least)
        return size

    def _due(self, every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _next_rows(self, running: RunningStep) -> StepRows:
        """Take the next step's rows while a GPU is at this one, and count how long only they were waited for."""
        self.clock.count()
        batch = next(self.stream)
        if running.has_ended():
            self.clock.rows_arrived()
        return batch

    def _command(self) -> Command:
        return self.command(look_for_stop=self.clock.every(self.folder.stop_check_s))

    def _log(self, step: int, batch: StepRows, result: StepResult) -> None:
        """Write what a step says: every `log_every` steps, and the first and last."""
        self.clock.step_done(result.device_s)
        if self.config.log_row_ids:
            path = storage.join(self.folder.root, f"rows_{self.context.rank:02d}.jsonl")
            storage.append_jsonl(path, {"step": step, "row_ids": batch.row_ids.tolist()})
        if step % self.config.log_every == 0 or step == self.plan.num_steps - 1:
            record = {"step": step, "loss": result.loss, "lr_factor": self.schedule(step).lr_factor} | self.clock.lap(
                step
            )
            self.metrics.write(record)

    def _evaluate(self, step: int) -> None:
        """Measure validation bits per byte, every worker on its share of the batches."""
        shards = self.inputs.shards
        limit = -(-self.config.validation_tokens // shards.sequence_len)
        batches = shards.validation_batches(
            rows=self.step.micro_batch_rows, limit=limit, padding=self.tokenizer.bos, rank=self.context.rank,
            world_size=self.context.world_size,
        )  # fmt: skip
        bos = self.tokenizer.bos if self.document_masking else None
        totals = count_nats_and_bytes(self.model, batches, self.token_bytes_V, bos, self.supervised)
        if self.context.world_size > 1:
            totals = totals.to(self.hardware.device)
            dist.all_reduce(totals)
        nats, num_bytes = totals.tolist()
        if not math.isfinite(nats):
            raise self.diverged("validation loss", nats, step)
        self.val_bpb = bits_per_byte(nats, num_bytes)
        self.metrics.write({"step": step, "val_bpb": self.val_bpb})
        self.clock.skip()

    def _sample(self, step: int) -> None:
        self.sample(step)
        self.clock.skip()

    def _save(self, step: int) -> None:
        """Save everything that the step needs to come next."""
        position = {"seed": self.config.seed, "next_step": step, "rows_per_step": self.plan.rows_per_step}
        self.save(
            step,
            {
                "manifest_hash": self.inputs.shards.manifest_hash, "position": position,
                "document_masking": self.document_masking,
                "loop": {"val_bpb": self.val_bpb, "training_s": self.clock.training_s},
            },
        )  # fmt: skip
        self.clock.skip()

    def _tame_garbage_collector(self, step: int) -> None:
        """Collect rarely: a scan of all objects takes long and finds little in this loop."""
        if gc.isenabled():
            gc.collect()
            gc.freeze()
            gc.disable()
        elif step % 1000 == 0:
            gc.collect()
