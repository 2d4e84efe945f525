"""What is asked of an engine and what it says: requests in, events out, whichever engine computes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from nanochat.errors import ConfigError
from nanochat.inference.sampling import Likelihood, Sampling

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

    def check(self, capacity: int, vocab_size: int) -> None:
        """Raise ConfigError if prompt and completion are too long, or there is nothing to do, or an id is none."""
        needed = len(self.prompt) + self.max_new_tokens
        if not self.prompt or self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: must be at least 1, after at least one token.")
        if needed > capacity:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens}: with a prompt of {len(self.prompt)} tokens must be at "
                f"most {capacity} in all. Shorten one of them."
            )
        ids = [*self.prompt, *self.logit_bias, *self.stop_tokens, *self.break_tokens]
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise ConfigError(f"prompt: ids must be in [0, {vocab_size}). Use the model's tokenizer.")


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


@dataclass(frozen=True)
class Load:
    """What an engine is doing, or several."""

    running: int = 0
    """Requests that are being computed."""
    waiting: int = 0
    """Requests that wait for room."""
    kv_tokens: int = 0
    """Tokens that the cache can hold."""
    kv_tokens_free: int = 0
    """Of those, not held by a running request."""
    preemptions: int = 0
    """Since the start."""
    prefix_queries: int = 0
    """Tokens of prompts that were looked up in the prefix cache, since the start."""
    prefix_hits: int = 0
    """Of those, found."""

    def __add__(self, other: "Load") -> "Load":
        return Load(**{name: value + getattr(other, name) for name, value in vars(self).items()})


class TokenSource(Protocol):
    """What turns requests into events: an engine, or a tool loop above one."""

    def add(self, request: Request) -> int:
        """Queue a request and return its id."""
        ...

    def step(self) -> list[Event]:
        """Work for a moment and return what came of it, perhaps nothing."""
        ...

    def abort(self, id: int) -> None:
        """Forget a request; it gives no more events."""
        ...


class InferenceEngine(TokenSource, Protocol):
    """A TokenSource that computes: ours (`engine.py`), or vLLM's (`vllm_engine.py`)."""

    @property
    def capacity(self) -> int:
        """Tokens of prompt and completion together at most."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def load(self) -> Load:
        """Return what the engine is doing now."""
        ...

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Go on with other weights: what is cached is forgotten, and what runs is computed again from its tokens."""
        ...
