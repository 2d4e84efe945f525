"""Documents to rows: every row holds row_tokens tokens, begins with BOS, and wastes none.

Best fit: a row takes the largest waiting piece that fits, again and again; when none fits, the longest waiting piece is
split, its beginning fills the row and its rest waits on. Every piece begins with BOS, those that continue a document
too, so that no row begins in the middle of nowhere. Nothing is lost but the last row, where that is not full.
Conversations are never split: where none fits, the rest of the row is BOS.

The order of rows depends on the order of documents alone, not on how they come in batches, and memory on
buffer_documents and the longest document.

Source: best fit is nanochat's dataloader (BOS-aligned, karpathy/nanochat), which cuts long documents off instead;
Ding et al. 2024 (arXiv 2404.10830) measure what truncation costs.
Not covered: which pieces of a row may see each other (the model's document mask).
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PACKING_VERSION = 1
"""Raise it when the same documents would give other rows: shards of another version are packed again."""

Tokens = npt.NDArray[Any]


@dataclass
class PackCounts:
    """What became of the tokens. All of a row that is not a document's token is BOS."""

    rows: int = 0
    tokens: int = 0
    """Tokens of all documents, without BOS."""
    cropped_tokens: int = 0
    """Those of them that are in no row."""


class Packer:
    """Pack the documents of one source shard: `add` each, then `finish`; both yield blocks of rows."""

    def __init__(
        self,
        *,
        row_tokens: int,
        bos: int,
        dtype: npt.DTypeLike,
        buffer_documents: int,
        block_rows: int,
        splits: bool = True,
    ) -> None:
        """Prepare for rows of row_tokens; blocks are (block_rows, row_tokens), the last one may have fewer rows.

        Without `splits` no document is split, and none may be longer than row_tokens - 1.
        """
        self.counts = PackCounts()
        self._bos = bos
        self._longest = row_tokens - 1  # tokens of a piece, without its BOS
        self._buffer_documents = buffer_documents
        self._block_rows = block_rows
        self._splits = splits
        self._waiting = _WaitingPieces(self._longest)
        self._row = np.empty(row_tokens, dtype)
        self._filled = 0  # tokens of that row
        self._block = np.empty((block_rows, row_tokens), dtype)
        self._rows_in_block = 0

    @property
    def waiting(self) -> int:
        """Pieces in the buffer, at most buffer_documents."""
        return self._waiting.count

    def add(self, document: Tokens) -> Iterator[Tokens]:
        """Take a document's tokens (1-d, without BOS; an empty one is none) and yield the blocks that became full."""
        assert self._splits or len(document) <= self._longest, "what is not split fits into a row"
        self.counts.tokens += len(document)
        whole = len(document) - len(document) % self._longest
        if whole:
            yield from self._add_rows(document[:whole].reshape(-1, self._longest))
        if whole < len(document):
            # A copy: a view would keep all of a long document in memory.
            self._waiting.push(document[whole:].astype(self._row.dtype))
        while self._waiting.count >= self._buffer_documents:
            yield from self._fill_row()

    def finish(self, *, keep_last: bool) -> Iterator[Tokens]:
        """Pack what waits and yield the remaining rows; a last row that is not full is padded with BOS, or dropped."""
        while self._waiting.count:
            yield from self._fill_row()
        if self._filled and keep_last:
            self._row[self._filled :] = self._bos
            yield from self._close_row()
        elif self._filled:
            self.counts.cropped_tokens += int(np.count_nonzero(self._row[: self._filled] != self._bos))
            self._filled = 0
        if self._rows_in_block:
            yield self._block[: self._rows_in_block]
            self._rows_in_block = 0

    def _fill_row(self) -> Iterator[Tokens]:
        """Fill the open row; it stays open if the buffer runs out first."""
        row_tokens = len(self._row)
        while (gap := row_tokens - self._filled) > 1:
            if not self._waiting.count:
                return
            piece = self._waiting.pop_largest(gap - 1)
            if piece is None and not self._splits:
                break
            if piece is None:
                longest = self._waiting.pop_largest(self._longest)
                assert longest is not None, "a piece waits"
                piece = longest[: gap - 1]
                self._waiting.push(longest[gap - 1 :])
            end = self._filled + 1 + len(piece)
            self._row[self._filled] = self._bos
            self._row[self._filled + 1 : end] = piece
            self._filled = end
        self._row[self._filled :] = self._bos
        yield from self._close_row()

    def _close_row(self) -> Iterator[Tokens]:
        self._filled = 0
        return self._add_rows(self._row[None, 1:])

    def _add_rows(self, bodies: Tokens) -> Iterator[Tokens]:
        """Append rows, given without their first BOS, to the block; yield it whenever it is full."""
        self.counts.rows += len(bodies)
        while len(bodies):
            begin = self._rows_in_block
            part = bodies[: self._block_rows - begin]
            self._rows_in_block += len(part)
            self._block[begin : self._rows_in_block, 0] = self._bos
            self._block[begin : self._rows_in_block, 1:] = part
            bodies = bodies[len(part) :]
            if self._rows_in_block == self._block_rows:
                yield self._block
                self._block = np.empty_like(self._block)
                self._rows_in_block = 0


class _WaitingPieces:
    """Pieces by length, first come first out among equals; the largest that fits is found in a bit mask."""

    def __init__(self, longest: int) -> None:
        self.count = 0
        self._by_length: list[deque[Tokens]] = [deque() for _ in range(longest + 1)]
        self._mask = 0  # bit n is set while a piece of n tokens waits

    def push(self, piece: Tokens) -> None:
        self._by_length[len(piece)].append(piece)
        self._mask |= 1 << len(piece)
        self.count += 1

    def pop_largest(self, limit: int) -> Tokens | None:
        """Take the first of the largest pieces with at most `limit` tokens; None if all are larger."""
        length = (self._mask & ((2 << limit) - 1)).bit_length() - 1
        if length < 0:
            return None
        pieces = self._by_length[length]
        piece = pieces.popleft()
        if not pieces:
            self._mask ^= 1 << length
        self.count -= 1
        return piece
