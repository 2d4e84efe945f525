"""Token shards to the workers' rows through Ray Data, in the exact global order, from any step at once.

The rows of a step are cut into `slots` equal parts, as many as any allowed number of workers divides. A Ray Data row
is a unit: one slot's part of `steps_per_unit` consecutive steps; every block holds one unit, order is preserved, and
Ray's splitter deals equal blocks round robin, so unit u goes to worker u % W. A worker collects its slots of a span of
steps and yields them step by step: which rows a step trains on never depends on W.

The dataset is built by a factory on Ray Train's controller at every start of a worker group, from the newest checkpoint
that verifies; its first unit tells the workers which step that is.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data
from ray.data import DataIterator

from nanochat.data.row_order import RowReader, StepRows
from nanochat.data.token_shards import TokenShards
from nanochat.errors import ConfigError
from nanochat.storage import StageFolder

UNIT_BYTES = 1 << 20
MAX_TASKS = 8192


def allowed_workers(rows_per_step: int, min_workers: int, max_workers: int) -> list[int]:
    """Return the worker counts of a range that divide the rows of a step, ascending.

    Raises: ConfigError if `max_workers` does not.
    """
    allowed = [workers for workers in range(min_workers, max_workers + 1) if rows_per_step % workers == 0]
    if max_workers not in allowed:
        divisors = [workers for workers in range(1, max_workers + 1) if rows_per_step % workers == 0]
        raise ConfigError(
            f"num_workers={max_workers}: must divide the {rows_per_step} rows of a step. "
            f"Use {divisors[-1]}, or another global_batch_tokens."
        )
    return allowed


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """What the stream of a run is a function of."""

    shards: TokenShards
    seed: int
    rows_per_step: int
    num_steps: int
    workers: list[int]
    """Worker counts that may read it; each divides the rows of a step."""
    folder: StageFolder

    @property
    def slots(self) -> int:
        """Into how many parts a step's rows are cut: the least number that every worker count divides."""
        return math.lcm(*self.workers)

    @property
    def rows_per_slot(self) -> int:
        """Rows of a step in one unit."""
        return self.rows_per_step // self.slots

    def steps_per_unit(self, steps: int) -> int:
        """Return how many steps a unit spans: about a megabyte, and not more tasks than Ray Data likes."""
        step_bytes = self.rows_per_slot * (self.shards.sequence_len + 1) * np.dtype(self.shards.dtype).itemsize
        return max(1, UNIT_BYTES // step_bytes, -(-steps // MAX_TASKS))

    def dataset_from_newest_checkpoint(self) -> ray.data.Dataset:
        """Build the dataset from the newest complete checkpoint's step, or from 0; notes what is passed over."""
        from nanochat.training.checkpoint import newest_checkpoint  # with torch, which those who read rows do without

        step = newest_checkpoint(self.folder.checkpoints, passed_over=self.folder.note) or 0
        self.folder.note(f"a worker group starts at step {step}")
        return self.dataset(step)

    def dataset(self, first_step: int) -> ray.data.Dataset:
        """Return the units from `first_step` on; never less than one step, so that workers learn where they are."""
        ray.data.DataContext.get_current().raise_original_map_exception = True  # a damaged shard is named, not wrapped
        steps = max(1, self.num_steps - first_step)
        span = self.steps_per_unit(steps)
        tasks = -(-steps // span)
        read = _ReadUnits(self, first_step, span)
        units = ray.data.range(tasks, override_num_blocks=tasks).map_batches(read, batch_size=None)
        return units.repartition(target_num_rows_per_block=1, strict=True)


class _ReadUnits:
    """Reads all slots of a span of steps; the reader is made once in each process."""

    def __init__(self, spec: StreamSpec, first_step: int, span: int) -> None:
        self.spec, self.first_step, self.span = spec, first_step, span
        self.reader = RowReader(spec.shards, "train", spec.seed)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the units of the tasks in `batch`: first step, row ids (span, rows) and tokens (span, rows, T + 1)."""
        spec, shape = self.spec, (self.span, self.spec.slots, self.spec.rows_per_slot)
        steps, ids, tokens = [], [], []
        for task in batch["id"]:
            first_step = self.first_step + int(task) * self.span
            first, count = first_step * spec.rows_per_step, self.span * spec.rows_per_step
            steps.append(np.full(spec.slots, first_step))
            ids.append(self.reader.order.locate(first, count).reshape(shape).swapaxes(0, 1))
            tokens.append(self.reader.read(first, count).reshape(*shape, -1).swapaxes(0, 1))
        return {"step": np.concatenate(steps), "row_ids": np.concatenate(ids), "tokens": np.concatenate(tokens)}


def steps_of(iterator: DataIterator, slots: int, world_size: int) -> Iterator[StepRows]:
    """Turn a worker's units into its rows of each step.

    Raises: ConfigError if the workers do not divide the slots.
    """
    if slots % world_size:
        raise ConfigError(
            f"num_workers={world_size}: must divide the {slots} parts into which a step's rows are cut. "
            "Give a number of workers that divides the rows of a step."
        )
    units: list[dict[str, Any]] = []
    for batch in iterator.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2 * slots // world_size):
        for unit in range(len(batch["step"])):
            units.append({name: column[unit] for name, column in batch.items()})
            if len(units) == slots // world_size:
                yield from _interleave(units)
                units = []


def _interleave(units: list[dict[str, Any]]) -> Iterator[StepRows]:
    first_step = int(units[0]["step"])
    assert all(int(unit["step"]) == first_step for unit in units), "the units of a span arrive together"
    for offset in range(len(units[0]["row_ids"])):
        ids = np.concatenate([unit["row_ids"][offset] for unit in units])
        yield StepRows(first_step + offset, ids, np.concatenate([unit["tokens"][offset] for unit in units]))
