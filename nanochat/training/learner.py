"""One worker's model, optimiser, checkpoints and records: what every stage that trains has, whatever it trains on.

Sources: the parts are nanochat's (base_train.py@92d63d4); the recipe for exact resume is this project's.
"""

import enum
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from nanochat import storage
from nanochat.config import generation
from nanochat.config.training import LearnerConfig
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import CheckpointError, TokenizerMismatchError, TrainingDivergedError
from nanochat.model import scaling
from nanochat.model.attention import choose_flash
from nanochat.model.gpt import GPT
from nanochat.model.optimizer import MuonAdamW, StepSchedule
from nanochat.run_context import RunContext
from nanochat.storage import StageFolder
from nanochat.training import plan as planning
from nanochat.training.cadence import Cadence
from nanochat.training.checkpoint import Checkpoint, CheckpointWriter, load_parameters, newest_checkpoint, step_folder
from nanochat.training.hardware import Hardware, can_compile, choose_hardware, describe_machine
from nanochat.training.memory import Memory, refuse_unless_it_fits, training_memory
from nanochat.training.metrics import MetricsWriter
from nanochat.training.plan import Plan

Config = TypeVar("Config", bound=LearnerConfig)
LAST_SAVE_S = 20.0
"""So long before a node is taken away the last checkpoint is begun."""


class Command(enum.IntEnum):
    """What the first worker has all of them do after a step."""

    NOTHING = 0
    SAVE = 1
    LEAVE = 2


