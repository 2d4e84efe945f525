"""Prompts to tokens, many requests of different lengths and ages in one batch: continuous batching on a paged cache.

A step computes one token of every sequence that decodes, and chunks of prompts, up to `step_tokens` in all: a long
prompt never stalls the others. Chunks end at multiples of CHUNK_TOKENS of their sequence, whatever the load. Full
pages stay findable after their sequence's end: who begins alike starts behind them. When pages run out, the newest
sequence gives its own back and is computed again later. What a request samples is a function of its own seed and
position, never of its company (in bfloat16, where a prompt's sums round otherwise than those of drawn tokens, what was
computed again may go on otherwise).

Shapes: N tokens of a step, B sequences, V vocabulary, C width.
Sources of the ideas: continuous batching, Orca (OSDI 2022), section 3; chunked prefill, Sarathi-Serve (arXiv
2403.02310); pages and prefixes: paged_cache.py, page_pool.py.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nanochat.inference.compiled_steps import CompiledSteps
from nanochat.inference.decoding_graphs import DecodingGraphs
from nanochat.inference.drawing import Answer, draw
from nanochat.inference.page_pool import ROOT, PagePool
from nanochat.inference.paged_cache import PAGE_TOKENS, Chunk, PagedKVCache, pages_for, room_for
from nanochat.inference.requests import Event, Load, Request
from nanochat.inference.sampling import likelihoods
from nanochat.model.gpt import GPT
from nanochat.training.checkpoint import load_parameters

CHUNK_TOKENS = 96
"""Of a prompt in one step. At 128 prompts make the answers beside them stutter 2.6 times their pace, at 96 2.2 times,
at 64 1.9 times, but then prefill takes a quarter longer (depth 4, prompts of 480, 1 core, AMD EPYC, 2026-11-25)."""
STEP_TOKENS = 512


@dataclass(eq=False)
class _Sequence(Answer):
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    published: int = 0
    """Of those, tokens of published pages."""
    last_page: int = ROOT
    """The pool's name of the last published page."""

    @property
    def left(self) -> int:
        """Tokens to compute before the next one is sampled."""
        return len(self.tokens) - self.computed

    @property
    def chunk(self) -> int:
        """How many of them may be computed in one step."""
        return min(self.left, CHUNK_TOKENS - self.computed % CHUNK_TOKENS)


