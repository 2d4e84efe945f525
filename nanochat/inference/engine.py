"""Prompts to tokens, many requests of different lengths at once: continuous batching over the rows of one KV cache.

Each request holds a slot, a row of the cache, from its prefill to its end; when slots are free, waiting requests are
prefilled together in a batch of their own and copied into them, so a long answer keeps no one waiting. What a request
samples is a function of its own seed and position, never of its company.

Shapes: B rows, V vocabulary. Not covered: paging, sharing of prefixes, prefill in chunks.
Source of the idea: continuous batching, Orca (OSDI 2022), section 3.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch

from nanochat.errors import ConfigError
from nanochat.inference.kv_cache import KVCache
from nanochat.inference.sampling import sample_tokens
from nanochat.model.gpt import GPT

PREFILL_SHARE = 4

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One completion that is asked for."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    """At most this many new tokens; the end token is one of them."""
    stop_tokens: frozenset[int] = frozenset()
    """Ids that end the completion; the one that did is its last token."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    seed: int = 0
    """Two requests with the same prompt, parameters and seed give the same tokens."""
    banned: frozenset[int] = frozenset()
    """Ids that are never sampled."""
    first_position: int = 0
    """Draws count from here: a request that goes on where another stopped goes on in its random numbers."""


@dataclass(frozen=True)
class Event:
    """A token of a request's completion."""

    id: int
    token: int
    finish_reason: FinishReason | None = None
    """Why the completion ends with this token; None while it goes on."""
    is_forced: bool = False
    """Whether a tool said it, not the model."""


class TokenSource(Protocol):
    """What turns requests into events: the engine, or a tool loop above one."""

    def add(self, request: Request) -> int:
        """Queue a request and return its id."""
        ...

    def step(self) -> list[Event]:
        """Work for a moment and return what came of it; nothing if nothing waits or runs."""
        ...

    def abort(self, id: int) -> None:
        """Forget a request; it gives no more events."""
        ...


@dataclass
class _Running:
    id: int
    request: Request
    slot: int
    count: int = 0
    """Tokens sampled so far."""
    last: int = -1


class Engine:
    """Serves requests with a model; `add`, then `step` until every request has an event with a finish reason."""

    def __init__(self, model: GPT, *, slots: int = 32, capacity: int | None = None) -> None:
        """Allocate the cache: `slots` rows of `capacity` tokens, none = the length that the model was trained for."""
        self.model = model
        self.capacity = capacity or model.config.sequence_len
        self.device = model.lm_head.weight.device
        self.cache = KVCache(model.config, slots, self.capacity, model.compute_dtype, self.device)
        self._free = list(range(slots))[::-1]
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: dict[int, _Running] = {}
        self._next_id = 0

    def add(self, request: Request) -> int:
        """Queue a request and return its id.

        Raises: ConfigError if prompt and completion do not fit a slot, or there is nothing to do.
        """
        needed = len(request.prompt) + request.max_new_tokens
        if not request.prompt or request.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={request.max_new_tokens}: must be at least 1, after at least one token.")
        if needed > self.capacity:
            raise ConfigError(
                f"max_new_tokens={request.max_new_tokens}: with a prompt of {len(request.prompt)} tokens must be at "
                f"most {self.capacity} in all. Shorten one of them."
            )
        self._next_id += 1
        self._waiting.append((self._next_id, request))
        return self._next_id

    def abort(self, id: int) -> None:
        """Forget a request, waiting or running; an unknown id is none."""
        self._waiting = deque(item for item in self._waiting if item[0] != id)
        if id in self._running:
            self._release(self._running[id])

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Prefill waiting requests into free slots, or else decode one token of every running one.

        A prefill starts when it takes in all that wait, or fills a quarter of the slots: many small ones cost more.
        """
        free, waiting = len(self._free), len(self._waiting)
        if waiting and free and (waiting <= free or free * PREFILL_SHARE >= len(self.cache.lengths)):
            return self._prefill([self._waiting.popleft() for _ in range(min(len(self._waiting), len(self._free)))])
        return self._decode() if self._running else []

    def _prefill(self, admitted: list[tuple[int, Request]]) -> list[Event]:
        lengths = [len(request.prompt) for _, request in admitted]
        padded_BT = np.zeros((len(admitted), max(lengths)), dtype=np.int64)
        for row, (_, request) in enumerate(admitted):
            padded_BT[row, : lengths[row]] = request.prompt
        cache = KVCache(self.model.config, len(admitted), max(lengths), self.model.compute_dtype, self.device)
        hidden_BTC = self.model(torch.from_numpy(padded_BT).to(self.device), cache=cache)
        cache.advance(lengths)
        last_BC = hidden_BTC[torch.arange(len(admitted)), torch.tensor(lengths) - 1]
        started = [_Running(id, request, self._free.pop()) for id, request in admitted]
        self._running |= {running.id: running for running in started}  # first: an interrupt must not lose the slots
        self.cache.put([running.slot for running in started], cache)
        return self._sample(started, last_BC)

    def _decode(self) -> list[Event]:
        running = list(self._running.values())
        tokens_B1 = torch.zeros(len(self.cache.lengths), 1, dtype=torch.int64)
        counts = [0] * len(self.cache.lengths)
        for one in running:
            tokens_B1[one.slot], counts[one.slot] = one.last, 1
        hidden_BTC = self.model(tokens_B1.to(self.device), cache=self.cache)
        self.cache.advance(counts)
        return self._sample(running, hidden_BTC[[one.slot for one in running], 0])

    def _sample(self, running: list[_Running], hidden_BC: torch.Tensor) -> list[Event]:
        """Draw one token of each running request from its last hidden state, and end those that are done."""
        requests = [one.request for one in running]
        logits_BV = self.model.logits(hidden_BC)
        for row, request in enumerate(requests):
            logits_BV[row, list(request.banned)] = float("-inf")
        tokens = sample_tokens(
            logits_BV,
            temperatures=[request.temperature for request in requests],
            top_ks=[request.top_k for request in requests],
            uniforms=[uniform(one.request.seed, one.request.first_position + one.count) for one in running],
        ).tolist()
        events = []
        for one, token in zip(running, tokens, strict=True):
            one.count, one.last = one.count + 1, token
            stopped = token in one.request.stop_tokens
            reason: FinishReason | None = "stop" if stopped else None
            if not stopped and one.count == one.request.max_new_tokens:
                reason = "length"
            events.append(Event(one.id, token, reason))
            if reason is not None:
                self._release(one)
        return events

    def _release(self, one: _Running) -> None:
        del self._running[one.id]
        self._free.append(one.slot)
        self.cache.reset([one.slot])


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that depends on its arguments alone."""
    return float(np.random.PCG64(np.random.SeedSequence([seed, position])).random_raw() >> 11) * 2.0**-53


@dataclass
class Completion:
    """What a request gave."""

    tokens: list[int] = field(default_factory=list)
    """The end token, if it came, is the last."""
    is_forced: list[bool] = field(default_factory=list)
    """Of each token, whether a tool said it."""
    finish_reason: FinishReason | None = None


def complete(source: TokenSource, requests: Iterable[Request]) -> list[Completion]:
    """Run requests to their ends and return their completions, in order."""
    completions = {source.add(request): Completion() for request in requests}
    unfinished = len(completions)
    while unfinished:
        for event in source.step():
            completion = completions[event.id]
            completion.tokens.append(event.token)
            completion.is_forced.append(event.is_forced)
            completion.finish_reason = event.finish_reason
            unfinished -= event.finish_reason is not None
    return list(completions.values())
