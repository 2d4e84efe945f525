"""Steps in which every sequence computes one token, replayed as CUDA graphs.

Launched one by one, a step's kernels keep the processor busy for longer than the GPU: 12 layers and 32 sequences took
18.9 ms, of which the GPU computed 1.6 (NVIDIA H200, 2026-11-27). A graph launches all at once, and has fixed shapes:
rows and pages are padded to powers of two, and what is needed is captured when it is needed first.

Source of the idea: vLLM's CUDA graphs of decoding, Kwon et al. 2023 (arXiv 2309.06180).
Not covered: steps that compute prompts, which are few; the choice of tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat.inference.paged_cache import Chunk, FlatBatch, PagedKVCache, power_of_two
from nanochat.model.gpt import GPT

NOBODY = Chunk(tokens=(0,), start=0, previous=-1, pages=(0,))
"""A row of padding: its keys and values go to page 0."""


class _Captured(NamedTuple):
    batch: FlatBatch
    graph: torch.cuda.CUDAGraph
    hidden_NC: Tensor


class DecodingGraphs:
    """The graphs of one model and cache on one GPU; the weights may change in place."""

    def __init__(self, model: GPT, cache: PagedKVCache) -> None:
        self.model, self.cache = model, cache
        self._pool = torch.cuda.graph_pool_handle()
        self._by_sizes: dict[tuple[int, ...], _Captured] = {}

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Return the hidden state of each chunk's one token, (N, C); the next run overwrites it."""
        padding = [NOBODY] * (power_of_two(len(chunks)) - len(chunks))
        batch = self.cache.batch([*chunks, *padding], rounded=True)
        if batch.sizes not in self._by_sizes:
            self._by_sizes[batch.sizes] = self._capture(batch)
        captured = self._by_sizes[batch.sizes]
        captured.batch.numbers.copy_(batch.numbers)
        captured.graph.replay()
        return captured.hidden_NC[: len(chunks)]

    def _capture(self, batch: FlatBatch) -> _Captured:
        """Record the kernels of a forward, after one beside it, in which libraries set up what they need."""
        current, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            self.model(batch.tokens_BT, cache=batch)
        current.wait_stream(beside)
        batch.forget_biases()  # or the graph would not compute them
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden_NC = self.model(batch.tokens_BT, cache=batch)[0]
        return _Captured(batch, graph, hidden_NC)
