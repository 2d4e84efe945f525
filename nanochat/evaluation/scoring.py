"""Options to their nats per token: what every likelihood evaluation asks of a model.

A group is the options of one example, such as a question with each of its choices. The tokens that its options share
from the start are computed once: the shared prefixes of many groups are prefilled as one batch, each option goes on
behind the pages of its group's, and only the options' own ends follow. The head runs at scored positions alone. An
option of one token after the shared ones, such as an answer's letter, is read off the prefix and costs nothing more.

Shapes: B rows, T positions, C width, N scored tokens.
Source of the comparison by mean nats: llm-foundry, as DCLM (arXiv:2406.11794) uses it.
Not covered: prefixes shared between groups.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import CheckpointError, DataError
from nanochat.inference.paged_cache import PAGE_TOKENS, Chunk, PagedKVCache, pages_for
from nanochat.model.gpt import GPT
from nanochat.model.loss import CHUNK_TOKENS

Item = TypeVar("Item")

BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768, "mps": 8192}
"""Tokens of a batch by kind of device, an option's shared prefix included each time. On CPU larger ones
leave its caches: a depth-4 model, ARC-easy in float32: 3.9 s of CPU time at 2,048, 5.3 at 8,192 and 4.3 one example at
a time (one core, AMD EPYC, 2026-11-25)."""


@dataclass(frozen=True)
class Option:
    """A sequence of which the last part is scored."""

    tokens: tuple[int, ...]
    """The whole sequence."""
    start: int
    """tokens[start:] are scored; from 1 to len(tokens) - 1."""


Group = Sequence[Option]
"""The options of one example."""


class Score(NamedTuple):
    """What the model says of an option's scored tokens."""

    mean_nats: float
    """Negative log likelihood per token."""
    is_greedy: bool
    """Whether each is the likeliest token at its place."""


class Scorer(Protocol):
    """A model and its tokenizer."""

    bos: int
    """The token that every sequence begins with."""
    max_tokens: int
    """Longer options are cropped (`cropped`)."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        ...

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        """Return a score for every option of every group; equal options of a group have equal scores."""
        ...


def common_prefix(sequences: Sequence[tuple[int, ...]]) -> int:
    """Return how many tokens all sequences share from the start."""
    least, greatest = min(sequences), max(sequences)  # all others lie between the two, and share what they share
    for place, (one, other) in enumerate(zip(least, greatest)):
        if one != other:
            return place
    return len(least)


def cropped(group: Group, max_tokens: int, bos: int | None) -> list[Option]:
    """Return the group with its context cropped from the left, so that the longest option has max_tokens.

    All options lose the same tokens, so what they shared they share still; a BOS in front stays; scored tokens stay.
    Raises: DataError if they alone do not fit.
    """
    excess = max((len(option.tokens) for option in group), default=0) - max_tokens
    if excess <= 0:
        return list(group)
    if (start := min(option.start for option in group)) <= excess:
        raise DataError(
            f"max_tokens={max_tokens}: an option has {excess} tokens too many, of which only {start - 1} are context. "
            "Use a model with longer rows."
        )
    kept = 1 if all(option.tokens[0] == bos for option in group) else 0
    return [Option(option.tokens[:kept] + option.tokens[kept + excess :], option.start - excess) for option in group]


def cut_by_length(items: Iterable[Item], length: Callable[[Item], int], budget: int) -> Iterator[list[Item]]:
    """Yield the items in runs of like length, the longest first, of which none pads to more than `budget` tokens."""
    run: list[Item] = []
    for item in sorted(items, key=length, reverse=True):
        if run and (len(run) + 1) * length(run[0]) > budget:
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def judged(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nats of each target and whether it is the likeliest token (the first of equals)."""
    return F.cross_entropy(logits_NV, targets_N, reduction="none"), logits_NV.argmax(dim=-1) == targets_N


def score_of(nats: Sequence[float], greedy: Sequence[bool]) -> Score:
    """Return the score of an option from its tokens'. Raises: CheckpointError if they are no numbers."""
    if math.isnan(mean_nats := sum(nats) / len(nats)):
        raise CheckpointError("nats=nan: the model computes no numbers. Its weights are damaged; score another one.")
    return Score(mean_nats, all(greedy))


@dataclass(frozen=True)
class _Shared:
    """A group made ready: its distinct options and how many tokens they share. Nobody's last token is an input."""

    place: int
    options: list[Option]
    prefix: int

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.options[0].tokens[: self.prefix]


@dataclass(frozen=True)
class _End:
    """What an option has after its group's prefix."""

    row: int
    """Of the prefix in its batch."""
    number: int
    """Of the option in its batch."""
    tokens: tuple[int, ...]


