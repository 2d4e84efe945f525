"""Rows of a step to one update: micro-batches, gradient accumulation, reduction, optimiser.

The loss is the mean over the tokens of the global batch that are trained on, all of them or those of the assistant:
each micro-batch adds its sum of nats divided by the global count, so neither micro-batches nor workers change it.
Shapes: B rows, T positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.data.tokenizer import Tokenizer
from nanochat.model.gpt import GPT
from nanochat.model.optimizer import MuonAdamW, StepSchedule


@dataclass(frozen=True)
class StepResult:
    """What one step says, the same on every worker."""

    loss: float
    """Mean nats per token over the global batch, before the update."""
    command: int
    """What the workers passed, summed up: only the first one has a command."""
    device_s: float | None
    """Seconds between the step's first and last kernel, by CUDA's events; None elsewhere."""


class RunningStep:
    """A step that a GPU may still be computing, while this process does something else."""

    def __init__(self, shared: Tensor, events: tuple[torch.cuda.Event, torch.cuda.Event] | None) -> None:
        self._shared, self._events = shared, events

    def has_ended(self) -> bool:
        """Tell whether nothing of it is left to compute."""
        return self._events is None or self._events[1].query()

    def result(self) -> StepResult:
        """Wait for its end and return what it says."""
        loss, command = self._shared.tolist()
        device_s = self._events[0].elapsed_time(self._events[1]) / 1000 if self._events else None
        return StepResult(loss, int(command), device_s)


def split_rows(rows_BT1: np.ndarray, micro_batch_rows: int) -> list[np.ndarray]:
    """Cut rows into equal micro-batches of at most `micro_batch_rows`: the largest divisor that is not above it."""
    size = max(d for d in range(1, min(micro_batch_rows, len(rows_BT1)) + 1) if len(rows_BT1) % d == 0)
    return [rows_BT1[lo : lo + size] for lo in range(0, len(rows_BT1), size)]


def document_numbers(tokens_BT: Tensor, bos: int) -> Tensor:
    """Number the documents of each row: each BOS begins one."""
    return (tokens_BT == bos).cumsum(dim=1)


Supervised = Callable[[np.ndarray], np.ndarray]
"""Takes rows of ids and tells which of them are trained on, bool of the same shape."""


class TrainingStep:
    """One worker's share of optimiser steps; without `supervised` every token is trained on."""

    def __init__(
        self,
        model: GPT,
        optimizer: MuonAdamW,
        *,
        tokenizer: Tokenizer,
        document_masking: bool,
        micro_batch_rows: int,
        supervised: Supervised | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.bos = tokenizer.bos
        self.document_masking = document_masking
        self.micro_batch_rows = micro_batch_rows
        self.supervised = supervised
        self.device = model.lm_head.weight.device

    def backward(self, rows_BT1: np.ndarray, global_tokens: int) -> Tensor:
        """Run forward and backward on one micro-batch; returns its share of the mean loss, a float32 scalar."""
        tokens_BT1 = self._to_device(rows_BT1).long()
        inputs_BT, targets_BT = tokens_BT1[:, :-1].contiguous(), tokens_BT1[:, 1:].contiguous()
        if self.supervised is not None:
            says_BT1 = self._to_device(self.supervised(rows_BT1))
            targets_BT = targets_BT.masked_fill(~says_BT1[:, 1:], -1)
        document_BT = document_numbers(inputs_BT, self.bos) if self.document_masking else None
        loss = self.model.loss(inputs_BT, targets_BT, document_BT) / global_tokens
        loss.backward()
        return loss.detach()

    def _to_device(self, values: np.ndarray) -> Tensor:
        """Copy as stored; to a GPU from pinned memory, so that nothing waits for the copy."""
        if self.device.type == "cuda":
            return torch.from_numpy(values).pin_memory().to(self.device, non_blocking=True)
        return torch.from_numpy(values).to(self.device)

    def run(self, rows_BT1: np.ndarray, schedule: StepSchedule, command: int = 0) -> RunningStep:
        """Train on this worker's rows of one step; every worker calls it with equally many rows."""
        world_size = self.optimizer.world_size
        events = None
        if self.device.type == "cuda":
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
        global_tokens = self._count_targets(rows_BT1)
        micro_batches = split_rows(rows_BT1, self.micro_batch_rows)
        total = torch.zeros((), device=self.device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            if number == len(micro_batches):
                self.optimizer.reduce_in_backward()
            total += self.backward(micro_batch, global_tokens)
        self.optimizer.step(schedule)
        shared = torch.stack([total, torch.tensor(float(command), device=self.device)])
        if world_size > 1:
            dist.all_reduce(shared)
        if events is not None:
            events[1].record()
        return RunningStep(shared, events)

    def _count_targets(self, rows_BT1: np.ndarray) -> int:
        """Return how many tokens of the global batch are trained on, at least 1."""
        if self.supervised is None:
            return rows_BT1.shape[0] * (rows_BT1.shape[1] - 1) * self.optimizer.world_size
        count = torch.tensor(int(self.supervised(rows_BT1)[:, 1:].sum()), device=self.device)
        if self.optimizer.world_size > 1:
            dist.all_reduce(count)
        return max(1, int(count))