class Engine:
    """Serves requests with a model; `add`, then `step` until every request has an event with a finish reason."""

    def __init__(
        self, model: GPT, *, max_running: int = 32, longest: int | None = None, cache_tokens: int | None = None,
        step_tokens: int = STEP_TOKENS, compiled: bool = False,
    ) -> None:  # fmt: skip
        """Allocate the cache, as large as `paged_cache.room_for` says; `compiled`: see compiled_steps.py, on CPUs.

        Raises: ConfigError if the device has less.
        """
        self.model, self.max_running, self.step_tokens = model, max_running, max(step_tokens, max_running, CHUNK_TOKENS)
        self.device = model.lm_head.weight.device
        room = room_for(model.config, model.compute_dtype, self.device, max_running, longest, cache_tokens)
        self.capacity = room.capacity
        self.cache = PagedKVCache(model.config, room.pages + 1, model.compute_dtype, self.device)
        self.pool = PagePool(room.pages + 1, PAGE_TOKENS)
        self.graphs = DecodingGraphs(model, self.cache) if self.device.type == "cuda" else None
        self.compiled = CompiledSteps(model) if compiled and self.device.type == "cpu" else None
        self.preemptions = self.queried_tokens = self.found_tokens = 0
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        """The oldest first."""
        self._parked: list[_Sequence] = []
        """Broke off in the last step; who comes back before the next one goes on with its pages."""
        self._next_id = 0

    def add(self, request: Request) -> int:
        """Queue a request and return its id.

        Raises: ConfigError if prompt and completion are too long, or there is nothing to do, or an id is none.
        """
        request.check(self.capacity, self.model.config.vocab_size)
        self._next_id += 1
        sequence = _Sequence(self._next_id, request, list(request.prompt))
        # A completion that has begun, and comes back from a tool, does not queue again.
        if not request.continued:
            self._waiting.append(sequence)
        elif not self._go_on(sequence):
            self._waiting.appendleft(sequence)
        return self._next_id

    def _go_on(self, sequence: _Sequence) -> bool:
        """Let a sequence take the place of the parked one that it goes on from; tell whether there is one."""
        for parked in self._parked:
            if sequence.tokens[: len(parked.tokens)] == parked.tokens:
                sequence.pages, sequence.computed = parked.pages, parked.computed
                sequence.published, sequence.last_page = parked.published, parked.last_page
                sequence.cached = parked.computed
                self._parked.remove(parked)
                self._running.append(sequence)
                return True
        return False

    def load(self) -> Load:
        """Return what the engine is doing now."""
        return Load(
            running=len(self._running), waiting=len(self._waiting), kv_tokens=self.pool.pages * PAGE_TOKENS,
            kv_tokens_free=self.pool.free * PAGE_TOKENS, preemptions=self.preemptions,
            prefix_queries=self.queried_tokens, prefix_hits=self.found_tokens,
        )  # fmt: skip

    def abort(self, id: int) -> None:
        """Forget a request, waiting or running; an unknown id is none."""
        self._waiting = deque(sequence for sequence in self._waiting if sequence.id != id)
        for sequence in [sequence for sequence in self._running if sequence.id == id]:
            self._end(sequence)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Compute a step and return the tokens that it sampled, none where it computed prompts alone."""
        self._leave_parked()
        scheduled = self._schedule()
        if not scheduled:
            return []
        hidden_NC = self._forward(scheduled)
        ready: list[_Sequence] = []
        rows: list[int] = []
        end = 0
        for sequence, count in scheduled:
            if sequence.request.prompt_logprobs is not None:
                self._judge_prompt(sequence, hidden_NC[end : end + count])
            sequence.computed += count
            end += count
            self._publish(sequence)
            if sequence.left == 0:
                ready.append(sequence)
                rows.append(end - 1)
        if not ready:
            return []
        return self._sample(ready, hidden_NC if len(rows) == len(hidden_NC) else hidden_NC[rows])

    def _forward(self, scheduled: list[tuple[_Sequence, int]]) -> torch.Tensor:
        """Return the hidden states of what a step computes, hidden_NC, sequence by sequence."""
        chunks = [
            Chunk(
                sequence.tokens[sequence.computed : sequence.computed + count], sequence.computed,
                sequence.tokens[sequence.computed - 1] if sequence.computed else -1, sequence.pages,
                is_given=sequence.computed < len(sequence.request.prompt),
            )
            for sequence, count in scheduled
        ]  # fmt: skip
        if self.graphs is not None and len(chunks) == sum(count for _, count in scheduled):
            return self.graphs.run(chunks)
        batch = self.cache.batch(chunks)
        if self.compiled is not None:
            return self.compiled.run(batch)[0]
        return self.model(batch.tokens_BT, cache=batch)[0]

    def _leave_parked(self) -> None:
        """Give up the pages of who has not come back."""
        for parked in self._parked:
            self.pool.release(parked.pages)
        self._parked = []

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Go on with other weights: what is cached is forgotten, and what runs is computed again from its tokens.

        Raises: CheckpointError if they are not this model's; then nothing has changed.
        """
        load_parameters(self.model, dict(weights), "weights")  # in place: graphs know where they lie
        self.model.prepare_for_inference()
        self._leave_parked()
        for sequence in reversed(list(self._running)):
            self._end(sequence)
            self._waiting.appendleft(sequence)
        self.pool = PagePool(self.pool.pages + 1, PAGE_TOKENS)

    def _schedule(self) -> list[tuple[_Sequence, int]]:
        """Choose what the step computes, and give it pages: first who decodes, then who has begun, then who waits."""
        budget = self.step_tokens
        begun = sorted(self._running, key=lambda sequence: sequence.left > 1)
        scheduled: list[tuple[_Sequence, int]] = []
        for sequence in begun:
            if sequence.chunk <= budget and self._make_room(sequence):
                scheduled.append((sequence, sequence.chunk))
                budget -= sequence.chunk
        scheduled = [(sequence, count) for sequence, count in scheduled if sequence in self._running]
        promised = sum(pages_for(len(sequence.tokens) + 1) - len(sequence.pages) for sequence in self._running)
        while self._waiting and len(self._running) < self.max_running:
            sequence = self._waiting[0]
            known = sequence.tokens[:-1] if sequence.request.prompt_logprobs is None else []
            sequence.pages, sequence.last_page = self.pool.find(known)
            sequence.computed = sequence.published = len(sequence.pages) * PAGE_TOKENS
            if known and self._is_being_computed(sequence):
                self.pool.release(sequence.pages)
                break
            # It begins only if all of its tokens have room, and one more, or it would soon be in the others' way.
            lacking = pages_for(len(sequence.tokens) + 1) - len(sequence.pages)
            if sequence.chunk > budget or promised + lacking > self.pool.free:
                self.pool.release(sequence.pages)
                break
            promised += lacking - self._grow(sequence)
            self.queried_tokens += len(known)
            self.found_tokens += sequence.computed
            if len(sequence.tokens) == len(sequence.request.prompt):
                sequence.cached = sequence.computed
            self._running.append(self._waiting.popleft())
            scheduled.append((sequence, sequence.chunk))
            budget -= sequence.chunk
        return scheduled

    def _is_being_computed(self, sequence: _Sequence) -> bool:
        """Tell whether a running prompt is about to publish the next page that this one needs: worth waiting for."""
        end = sequence.computed + PAGE_TOKENS
        return end < len(sequence.tokens) and any(
            other.left > 1 and other.computed < end <= len(other.tokens) and other.tokens[:end] == sequence.tokens[:end]
            for other in self._running
        )

    def _make_room(self, sequence: _Sequence) -> bool:
        """Give a sequence the pages of its next chunk; where too few are free, the newest give theirs back.

        Tells whether the sequence still runs: it may be the newest itself.
        """
        while sequence in self._running and self._lacking(sequence) > self.pool.free:
            newest = self._running[-1]
            self._end(newest)
            self._waiting.appendleft(newest)
            self.preemptions += 1
        if sequence not in self._running:
            return False
        self._grow(sequence)
        return True

    def _lacking(self, sequence: _Sequence) -> int:
        return pages_for(sequence.computed + sequence.chunk) - len(sequence.pages)

    def _grow(self, sequence: _Sequence) -> int:
        """Give a sequence the pages of its next chunk, which are free; return how many."""
        lacking = self._lacking(sequence)
        sequence.pages += [self.pool.take() for _ in range(lacking)]
        return lacking

    def _publish(self, sequence: _Sequence) -> None:
        """Let others find the pages that have become full."""
        while sequence.computed - sequence.published >= PAGE_TOKENS:
            first = sequence.published
            tokens = sequence.tokens[first : first + PAGE_TOKENS]
            sequence.last_page = self.pool.publish(sequence.pages[first // PAGE_TOKENS], sequence.last_page, tokens)
            sequence.published += PAGE_TOKENS

    def _end(self, sequence: _Sequence) -> None:
        """Take a sequence out of the running ones, and its pages back."""
        self._running.remove(sequence)
        self.pool.release(sequence.pages)
        sequence.pages = []

    def _sample(self, sequences: list[_Sequence], hidden_BC: torch.Tensor) -> list[Event]:
        """Draw one token of each sequence from its last hidden state, and end those that are done."""
        events = []
        for sequence, drawn in zip(sequences, draw(self.model.logits(hidden_BC), sequences), strict=True):
            event = sequence.say(drawn)
            events.append(event)
            if event.token in sequence.request.break_tokens and event.finish_reason == "stop":
                self._running.remove(sequence)
                self._parked.append(sequence)
            elif event.finish_reason is not None:
                self._end(sequence)
        return events

    def _judge_prompt(self, sequence: _Sequence, hidden_TC: torch.Tensor) -> None:
        """Keep how likely the prompt's tokens were that follow those of a chunk; not twice after a preemption."""
        next_place = sequence.computed + 1
        targets = list(sequence.request.prompt[next_place : next_place + len(hidden_TC)])
        known = max(0, len(sequence.likelihoods) - sequence.computed)
        if targets[known:]:
            logits_TV = self.model.logits(hidden_TC[known : len(targets)])
            sequence.likelihoods += likelihoods(logits_TV, targets[known:], sequence.request.prompt_logprobs or 0)
