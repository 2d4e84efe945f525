"""Prompts to tokens, many requests of different lengths and ages in one batch: continuous batching on a paged cache.

A step computes one token of every sequence that decodes, and chunks of prompts, up to `step_tokens` in all: a long
prompt never stalls the others. Chunks end at multiples of CHUNK_TOKENS of their sequence, whatever the load. Full
pages stay findable after their sequence's end: who begins alike starts behind them. When pages run out, the newest
sequence gives its own back and is computed again later. What a request samples is a function of its own seed and
position, never of its company.

Shapes: N tokens of a step, B sequences, V vocabulary, C width.
Sources of the ideas: continuous batching, Orca (OSDI 2022), section 3; chunked prefill, Sarathi-Serve (arXiv
2403.02310); pages and prefixes: paged_cache.py, page_pool.py.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from nanochat.errors import ConfigError
from nanochat.inference.decoding_graphs import DecodingGraphs
from nanochat.inference.page_pool import ROOT, PagePool
from nanochat.inference.paged_cache import PAGE_TOKENS, Chunk, PagedKVCache, cache_bytes, pages_for
from nanochat.inference.sampling import Likelihood, Sampling, Seen, likelihoods, move_logits, sample_tokens, uniform
from nanochat.model.gpt import GPT
from nanochat.training.hardware import Hardware

CHUNK_TOKENS = 96
"""Of a prompt in one step. At 128 prompts make the answers beside them stutter 2.6 times their pace, at 96 2.2 times,
at 64 1.9 times, but then prefill takes a quarter longer (depth 4, prompts of 480, 1 core, AMD EPYC, 2026-11-25)."""
STEP_TOKENS = 512

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Request(Sampling):
    """One completion that is asked for, and how it is sampled."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    """At most this many new tokens; the end token is one of them."""
    stop_tokens: frozenset[int] = frozenset()
    """Ids that end the completion; the one that did is its last token."""
    break_tokens: frozenset[int] = frozenset()
    """The same, but drawn before `min_new_tokens`, too: where a tool is to speak."""
    seed: int = 0
    """Two requests with the same prompt, parameters and seed give the same tokens."""
    min_new_tokens: int = 0
    """Stop tokens are not drawn before so many new tokens."""
    logprobs: int | None = None
    """Report each token's log probability, and those of so many of the likeliest; none = no report."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens; none of them is taken from the prefix cache then."""
    continued: int = 0
    """So many tokens at the prompt's end are the completion's already: it goes on in its draws and penalties."""


@dataclass(frozen=True)
class PromptReport:
    """What became of a request's prompt."""

    cached_tokens: int
    """So many of its tokens were in the prefix cache."""
    likelihoods: tuple[Likelihood, ...] = ()
    """Of its second token and on, if the request asks for them."""


@dataclass(frozen=True)
class Event:
    """A token of a request's completion."""

    id: int
    token: int
    finish_reason: FinishReason | None = None
    """Why the completion ends with this token; None while it goes on."""
    is_forced: bool = False
    """Whether a tool said it, not the model."""
    logprob: float = 0.0
    """Log probability in the distribution that it was drawn from: with temperature, penalties and what they leave out;
    0 where nothing was drawn."""
    likelihood: Likelihood | None = None
    """If the request asks for it; a tool's tokens have none."""
    prompt: PromptReport | None = None
    """With a request's first token."""


