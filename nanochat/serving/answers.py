"""A request for tokens to pieces of its answers: waits, limits of time, several answers side by side.

An answer is taken from the backend by one coroutine of the request that asked for it; whoever closes it, or is
cancelled while it waits, aborts it. Pieces of a stream come no faster than `event_interval_s`, the first one at once.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from nanochat.config.serving import ServingConfig
from nanochat.errors import ConfigError
from nanochat.inference.requests import Request
from nanochat.inference.text_stream import Piece, TextStream
from nanochat.serving.backend import Backend, BackendDeadError, ServedModel
from nanochat.serving.errors import ApiError, overloaded, refused


class Admission:
    """What is let in: as many answers, and tokens of prompts, as are computed together and may wait behind them.

    The same share of tokens may wait as of answers, in proportion to the cache: a small cache that long prompts fill
    refuses before the answers are too many. Lives in the event loop, so what is counted is exact.
    """

    def __init__(self, backend: Backend, config: ServingConfig) -> None:
        self.backend, self.config = backend, config
        self._answers: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def enter(self, model: str, answers: int, tokens: int) -> None:
        """Count a request's answers and prompt tokens as open. Raises: ApiError if that is too much, or none works."""
        config, load = self.config, self.backend.load()
        # who came since the engine's last step waits for nothing but its next one, as long as there are places
        behind = load.waiting - max(0, config.max_running * len(self.backend.models) - load.running)
        if load.waiting and behind + answers > config.max_waiting:
            raise overloaded(f"{max(0, behind)} requests are waiting already, at most {config.max_waiting} may.")
        limit = config.max_running + config.max_waiting
        if self._answers[model] + answers > limit:
            raise overloaded(f"{self._answers[model]} answers of {model} are open, at most {limit} may be.")
        tokens_limit = load.kv_tokens // len(self.backend.models) * limit // config.max_running
        if self._tokens[model] and self._tokens[model] + tokens > tokens_limit > 0:
            raise overloaded(
                f"{self._tokens[model]} tokens of prompts to {model} are open, at most {tokens_limit} may be."
            )
        if not self.backend.is_healthy:
            raise ApiError(503, "the engine has died; the replica is being replaced.", code="engine_dead")
        self._answers[model] += answers
        self._tokens[model] += tokens

    def leave(self, model: str, answers: int, tokens: int) -> None:
        """Make room for others."""
        self._answers[model] -= answers
        self._tokens[model] -= tokens


class Answers:
    """The answers to one HTTP request, in the order of its prompts, n for each."""

    def __init__(
        self, admission: Admission, model: ServedModel, requests: Sequence[Request], stops: Sequence[str], n: int
    ) -> None:
        """Take what the engine is asked, `n` requests for each prompt, and count it as open until `close`.

        Raises: ApiError if it is not let in.
        """
        self.backend, self.config, self.model = admission.backend, admission.config, model
        self.requests, self.stops, self.n, self.began_s = requests, stops, n, time.monotonic()
        self.first_token_s: float | None = None
        """Seconds until something came."""
        self.completion_tokens = [request.continued for request in requests]
        self.finish_reasons: list[str | None] = [None] * len(requests)
        self._cached = [0] * len(requests)
        self._admission = admission
        admission.enter(model.name, len(requests), self.prompt_tokens)
        self._is_open = True

    def close(self) -> None:
        """Make room for others; once is enough."""
        if self._is_open:
            self._is_open = False
            self._admission.leave(self.model.name, len(self.requests), self.prompt_tokens)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts; a prompt with several answers counts once."""
        return sum(len(one.prompt) - one.continued for one in self.requests[:: self.n])

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that none of their answers had to compute."""
        return sum(min(self._cached[begin : begin + self.n]) for begin in range(0, len(self._cached), self.n))

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield (number of the answer, piece) as they come. Raises: ApiError."""
        if len(self.requests) == 1:
            async with aclosing(self._answer(0)) as pieces:
                async for piece in pieces:
                    yield 0, piece
            return
        queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

        async def follow(number: int) -> None:
            try:
                async with aclosing(self._answer(number)) as pieces:
                    async for piece in pieces:
                        queue.put_nowait((number, piece))
            except Exception as err:  # whatever it was: who reads the queue has to hear of it
                queue.put_nowait((number, err))

        tasks = [asyncio.create_task(follow(number)) for number in range(len(self.requests))]
        try:
            unfinished = len(tasks)
            while unfinished:
                number, piece = await queue.get()
                if isinstance(piece, Exception):
                    raise piece
                unfinished -= piece.finish_reason is not None
                yield number, piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, number: int) -> AsyncGenerator[Piece, None]:
        request, config = self.requests[number], self.config
        begun = request.prompt[len(request.prompt) - request.continued :]
        text = TextStream(self.model.tokenizer, self.stops, begun)
        deadline_s = self.began_s + config.request_s
        limit_s = config.first_token_s
        has_begun = False
        async with aclosing(self.backend.generate(self.model.name, request)) as batches:
            while True:
                try:
                    async with asyncio.timeout(max(0.0, min(limit_s, deadline_s - time.monotonic()))):
                        events = await anext(batches)
                except TimeoutError:
                    raise self._too_late(has_begun, deadline_s) from None
                except ConfigError as err:
                    raise refused("max_tokens", str(err)) from err
                except BackendDeadError as err:
                    raise ApiError(503, str(err), code="engine_dead") from err
                came_s = time.monotonic()
                if not has_begun:
                    has_begun, limit_s = True, config.stall_s
                    self.first_token_s = self.first_token_s or came_s - self.began_s
                    if events[0].prompt is not None:
                        self._cached[number] = events[0].prompt.cached_tokens
                piece = text.push(events)
                self.completion_tokens[number] += len(piece.events)
                if piece.events or piece.finish_reason:
                    self.finish_reasons[number] = piece.finish_reason
                    yield piece
                if piece.finish_reason:
                    return
                await asyncio.sleep(came_s + config.event_interval_s - time.monotonic())

    def _too_late(self, has_begun: bool, deadline_s: float) -> ApiError:
        config = self.config
        if time.monotonic() >= deadline_s:
            return ApiError(504, f"the answer took more than {config.request_s:g} s.", code="deadline_exceeded")
        if has_begun:
            return ApiError(500, f"no token came for {config.stall_s:g} s.", code="stalled")
        return overloaded(f"no token came within {config.first_token_s:g} s.")