class GPTScorer:
    """A `GPT` as Scorer, on the model's device. What a score is batched with changes its rounding alone."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_tokens: int | None = None) -> None:
        """Take a model; a batch has at most `batch_tokens` (none = BATCH_TOKENS), but at least one sequence."""
        self.model = model
        self.bos: int = tokenizer.bos
        self.max_tokens = model.config.sequence_len
        self._tokenizer = tokenizer
        self._device = model.lm_head.weight.device
        self._batch_tokens = batch_tokens or BATCH_TOKENS[self._device.type]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._tokenizer.encode_ordinary(text)

    @torch.no_grad()
    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        """Score the options of every group. Raises: DataError if an option's scored tokens are too many."""
        distinct = [list(dict.fromkeys(group)) for group in groups]
        ready = [self._shared(place, options) for place, options in enumerate(distinct) if options]
        scores: list[dict[Option, Score]] = [{} for _ in groups]
        for batch in cut_by_length(ready, lambda shared: shared.prefix, self._batch_tokens):
            found = self._score_batch(batch)
            for shared in batch:
                scores[shared.place] = {option: next(found) for option in distinct[shared.place]}
        return [[scores[place][option] for option in group] for place, group in enumerate(groups)]

    def _shared(self, place: int, distinct: list[Option]) -> _Shared:
        options = cropped(distinct, self.max_tokens, self.bos)
        sequences = [option.tokens for option in options]
        return _Shared(place, options, min(common_prefix(sequences), min(map(len, sequences)) - 1))

    def _score_batch(self, batch: list[_Shared]) -> Iterator[Score]:
        """Yield the scores of the batch's options in order."""
        options = [(row, shared.prefix, option) for row, shared in enumerate(batch) for option in shared.options]
        ends = [
            _End(row, number, option.tokens[prefix:-1])
            for number, (row, prefix, option) in enumerate(options)
            if len(option.tokens) - 1 > prefix
        ]
        runs = list(cut_by_length(ends, lambda end: batch[end.row].prefix + len(end.tokens), self._batch_tokens))
        tables = _numbered(1, [pages_for(shared.prefix) for shared in batch])
        own = [[self._own_pages(batch, end) for end in run] for run in runs]
        first_own = 1 + sum(map(len, tables))
        pages = first_own + max(map(sum, own), default=0)
        cache = PagedKVCache(self.model.config, pages, self.model.compute_dtype, self._device)
        hidden = self._forward(cache, [Chunk(one.tokens, 0, -1, table) for one, table in zip(batch, tables)])
        predicting = [[hidden[row][option.start - 1 : prefix]] for row, prefix, option in options]
        for run, counts in zip(runs, own, strict=True):
            chunks, halves = [], []
            for end, added in zip(run, _numbered(first_own, counts), strict=True):
                prefix, whole = batch[end.row].prefix, batch[end.row].prefix // PAGE_TOKENS
                if prefix % PAGE_TOKENS:
                    halves.append((tables[end.row][whole], added[0]))
                table = [*tables[end.row][:whole], *added]
                chunks.append(Chunk(end.tokens, prefix, batch[end.row].tokens[-1], table))
            if halves:
                cache.copy_pages(*zip(*halves))
            for end, hidden_TC in zip(run, self._forward(cache, chunks), strict=True):
                _, prefix, option = options[end.number]
                predicting[end.number].append(hidden_TC[max(option.start - 1 - prefix, 0) :])
        hidden_NC = torch.cat([part for parts in predicting for part in parts])
        targets = [token for _, _, option in options for token in option.tokens[option.start :]]
        nats, greedy = self._predict(hidden_NC, torch.tensor(targets, device=self._device))
        end = 0
        for _, _, option in options:
            begin, end = end, end + len(option.tokens) - option.start
            yield score_of(nats[begin:end], greedy[begin:end])

    def _predict(self, hidden_NC: Tensor, targets_N: Tensor) -> tuple[list[float], list[bool]]:
        """Return each target's nats and whether it is the likeliest token."""
        chunk = CHUNK_TOKENS[self._device.type]
        chunks = zip(hidden_NC.split(chunk), targets_N.split(chunk), strict=True)
        nats, greedy = zip(*(judged(self.model.logits(chunk_NC), chunk_N) for chunk_NC, chunk_N in chunks))
        return torch.cat(nats).tolist(), torch.cat(greedy).tolist()

    def _forward(self, cache: PagedKVCache, chunks: Sequence[Chunk]) -> Sequence[Tensor]:
        """Return the hidden states of each chunk, (T, C)."""
        batch = cache.batch(chunks)
        return self.model(batch.tokens_BT, cache=batch)[0].split([len(chunk.tokens) for chunk in chunks])

    def _own_pages(self, batch: list[_Shared], end: _End) -> int:
        """Return how many pages an option needs beside the full ones of its group."""
        prefix = batch[end.row].prefix
        return pages_for(prefix + len(end.tokens)) - prefix // PAGE_TOKENS


def _numbered(first: int, counts: Sequence[int]) -> list[list[int]]:
    """Return lists of so many numbers, one after the other, from `first` on."""
    numbers = itertools.count(first)
    return [list(itertools.islice(numbers, count)) for count in counts]
