"""Keys and values in pages to what a step's tokens attend to: sequences of any length and age in one flat batch.

A page holds PAGE_TOKENS tokens of one sequence in every layer. A sequence has a table of its pages; sequences that
begin alike share pages, since a full page never changes. A step's tokens stand one after the other, (1, N), whatever
sequence they belong to: all but attention treats tokens one by one, so padding costs nothing there. Attention pads
chunks to the longest of their group.

Shapes: N tokens of the step, L layers, P pages, B chunks of a group, T their tokens, S key slots, H query heads, G KV
heads, R = H / G, D head size.
Source of the idea: PagedAttention, Kwon et al. 2023 (arXiv 2309.06180).
Not covered: which page is whose (page_pool.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat.config.model import ModelConfig
from nanochat.errors import ConfigError
from nanochat.inference.paged_attention import decoding_attention
from nanochat.model.attention import attention
from nanochat.training.hardware import Hardware

PAGE_TOKENS = 32


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence that a step computes."""

    tokens: Sequence[int]
    start: int
    """Tokens of the sequence before them; they are in the cache."""
    previous: int
    """The token before, -1 where there is none."""
    pages: Sequence[int]
    """The sequence's table, up to the page of the chunk's last token at least."""
    is_given: bool = False
    """Its tokens were given, not drawn. A single one is computed as it would be among others: the kernel for sequences
    that decode rounds less in bfloat16, and a prompt would mean something else behind a known prefix."""

    @property
    def decodes(self) -> bool:
        """Whether it is the one token that its sequence has drawn last."""
        return len(self.tokens) == 1 and not self.is_given


