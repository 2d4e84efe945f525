"""Requests to whole completions, whatever computes them: the engine, or a tool loop above one."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from nanochat.inference.requests import FinishReason, Request, TokenSource


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
