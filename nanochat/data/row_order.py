"""Which rows a step trains on: a pure function of (seed, manifest, position), whatever the workers and restarts.

Positions count the rows of an endless sequence over epochs; global step s trains on positions s*R to (s+1)*R - 1 for R
rows a step, and a step may straddle epochs. Each epoch permutes the row groups, cuts that order into windows of
WINDOW_GROUPS, and permutes the rows of each window: neighbours mix well, yet a reader holds few groups at a time and
reads each once (random single rows of parquet would be a hundred times slower). Any position is found directly.

Permutations are argsorts of raw PCG64 output seeded by (seed, epoch, window): numpy keeps SeedSequence and PCG64 as
they are between versions, which it does not promise of Generator.permutation.
Source: the two-level shuffle of WebDataset and MosaicML Streaming, made stateless.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from nanochat.data.documents import Split
from nanochat.data.token_shards import TokenShards

WINDOW_GROUPS = 8

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepRows:
    """One worker's rows of one step."""

    step: int
    row_ids: np.ndarray
    """Global row numbers, int64 of shape (rows,)."""
    rows_BT1: np.ndarray
    """Tokens, uint16 or uint32 of shape (rows, sequence_len + 1)."""


class RowOrder:
    """The endless, shuffled sequence of a split's rows."""

    def __init__(self, groups: Sequence[tuple[int, int, int]], seed: int, window_groups: int = WINDOW_GROUPS) -> None:
        """Order the rows of (shard, row group, rows) triples in manifest order; rows are at least 1 in all."""
        self._groups = np.array(groups, dtype=np.int64).reshape(-1, 3)
        self._seed = seed
        self._window_groups = window_groups
        self._ends = np.cumsum(self._groups[:, 2])  # of each group, in global row ids
        self.rows_per_epoch = int(self._ends[-1]) if len(groups) else 0
        """Rows of the split."""
        assert self.rows_per_epoch > 0, "there are rows to order"
        self._epoch: tuple[int, Indices, Indices] | None = None
        self._window: tuple[tuple[int, int], Indices] | None = None

    def locate(self, first: int, count: int) -> Indices:
        """Return the global row ids (row numbers in manifest order) at positions first to first + count - 1."""
        assert first >= 0, "positions count from 0"
        assert count >= 0, "a count is not negative"
        parts: list[Indices] = []
        while count > 0:
            epoch, place = divmod(first, self.rows_per_epoch)
            order, window_ends = self._epoch_order(epoch)
            window = int(np.searchsorted(window_ends, place, side="right"))
            rows = self._window_rows(epoch, window, order)
            start = place - (int(window_ends[window]) - len(rows))
            part = rows[start : start + count]
            parts.append(part)
            first += len(part)
            count -= len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def reads(self, first: int, count: int) -> Indices:
        """Return (shard, row group, row in the group) of the same rows, (count, 3)."""
        ids = self.locate(first, count)
        places = np.searchsorted(self._ends, ids, side="right")
        rows = ids - (self._ends[places] - self._groups[places, 2])
        return np.column_stack([self._groups[places, :2], rows])

    def _epoch_order(self, epoch: int) -> tuple[Indices, Indices]:
        """Return the epoch's order of groups, and where each of its windows ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = _permutation(len(self._groups), [self._seed, epoch])
            ends = np.cumsum(self._groups[order, 2])
            last = np.append(np.arange(self._window_groups, len(order), self._window_groups), len(order)) - 1
            self._epoch = (epoch, order, ends[last])
        return self._epoch[1:]

    def _window_rows(self, epoch: int, window: int, order: Indices) -> Indices:
        """Return the global row ids of a window, shuffled."""
        if self._window is None or self._window[0] != (epoch, window):
            groups = order[window * self._window_groups :][: self._window_groups]
            ends, sizes = self._ends[groups], self._groups[groups, 2]
            rows = np.concatenate([np.arange(end - size, end) for end, size in zip(ends, sizes)])
            self._window = ((epoch, window), rows[_permutation(len(rows), [self._seed, epoch, window])])
        return self._window[1]


class RowReader:
    """Reads the rows of an order from token shards, keeping the groups of about two windows in memory."""

    def __init__(self, shards: TokenShards, split: Split, seed: int, window_groups: int = WINDOW_GROUPS) -> None:
        """Prepare to read; nothing is opened yet."""
        self.order = RowOrder(shards.groups(split), seed, window_groups)
        self._arguments = (shards, split, seed, window_groups)
        self._groups: OrderedDict[tuple[int, int], npt.NDArray[Any]] = OrderedDict()
        self._file: tuple[int, pq.ParquetFile] | None = None

    def __reduce__(self) -> tuple[type["RowReader"], tuple[TokenShards, Split, int, int]]:
        return RowReader, self._arguments  # open files and cached rows stay behind

    def read(self, first: int, count: int) -> npt.NDArray[Any]:
        """Return the rows at positions first to first + count - 1, (count, sequence_len + 1), in the stored type.

        Raises: DataError naming a shard that cannot be read.
        """
        shards, *_ = self._arguments
        rows = np.empty((count, shards.sequence_len + 1), shards.dtype)
        for place, (shard, group, row) in enumerate(self.order.reads(first, count).tolist()):
            rows[place] = self._group(shard, group)[row]
        return rows

    def _group(self, shard: int, group: int) -> npt.NDArray[Any]:
        shards, split, _, window_groups = self._arguments
        key = (shard, group)
        if key not in self._groups:
            record = shards.split(split)[shard]
            if self._file is None or self._file[0] != shard:
                self._close()
                self._file = (shard, shards.open(record))
            self._groups[key] = shards.read_group(self._file[1], record, group)
            if len(self._groups) > 2 * window_groups:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _close(self) -> None:
        if self._file is not None:
            self._file[1].close()
            self._file = None


def _permutation(size: int, seeds: list[int]) -> Indices:
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(size), kind="stable")
