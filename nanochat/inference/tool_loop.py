"""Events to events with the tool's words in them: stop at a call, evaluate it, go on. The same above every engine.

A completion that ends in <|python_end|> has called the calculator: the result is put after it, between the output
tokens, as forced tokens, and the request goes back to the engine with everything so far as its prompt. The model cannot
say output tokens itself: what stands between them was the tool's.

Source: the calculator loop of karpathy/nanochat engine.py@92d63d4.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import ConfigError
from nanochat.inference.calculator import calculate
from nanochat.inference.requests import Event, Request, TokenSource

NO_RESULT = "error"
"""What the tool says to a call that it cannot evaluate."""
MAX_CALLS = 32


def tool_alone(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the tokens that a model cannot say itself."""
    return tokenizer.special("<|output_start|>"), tokenizer.special("<|output_end|>")


@dataclass
class _Turn:
    """What has become of one request so far."""

    id: int
    request: Request
    """As it came, but for `said`: its prompt is what stood before the completion."""
    said: list[int]
    calls: int


class ToolLoop:
    """A TokenSource that gives a model the calculator."""

    def __init__(
        self, engine: TokenSource, tokenizer: Tokenizer, tool: Callable[[str], str | None] = calculate
    ) -> None:
        self.engine, self.tokenizer, self.tool = engine, tokenizer, tool
        self._call_start, self._call_end = tokenizer.special("<|python_start|>"), tokenizer.special("<|python_end|>")
        self._bans = dict.fromkeys(tool_alone(tokenizer), -math.inf)
        self._turns: dict[int, _Turn] = {}  # by the engine's id of the request that runs now
        self._owed: list[Event] = []
        """What a tool has said to requests that came with a call."""
        self._next_id = 0

    def add(self, request: Request) -> int:
        """Queue a request and return its id. Raises: as the engine does."""
        self._next_id += 1
        begun = len(request.prompt) - request.continued
        said = list(request.prompt[begun:])
        whole = replace(
            request, prompt=request.prompt[:begun], continued=0, max_new_tokens=request.max_new_tokens + len(said)
        )
        turn = _Turn(self._next_id, whole, said, calls=said.count(self._call_end))
        if said and said[-1] == self._call_end:  # cut off between a call and its output
            output = self._output_of(said)
            if len(output) >= request.max_new_tokens:
                raise ConfigError(
                    f"max_new_tokens={request.max_new_tokens}: has no room for the tool's output. Raise it."
                )
            said += output
            self._owed += [Event(turn.id, token, is_forced=True) for token in output]
        self._submit(turn)
        return self._next_id

    def abort(self, id: int) -> None:
        """Forget a request."""
        for inner, turn in list(self._turns.items()):
            if turn.id == id:
                self.engine.abort(inner)
                del self._turns[inner]
        self._owed = [event for event in self._owed if event.id != id]

    def step(self) -> list[Event]:
        """Let the engine work and return its events; where a call ends, the tool's tokens follow it."""
        events, self._owed = self._owed, []
        for event in self.engine.step():
            turn = self._turns[event.id]
            turn.said.append(event.token)
            if event.finish_reason is None:
                events.append(replace(event, id=turn.id))
                continue
            del self._turns[event.id]
            left = turn.request.max_new_tokens - len(turn.said)
            is_call = event.token == self._call_end and event.token not in turn.request.stop_tokens
            output = self._output_of(turn.said) if is_call else []
            if not is_call or len(output) >= left or turn.calls >= MAX_CALLS:
                events.append(replace(event, id=turn.id, finish_reason="length" if is_call else event.finish_reason))
                continue
            events.append(replace(event, id=turn.id, finish_reason=None))
            events += [Event(turn.id, token, is_forced=True) for token in output]
            turn.said += output
            turn.calls += 1
            self._submit(turn)
        return events

    def _submit(self, turn: _Turn) -> None:
        request, said = turn.request, len(turn.said)
        going_on = replace(
            request, prompt=(*request.prompt, *turn.said), max_new_tokens=request.max_new_tokens - said,
            break_tokens=request.break_tokens | {self._call_end},
            logit_bias={**request.logit_bias, **self._bans}, continued=said,
        )  # fmt: skip
        self._turns[self.engine.add(going_on)] = turn

    def _output_of(self, said: list[int]) -> list[int]:
        """Return the ids of the result of the call that `said` ends with."""
        tokenizer, before = self.tokenizer, said[:-1]
        marks = [place for place, token in enumerate(before) if token >= tokenizer.bos]
        start = marks[-1] + 1 if marks and before[marks[-1]] == self._call_start else len(before)
        call = tokenizer.decode([token for token in before[start:] if token < tokenizer.bos])
        result = self.tool(call) or NO_RESULT
        ids = tokenizer.encode_ordinary(result)
        start, end = tool_alone(tokenizer)
        return [start, *ids, end]