@dataclass(eq=False)
class _Sequence:
    id: int
    request: Request
    tokens: list[int]
    """Prompt and what was sampled."""
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    published: int = 0
    """Of those, tokens of published pages."""
    last_page: int = ROOT
    """The pool's name of the last published page."""
    cached: int = 0
    """Tokens of the prompt that it did not compute itself."""
    likelihoods: list[Likelihood] = field(default_factory=list)
    """Of the prompt's tokens from the second on."""
    seen: Seen | None = None
    """Its tokens, if penalties ask for them."""

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
        step_tokens: int = STEP_TOKENS,
    ) -> None:  # fmt: skip
        """Allocate the cache for requests of at most `longest` tokens, prompt and completion.

        `longest` none = what the model was trained for; `cache_tokens`, of all sequences together, none = as many as
        `max_running` of the longest have. Raises: ConfigError if the device has no room for it.
        """
        self.model, self.max_running, self.step_tokens = model, max_running, max(step_tokens, max_running, CHUNK_TOKENS)
        self.device = model.lm_head.weight.device
        longest = longest or model.config.sequence_len
        pages = max_running * pages_for(longest) if cache_tokens is None else pages_for(cache_tokens)
        self.capacity = min(longest, pages * PAGE_TOKENS)
        free = Hardware(self.device, model.compute_dtype, "").free_bytes()
        if (needed := cache_bytes(model.config, pages + 1, model.compute_dtype)) > free:
            raise ConfigError(
                f"max_running={max_running}: the keys and values of {pages * PAGE_TOKENS:,} tokens need "
                f"{needed / 2**30:.2f} GiB, the device has {free / 2**30:.2f} GiB free. Lower --max-running or "
                "--kv-cache-tokens; --running of those who sample."
            )
        self.cache = PagedKVCache(model.config, pages + 1, model.compute_dtype, self.device)
        self.pool = PagePool(pages + 1, PAGE_TOKENS)
        self.graphs = DecodingGraphs(model, self.cache) if self.device.type == "cuda" else None
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
        needed = len(request.prompt) + request.max_new_tokens
        if not request.prompt or request.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={request.max_new_tokens}: must be at least 1, after at least one token.")
        if needed > self.capacity:
            raise ConfigError(
                f"max_new_tokens={request.max_new_tokens}: with a prompt of {len(request.prompt)} tokens must be at "
                f"most {self.capacity} in all. Shorten one of them."
            )
        ids = [*request.prompt, *request.logit_bias, *request.stop_tokens, *request.break_tokens]
        if min(ids) < 0 or max(ids) >= self.model.config.vocab_size:
            raise ConfigError(f"prompt: ids must be in [0, {self.model.config.vocab_size}). Use the model's tokenizer.")
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

    @property
    def running(self) -> int:
        """Requests that are being computed."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for room."""
        return len(self._waiting)

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
            )
            for sequence, count in scheduled
        ]  # fmt: skip
        if self.graphs is not None and len(chunks) == sum(count for _, count in scheduled):
            return self.graphs.run(chunks)
        batch = self.cache.batch(chunks)
        return self.model(batch.tokens_BT, cache=batch)[0]

    def _leave_parked(self) -> None:
        """Give up the pages of who has not come back."""
        for parked in self._parked:
            self.pool.release(parked.pages)
        self._parked = []

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Go on with other weights: what is cached is forgotten, and what runs is computed again from its tokens."""
        self._leave_parked()
        for sequence in reversed(list(self._running)):
            self._end(sequence)
            self._waiting.appendleft(sequence)
        self.pool = PagePool(self.pool.pages + 1, PAGE_TOKENS)
        self.model.load_state_dict(weights)  # in place: graphs know where they lie
        self.model.prepare_for_inference()

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
        requests = [sequence.request for sequence in sequences]
        counts = [len(sequence.tokens) - len(sequence.request.prompt) for sequence in sequences]
        logits_BV = self.model.logits(hidden_BC)
        judged = {row: logits_BV[row].clone() for row, one in enumerate(requests) if one.logprobs is not None}
        for row, (request, sequence, count) in enumerate(zip(requests, sequences, counts)):
            if request.is_penalized and sequence.seen is None:
                asked = len(request.prompt) - request.continued
                sequence.seen = Seen(sequence.tokens[:asked], sequence.tokens[asked:])
            if request.continued + count < request.min_new_tokens:
                logits_BV[row, list(request.stop_tokens)] = float("-inf")
        move_logits(logits_BV, requests, [sequence.seen for sequence in sequences])
        uniforms = [uniform(one.seed, one.continued + count) for one, count in zip(requests, counts)]
        tokens, drawn = (of_B.tolist() for of_B in sample_tokens(logits_BV, requests, uniforms))
        events = []
        for row, (sequence, token, count) in enumerate(zip(sequences, tokens, counts, strict=True)):
            request = sequence.request
            sequence.tokens.append(token)
            if sequence.seen is not None:
                sequence.seen.add(token)
            reason: FinishReason | None = "length" if count + 1 == request.max_new_tokens else None
            if token in request.stop_tokens or token in request.break_tokens:
                reason = "stop"
            event = Event(sequence.id, token, reason, logprob=drawn[row])
            if row in judged:
                event = replace(event, likelihood=likelihoods(judged[row][None], [token], request.logprobs or 0)[0])
            if count == 0:
                event = replace(event, prompt=PromptReport(sequence.cached, tuple(sequence.likelihoods)))
            events.append(event)
            if token in request.break_tokens and reason == "stop":
                self._running.remove(sequence)
                self._parked.append(sequence)
            elif reason is not None:
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