def pages_for(tokens: int) -> int:
    """Return how many pages some tokens take."""
    return -(-tokens // PAGE_TOKENS)


def cache_bytes(config: ModelConfig, pages: int, dtype: torch.dtype) -> int:
    """Return what the keys and values of so many pages take."""
    return 2 * config.n_layer * config.n_kv_head * config.head_dim * pages * PAGE_TOKENS * dtype.itemsize


class Room(NamedTuple):
    """How large a cache is."""

    pages: int
    """Without the one for padding."""
    capacity: int
    """Tokens of the longest request, prompt and completion."""
    needed_bytes: int


def room_for(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, max_running: int, longest: int | None,
    cache_tokens: int | None,
) -> Room:  # fmt: skip
    """Return the room for requests of at most `longest` tokens, none = what the model was trained for.

    `cache_tokens`, of all sequences together, none = as many as `max_running` of the longest have.
    Raises: ConfigError if the device has less.
    """
    longest = longest or config.sequence_len
    pages = max_running * pages_for(longest) if cache_tokens is None else pages_for(cache_tokens)
    free = Hardware(device, dtype, "").free_bytes()
    if (needed := cache_bytes(config, pages + 1, dtype)) > free:
        raise ConfigError(
            f"max_running={max_running}: the keys and values of {pages * PAGE_TOKENS:,} tokens need "
            f"{needed / 2**30:.2f} GiB, the device has {free / 2**30:.2f} GiB free. Lower --max-running or "
            "--kv-cache-tokens; --running of those who sample."
        )
    return Room(pages, min(longest, pages * PAGE_TOKENS), needed)


class PagedKVCache:
    """The memory of all sequences together; page 0 is for padding."""

    def __init__(self, config: ModelConfig, pages: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        """Allocate zeros for `pages` pages; `dtype` is the model's compute dtype."""
        self.config, self.device = config, torch.device(device)
        self.windows = sorted(set(config.windows))
        # Heads before pages: what a product of attention reads is gathered in one piece.
        shape = (config.n_layer, config.n_kv_head, pages, PAGE_TOKENS, config.head_dim)
        self.k_LGPSD = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LGPSD = torch.zeros(shape, dtype=dtype, device=device)
        is_cpu = self.device.type == "cpu"
        self.kernel = decoding_attention(config.head_dim, PAGE_TOKENS, dtype) if is_cpu else None

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages in all layers: a sequence that goes on behind another's half-full page needs one of its own."""
        source_P, target_P = (torch.tensor(pages, device=self.device) for pages in (sources, targets))
        for cached in (self.k_LGPSD, self.v_LGPSD):
            cached.index_copy_(2, target_P, cached.index_select(2, source_P))

    def batch(self, chunks: Sequence[Chunk], *, rounded: bool = False) -> "FlatBatch":
        """Return a step's tokens as the cache of the model's forward, which writes them into their pages.

        `rounded` looks at a power of two of pages: few shapes.
        """
        return FlatBatch(self, chunks, rounded)


@dataclass
class _Group:
    """Chunks that attend together, each from row `first` of the flat batch on."""

    chunks: list[Chunk]
    firsts: list[int]
    is_fresh: bool
    """Nothing of them is in the cache yet: they see themselves alone."""
    by_kernel: bool = False
    """They decode, and there is a kernel for such."""
    width: int = 0
    row_BT: Tensor | None = None
    """Rows of the flat batch, those of padding repeated; None if the group is the whole batch, unpadded."""
    real_BT: Tensor | None = None
    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By window: the first page that a chunk sees (B,), and the table of the pages that are seen, flat."""
    biases: dict[int, Tensor] = field(default_factory=dict)
    """By window: what is added to the scores, (B, T, S)."""

    def pages_seen(self, window: int, rounded: bool) -> tuple[list[int], list[int]]:
        """Return each chunk's first page within a window, and all their tables, padded to the longest."""
        firsts = [max(0, chunk.start - window) // PAGE_TOKENS for chunk in self.chunks]
        ends = [pages_for(chunk.start + len(chunk.tokens)) for chunk in self.chunks]
        count = max(end - first for first, end in zip(firsts, ends))
        if rounded:
            count = power_of_two(count)
        table: list[int] = []
        for chunk, first, end in zip(self.chunks, firsts, ends):
            table += [*chunk.pages[first:end], *[0] * (count - end + first)]
        return firsts, table


def power_of_two(count: int) -> int:
    """Return the least power of two that is not below a count."""
    return 1 << (count - 1).bit_length()


class FlatBatch:
    """A step's tokens, (1, N): a `Cache` of the model. What it is made of is in one tensor, `numbers`."""

    def __init__(self, cache: PagedKVCache, chunks: Sequence[Chunk], rounded: bool) -> None:
        self.cache = cache
        columns: list[tuple[int, int, int, int]] = []
        groups: dict[tuple[bool, bool, int], _Group] = {}
        for chunk in chunks:
            is_fresh = chunk.start == 0 and len(chunk.tokens) > 1
            by_kernel = chunk.decodes and cache.kernel is not None
            key = (is_fresh, by_kernel, (len(chunk.tokens) - 1).bit_length())
            group = groups.setdefault(key, _Group([], [], is_fresh, by_kernel))
            group.chunks.append(chunk)
            group.firsts.append(len(columns))
            before = [chunk.previous, *chunk.tokens[:-1]]
            for place, (token, previous) in enumerate(zip(chunk.tokens, before), start=chunk.start):
                slot = chunk.pages[place // PAGE_TOKENS] * PAGE_TOKENS + place % PAGE_TOKENS
                columns.append((token, place, previous, slot))
        self._groups = list(groups.values())
        parts = [list(column) for column in zip(*columns)]
        looks_back = [(group, window) for group in self._groups if not group.is_fresh for window in cache.windows]
        for group, window in looks_back:
            parts += group.pages_seen(window, rounded)
        self.sizes = tuple(len(part) for part in parts)
        self.numbers = torch.tensor([number for part in parts for number in part], device=cache.device)
        token_N, place_N, previous_N, self._slot_N, *tables = self.numbers.split(self.sizes)
        self.tokens_BT, self.position_BT, self.previous_BT = token_N[None], place_N[None], previous_N[None]
        for (group, window), first_B, table_P in zip(looks_back, tables[::2], tables[1::2], strict=True):
            group.seen[window] = (first_B, table_P)
        for group in self._groups:
            self._pad(group, len(columns))

    def forget_biases(self) -> None:
        """Compute them anew in the next forward."""
        for group in self._groups:
            group.biases = {}

    def attend(self, layer: int, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
        """Store the step's keys and values, and return what its queries see of their sequences, y_BTHD."""
        whole = self._groups[0].row_BT is None
        if whole and self._groups[0].by_kernel:
            return self._decode(self._groups[0], layer, q_BTHD[0], k_BTGD[0], v_BTGD[0], window)[None]
        G, D = self.cache.config.n_kv_head, self.cache.config.head_dim
        for cached, new in ((self.cache.k_LGPSD[layer], k_BTGD), (self.cache.v_LGPSD[layer], v_BTGD)):
            cached.view(G, -1, D).index_copy_(1, self._slot_N, new[0].transpose(0, 1))
        y_BTHD = q_BTHD if whole else torch.empty_like(q_BTHD)
        for group in self._groups:
            rows = (len(group.chunks), group.width)
            q, k, v = (x[0].unflatten(0, rows) if whole else x[0, group.row_BT] for x in (q_BTHD, k_BTGD, v_BTGD))
            if group.is_fresh:
                seen = attention(q, k, v, window=window)
            elif group.by_kernel:
                seen = self._decode(group, layer, q[:, 0], k[:, 0], v[:, 0], window)[:, None]
            else:
                seen = self._look_back(group, layer, q, window)
            if whole:
                return seen.flatten(0, 1)[None]
            assert group.row_BT is not None, "there are other rows"
            y_BTHD[0, group.row_BT[group.real_BT]] = seen[group.real_BT]
        return y_BTHD

    def _look_back(self, group: _Group, layer: int, q_BTHD: Tensor, window: int) -> Tensor:
        """Attend to what the chunks' pages hold; scores and softmax are float32."""
        table_P, bias_BTS = group.seen[window][1], self._bias(group, window)
        B, T, H, D = q_BTHD.shape
        G = self.cache.config.n_kv_head
        R = H // G
        k_NSD = self.cache.k_LGPSD[layer].index_select(1, table_P).view(G * B, -1, D)
        v_NSD = self.cache.v_LGPSD[layer].index_select(1, table_P).view(G * B, -1, D)
        q_NTD = q_BTHD.view(B, T, G, R, D).permute(2, 0, 3, 1, 4).reshape(G * B, R * T, D)
        scores = torch.bmm(q_NTD, k_NSD.transpose(1, 2)).view(G, B, R, T, -1).float() * D**-0.5 + bias_BTS[:, None]
        weights = torch.softmax(scores, dim=-1).to(v_NSD.dtype).view(G * B, R * T, -1)
        return torch.bmm(weights, v_NSD).view(G, B, R, T, D).permute(1, 3, 0, 2, 4).reshape(B, T, H, D)

    def _decode(
        self, group: _Group, layer: int, q_BHD: Tensor, k_BGD: Tensor, v_BGD: Tensor, window: int
    ) -> Tensor:  # fmt: skip
        """Store the keys and values of one token a sequence, and attend to what its pages hold."""
        assert self.cache.kernel is not None, "its group says so"
        place_B = self.position_BT[0] if group.row_BT is None else self.position_BT[0, group.row_BT[:, 0]]
        pages = self.cache.k_LGPSD[layer], self.cache.v_LGPSD[layer]
        return self.cache.kernel(q_BHD, k_BGD, v_BGD, *pages, *group.seen[window], place_B, window)

    def _pad(self, group: _Group, rows: int) -> None:
        """Say which rows of the flat batch a group's (B, T) are; padding repeats a chunk's last row."""
        lengths = [len(chunk.tokens) for chunk in group.chunks]
        group.width = max(lengths)
        if len(self._groups) == 1 and sum(lengths) == rows == len(lengths) * group.width:
            return
        device = self.cache.device
        length_B1 = torch.tensor(lengths, device=device)[:, None]
        place_T = torch.arange(group.width, device=device)
        group.real_BT = place_T < length_B1
        group.row_BT = torch.tensor(group.firsts, device=device)[:, None] + torch.minimum(place_T, length_B1 - 1)

    def _bias(self, group: _Group, window: int) -> Tensor:
        """Return 0 for each query and key that it sees, and minus infinity for the others."""
        if window not in group.biases:
            first_B, table_P = group.seen[window]
            B = len(group.chunks)
            query_BT = self.position_BT.view(B, -1) if group.row_BT is None else self.position_BT[0, group.row_BT]
            slot_S = torch.arange(len(table_P) // B * PAGE_TOKENS, device=first_B.device)
            distance = query_BT[:, :, None] - (first_B[:, None] * PAGE_TOKENS + slot_S)[:, None]
            bias = torch.zeros(distance.shape, device=first_B.device)
            group.biases[window] = bias.masked_fill_((distance < 0) | (distance > window), float("-inf"))
        return group.biases[window]
