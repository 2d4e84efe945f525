"""Pages of sequences that decode to rows that stay from step to step: products read them where they lie.

Gathering the pages anew took a quarter of a step of 32 sequences (depth 4, 1 core, AMD EPYC, 2026-11-27). Here a row
is gathered when its sequence begins to decode, when its window has moved by a page, and when the longest takes another
page; else a step adds one token. Rows are no longer than that: oneDNN copies what does not lie in one piece.

Shapes: B rows, S slots of each, N whatever is counted; the others are those of paged_cache.py.
Not covered: GPUs, where a step's index operations cost little.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class DecodingRows:
    """Copies of what the sequences of the last step see, window by window; in all as large as the pages."""

    def __init__(self, k_LGPSD: Tensor, v_LGPSD: Tensor, windows: Sequence[int]) -> None:
        """Copy from these pages; `windows` are those of the layers."""
        self._paged, self._windows = (k_LGPSD, v_LGPSD), windows
        self._copied = tuple(torch.zeros_like(paged).flatten(1) for paged in self._paged)
        self._held: list[tuple[Sequence[int], int]] = []
        """Of each row: its sequence's table, the very object, and the sequence's tokens."""
        self._firsts: dict[int, list[int]] = {}
        """By window: the first page of each row."""
        self._counts: dict[int, int] = {}
        """By window: pages of a row."""

    def order(self, tables: Sequence[Sequence[int]]) -> list[int]:
        """Return the order of sequences, told by their tables, in which most keep their row."""
        row_of = {id(table): row for row, (table, _) in enumerate(self._held)}
        rows = [row_of.get(id(table), len(tables)) for table in tables]
        others = iter([place for place, row in enumerate(rows) if row >= len(tables)])
        place_of = {row: place for place, row in enumerate(rows)}
        return [place_of[row] if row in place_of else next(others) for row in range(len(tables))]

    def follow(
        self, steps: Sequence[tuple[Sequence[int], int]], seen: Mapping[int, tuple[list[int], Tensor]]
    ) -> dict[int, Tensor]:
        """Hold sequences, each told by its table and the place of the token that a step computes.

        `seen` has, by window, each one's first page and all their pages, flat, (B * pages of a row,). Returns, by
        window, the slots of the new tokens, (B * G,); a window whose pages are too many for the memory has none.
        """
        B, page_tokens = len(steps), self._paged[0].shape[3]
        goes_on = [table is step[0] and tokens == step[1] for (table, tokens), step in zip(self._held, steps)]
        self._held = [(table, place + 1) for table, place in steps]
        slots = {}
        for window, (firsts, table_P) in seen.items():
            count, before = len(table_P) // B, self._firsts.pop(window, [])
            if len(table_P) > self._paged[0].shape[2]:
                continue
            is_kept = [kept and old == new for kept, old, new in zip(goes_on, before, firsts)]
            if self._counts.get(window) != count:
                is_kept = []
            self._firsts[window], self._counts[window] = firsts, count
            rows = [row for row in range(B) if row >= len(is_kept) or not is_kept[row]]
            if rows:
                self._fill(window, torch.tensor(rows), table_P.view(B, count)[rows].flatten(), B)
            place_B = torch.tensor([place - first * page_tokens for (_, place), first in zip(steps, firsts)])
            start_N = torch.arange(B * self._paged[0].shape[1]) * (count * page_tokens)
            slots[window] = (start_N.view(B, -1) + place_B[:, None]).flatten()
        return slots

    def layer(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """Return the first rows' keys and values in a layer, k_NSD and v_NSD, where N = B * G."""
        _, G, _, page_tokens, D = self._paged[0].shape
        shape = (rows * G, self._counts[self._windows[layer]] * page_tokens, D)
        k_NSD, v_NSD = (copied[layer, : math.prod(shape)].view(shape) for copied in self._copied)
        return k_NSD, v_NSD

    def _fill(self, window: int, row_N: Tensor, table_P: Tensor, rows: int) -> None:
        """Copy the pages of some of the rows."""
        _, G, _, _, D = self._paged[0].shape
        for layer in [layer for layer, one in enumerate(self._windows) if one == window]:
            for paged, copied_NSD in zip(self._paged, self.layer(layer, rows), strict=True):
                gathered_GNSD = paged[layer].index_select(1, table_P).view(G, len(row_N), -1, D)
                copied_NSD.unflatten(0, (rows, G)).index_copy_(0, row_N, gathered_GNSD.transpose(0, 1))