class Learner(Generic[Config]):
    """A model in training on one worker. A stage says what it begins from, its schedule, and what else it keeps."""

    updates_before = 0
    """Updates that the optimiser's state has seen before step 0."""
    generation: Mapping[str, float] = generation.BASE  # how the model is sampled where nobody says otherwise

    def __init__(
        self, config: Config, run: RunContext, tokenizer: Tokenizer, folder: StageFolder, plan: Plan,
        rates: scaling.LearningRates,
    ) -> None:  # fmt: skip
        self.config, self.context, self.tokenizer, self.folder = config, run, tokenizer, folder
        self.plan, self.rates = plan, rates
        self.hardware: Hardware = choose_hardware(config, run)
        attention = choose_flash(self.hardware.device, self.hardware.dtype)
        share = run.gpu_share if self.hardware.device.type == "cuda" else 1 / run.local_world_size
        self.free_bytes = int(share * self.hardware.free_bytes())  # before anything of the plan is allocated
        self.memory = self._planned_memory()
        self.model = self._build_model()
        parameters = dict(self.model.named_parameters())
        groups = scaling.parameter_groups(plan.model, list(parameters), rates, plan.lr_factor)
        self.optimizer = MuonAdamW(
            parameters, groups, muon_dtype=self.hardware.dtype, rank=run.rank, world_size=run.world_size
        )
        self.writer = CheckpointWriter(
            folder.checkpoints, rank=run.rank, world_size=run.world_size, keep=config.keep_checkpoints,
            attempt=self.shared(uuid.uuid4().hex),
        )  # fmt: skip
        nodes = -(-run.world_size // run.local_world_size)
        note = folder.note if run.rank == 0 else lambda line: None
        self.cadence = Cadence(config.checkpoint_every, config.node_failure_s / nodes, self.shared, note)
        self.metrics = MetricsWriter(folder, enabled=run.rank == 0, wandb=config.wandb, config=asdict(config))
        self.saved_step = -1
        self._saves_with_s_left = [LAST_SAVE_S, math.inf]
        if run.rank == 0:
            workers = {"workers": run.world_size, "dtype_reason": self.hardware.reason, "attention": attention}
            storage.write_json(folder.machine, describe_machine(self.hardware) | workers)

    @property
    def frozen_copies(self) -> int:
        """Copies of the model that are held beside the one in training."""
        return 0

    def begin(self) -> None:
        """Prepare parameters and optimiser for step 0; the model has been initialised."""

    def schedule(self, step: int) -> StepSchedule:
        """Return the learning rate and the like of an update."""
        raise NotImplementedError

    def stage_state(self) -> dict[str, Any]:
        """Return what else a checkpoint holds; one that holds otherwise is not resumed from."""
        return {}

    def shared(self, value: Any) -> Any:
        """Return the first worker's value; every worker calls it."""
        holder = [value]
        if self.context.world_size > 1:
            dist.broadcast_object_list(holder, src=0, device=self.hardware.device)
        return holder[0]

    def restore(self, step: int) -> dict[str, Any] | None:
        """Load the checkpoint of `step` and return its state; step 0 has none, the stage begins it."""
        self.metrics.begin(step)
        if step == 0:
            self.begin()
            self.optimizer.set_step(self.updates_before)
            return None
        checkpoint = Checkpoint(step_folder(self.folder.checkpoints, step))
        state = checkpoint.state
        if state["tokenizer_hash"] != self.tokenizer.hash:
            raise TokenizerMismatchError(
                f"checkpoint={checkpoint.folder}: was trained with another tokenizer. Put that one back, or start anew."
            )
        if state["stage"] != self.stage_state():
            raise CheckpointError(
                f"checkpoint={checkpoint.folder}: began from {state['stage']}, not from {self.stage_state()}. "
                "Put that back, or start anew in another --run-dir."
            )
        load_parameters(self.model, checkpoint.model_tensors(), checkpoint.folder)
        checkpoint.optimizer_tensors(self.optimizer.state_tensors())
        self.optimizer.set_step(self.updates_before + step)
        self.saved_step = step
        return state

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Hand a copy of everything, and what the stage's loop adds to it, to the background writer.

        Raises: TrainingDivergedError rather than keep parameters that are not finite.
        """
        start_s = time.perf_counter()
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise self.diverged("parameters", math.nan, step)
        state = {
            "plan": self.plan.as_json(),
            "model": asdict(self.plan.model),
            "tokenizer_hash": self.tokenizer.hash,
            "rates": asdict(self.rates),
            "updates": self.updates_before + step,
            "stage": self.stage_state(),
            "generation": dict(self.generation),
        } | state
        self.writer.save(step, self.optimizer.parameters, self.optimizer.state_tensors(), state)
        self.saved_step = step
        self.cadence.saved(step, time.perf_counter() - start_s)

    def command(self, look_for_stop: bool = True) -> Command:
        """Return what all workers shall do after the present step; the first one says so.

        A node that will be taken away is a reason to save twice: at once, for it may go early, and shortly before its
        time, so that little is done again.
        """
        if self.context.rank > 0:
            return Command.NOTHING
        if look_for_stop and storage.exists(self.folder.stop):
            return Command.LEAVE
        left_s = self.context.seconds_left()
        if left_s is None or not self._saves_with_s_left or left_s > self._saves_with_s_left[-1]:
            return Command.NOTHING
        self._saves_with_s_left.pop()
        self.folder.note(f"a node will be taken away in {left_s:.0f} s: a checkpoint is written")
        return Command.SAVE

    def finish(self, step: int) -> Checkpoint | None:
        """Wait for what is being written; return the last checkpoint if the horizon is reached."""
        self.writer.wait()
        if self.context.world_size > 1:
            dist.barrier()
        self.metrics.close()
        return Checkpoint(step_folder(self.folder.checkpoints, step)) if step == self.plan.num_steps else None

    def diverged(self, name: str, value: float, step: int) -> TrainingDivergedError:
        """Return the error, with the newest checkpoint, once all workers have written their part of it."""
        self.writer.wait()
        if self.context.world_size > 1:
            dist.barrier()
        checkpoints = self.folder.checkpoints
        good = newest_checkpoint(checkpoints, passed_over=lambda why: None)
        last = "there is no checkpoint" if good is None else f"the last good one is {step_folder(checkpoints, good)}"
        return TrainingDivergedError(
            f"{name}={value}: not finite at step {step}; {last}. "
            "Lower matrix_lr and embedding_lr, or look at what this step trained on."
        )

    def lower_memory_limit(self, rows: int) -> None:
        """Leave a smaller micro-batch than `rows`, or recomputing, to the next start: these were too many."""
        limit = {"micro_batch_rows": max(1, rows // 2), "recompute": self.model.recompute or rows == 1}
        storage.write_json(self.folder.memory_limit, limit)
        self.folder.note(f"out of memory with {rows} rows: the next start uses {limit}")

    def planned_rows(self, rows: int) -> int:
        """Return how many of a worker's `rows` to run at once: by memory, and as an earlier start has left it."""
        size = planning.micro_batch_rows(
            self.config, self.plan.model, self.memory, rows=rows, device=self.hardware.device.type,
            free_bytes=self.free_bytes,
        )  # fmt: skip
        if not storage.exists(self.folder.memory_limit):
            return size
        limit = storage.read_json(self.folder.memory_limit)
        self.model.recompute |= limit["recompute"]
        return min(size, limit["micro_batch_rows"])

    def _planned_memory(self) -> Memory:
        """Return what training takes; one row that does not fit is recomputed. Raises: ConfigError if none can fit."""
        self.compile_obstacle = "it is off" if self.config.compile == "off" else can_compile(self.hardware.device)
        asked, recomputing = (
            training_memory(
                self.plan.model, world_size=self.context.world_size, device=self.hardware.device.type,
                dtype=self.hardware.dtype, compiled=self.compile_obstacle is None, recompute=recompute,
                frozen_copies=self.frozen_copies,
            )
            for recompute in (self.config.recompute, True)
        )  # fmt: skip
        refuse_unless_it_fits(self.plan.model, recomputing, self.free_bytes)
        self.recompute = self.config.recompute
        if not self.recompute and asked.peak(1) > self.free_bytes:
            self.recompute = True
            self.folder.note(f"worker {self.context.rank} has no memory for one row: activations are recomputed")
        return recomputing if self.recompute else asked

    def _build_model(self) -> GPT:
        """Create the model in float32 with the seed's parameters, the same on every worker."""
        model = GPT(self.plan.model, self.hardware.dtype)
        model.initialize(torch.Generator().manual_seed(self.config.seed))
        model.recompute = self.recompute
        model.to(self.hardware.device)
        if self.config.fp8:
            from nanochat.model.fp8 import convert_to_fp8

            convert_to_fp8(model)
        if self.compile_obstacle is None:
            model.compile()
        elif self.config.compile != "off" and self.context.rank == 0:
            self.folder.note(self.compile_obstacle)
        return model
