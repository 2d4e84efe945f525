"""Logits and what was said before to the next token of each row: the same draws above every engine.

A draw is a function of a request's own logits, tokens and seed; so an engine that computes the same logits says the
same, and one that takes over a completion in its middle goes on as the other would have. Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nanochat.inference.requests import Event, FinishReason, PromptReport, Request
from nanochat.inference.sampling import Likelihood, Seen, likelihoods, move_logits, sample_tokens, uniform


@dataclass(frozen=True)
class Draw:
    """A token that was drawn."""

    token: int
    logprob: float
    """In the distribution that it was drawn from."""
    likelihood: Likelihood | None
    """If the request asks for it."""


@dataclass(eq=False)
class Answer:
    """A request and what has been said to it."""

    id: int
    request: Request
    tokens: list[int]
    """Prompt and what was sampled."""
    cached: int = 0
    """Tokens of the prompt that were in the prefix cache."""
    likelihoods: list[Likelihood] = field(default_factory=list)
    """Of the prompt's tokens from the second on, if the request asks for them."""
    seen: Seen | None = None
    """Its tokens, if penalties ask for them."""

    @property
    def said(self) -> int:
        """New tokens so far."""
        return len(self.tokens) - len(self.request.prompt)

    def say(self, drawn: Draw) -> Event:
        """Append a token and return its event."""
        request, token, said = self.request, drawn.token, self.said
        self.tokens.append(token)
        if self.seen is not None:
            self.seen.add(token)
        reason: FinishReason | None = "length" if said + 1 == request.max_new_tokens else None
        if token in request.stop_tokens or token in request.break_tokens:
            reason = "stop"
        report = None if said else PromptReport(self.cached, tuple(self.likelihoods))
        return Event(self.id, token, reason, False, drawn.logprob, drawn.likelihood, report)


def draw(logits_BV: Tensor, answers: Sequence[Answer]) -> list[Draw]:
    """Draw the next token of each answer; the logits are changed."""
    requests = [answer.request for answer in answers]
    judged = {row: logits_BV[row].clone() for row, one in enumerate(requests) if one.logprobs is not None}
    for row, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        if request.is_penalized and answer.seen is None:
            asked = len(request.prompt) - request.continued
            answer.seen = Seen(answer.tokens[:asked], answer.tokens[asked:])
        if request.continued + answer.said < request.min_new_tokens:
            logits_BV[row, list(request.stop_tokens)] = float("-inf")
    move_logits(logits_BV, requests, [answer.seen for answer in answers])
    uniforms = [uniform(answer.request.seed, answer.request.continued + answer.said) for answer in answers]
    tokens, logprobs = (of_B.tolist() for of_B in sample_tokens(logits_BV, requests, uniforms))
    return [
        Draw(
            token, logprobs[row],
            likelihoods(judged[row][None], [token], requests[row].logprobs or 0)[0] if row in judged else None,
        )
        for row, token in enumerate(tokens)
    ]  # fmt: skip
