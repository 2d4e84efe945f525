"""Workers of one process group on this machine: what each of them runs, and how a test starts them.

They are forked from a server that has imported torch once: a test's own process, whose autograd has threads, cannot be
forked.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from nanochat.config.model import ModelConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.model.gpt import GPT
from nanochat.model.optimizer import MuonAdamW, StepSchedule
from nanochat.model.scaling import parameter_groups
from nanochat.training.checkpoint import Checkpoint, CheckpointWriter, load_parameters, step_folder
from nanochat.training.plan import learning_rates
from nanochat.training.step import TrainingStep

ROWS, T, VOCAB = 8, 16, 320  # tables of 320 rows are cut for up to five workers, vectors stay whole
# Three layers: in two, backout subtracts from the last layer itself, which the norm undoes, and its gradient is noise.
CONFIG = ModelConfig(
    sequence_len=T, vocab_size=VOCAB, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="L", smear=True
)
WARMUP = 10


class _Tokenizer:
    bos = 0


def rows_of(step: int) -> np.ndarray:
    """All rows of a step."""
    return np.random.default_rng(step).integers(0, VOCAB, (ROWS, T + 1)).astype(np.uint16)


class Worker:
    """A model and its training step as one of several workers."""

    def __init__(self, rank: int, world_size: int, randomised: bool) -> None:
        self.rank, self.world_size = rank, world_size
        self.model = GPT(CONFIG)
        draw = torch.Generator().manual_seed(0)
        self.model.initialize(draw)
        if randomised:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.normal_(generator=draw).mul_(0.2)
        self.parameters = dict(self.model.named_parameters())
        groups = parameter_groups(CONFIG, list(self.parameters), learning_rates(PretrainConfig()), 0.03)
        self.optimizer = MuonAdamW(self.parameters, groups, muon_dtype=torch.float32, rank=rank, world_size=world_size)
        self.step = TrainingStep(
            self.model, self.optimizer, tokenizer=_Tokenizer(), document_masking=False, micro_batch_rows=2
        )  # fmt: skip

    def train(self, steps: range, stop_in: int | None = None) -> list[float]:
        """Train on this worker's rows of each step; the last worker asks to stop in `stop_in`. Returns the losses."""
        losses = []
        for number in steps:
            mine = ROWS // self.world_size
            rows = rows_of(number)[self.rank * mine : (self.rank + 1) * mine]
            schedule = StepSchedule(lr_factor=min(1.0, (number + 1) / WARMUP), muon_momentum=0.9, muon_weight_decay=0.1)
            result = self.step.run(
                rows, schedule, 2 * (number == stop_in and self.rank == self.world_size - 1)
            ).result()
            assert result.command == 2 * (number == stop_in)
            losses.append(result.loss)
        return losses

    def save(self, checkpoints: str, step: int) -> None:
        """Write this worker's part of a checkpoint."""
        writer = CheckpointWriter(checkpoints, rank=self.rank, world_size=self.world_size, keep=1, attempt="first")
        writer.save(step, self.parameters, self.optimizer.state_tensors(), {})
        writer.wait()

    def load(self, checkpoints: str, step: int) -> None:
        """Load a checkpoint, whoever wrote it."""
        checkpoint = Checkpoint(step_folder(checkpoints, step))
        load_parameters(self.model, checkpoint.model_tensors(), checkpoint.folder)
        checkpoint.optimizer_tensors(self.optimizer.state_tensors())
        self.optimizer.set_step(step)


def run_worker(rank: int, world_size: int, folder: str, resume_from: str | None, train: bool) -> dict[str, Any]:
    """Train, resume from a checkpoint, or both, as one worker; returns the losses by what was done."""
    outcome = train_and_save(rank, world_size, folder) if train else {}
    if resume_from is not None:
        resumed = Worker(rank, world_size, False)
        resumed.load(resume_from, 5)
        outcome["resumed"] = resumed.train(range(5, 10))
    return outcome


def train_and_save(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Train from three starting points; the optimiser state after one step and a checkpoint go into `folder`."""
    outcome: dict[str, Any] = {"randomised": Worker(rank, world_size, True).train(range(20), stop_in=17)}
    outcome["default"] = Worker(rank, world_size, False).train(range(12))
    one_step = Worker(rank, world_size, True)
    one_step.train(range(1))
    state = {name: value.contiguous() for name, value in one_step.optimizer.state_tensors().items()}
    save_file(state, f"{folder}/state_{rank}.safetensors")
    save_file({name: p.detach() for name, p in one_step.parameters.items()}, f"{folder}/parameters_{rank}.safetensors")
    saved = Worker(rank, world_size, True)
    saved.train(range(5))
    saved.save(f"{folder}/checkpoints", 5)
    outcome["continued"] = saved.train(range(5, 10))
    return outcome


def _process(rank: int, world_size: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    outcome = work(rank, world_size, folder, *arguments)
    Path(f"{folder}/outcome_{rank}.json").write_text(json.dumps(outcome))
    dist.barrier()
    dist.destroy_process_group()


def run_workers(
    world_size: int, folder: Path, resume_from: str | None = None, train: bool = True
) -> list[dict[str, Any]]:
    """Let that many workers train, resume from a checkpoint, or both; returns the losses of each."""
    return run_group(world_size, folder, run_worker, resume_from, train)


def run_group(world_size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run that many workers, one in this process or several in their own; returns what each returned."""
    folder.mkdir()
    if world_size == 1:
        return [work(0, 1, str(folder), *arguments)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanochat.training.step", "nanochat.training.checkpoint"])
    processes = [
        context.Process(target=_process, args=(rank, world_size, str(folder), work, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(50)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * world_size
    return [json.loads((folder / f"outcome_{rank}.json").read_text()) for rank in range(world_size)]
