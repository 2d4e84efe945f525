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
from nanochat.inference.engine import Request
from nanochat.inference.text_stream import Piece, TextStream
from nanochat.serving.backend import Backend, BackendDeadError, ServedModel
from nanochat.serving.errors import ApiError, overloaded, refused


class Answers:
    """The answers to one HTTP request, in the order of its prompts, n for each."""

    def __init__(
        self, backend: Backend, config: ServingConfig, model: ServedModel, requests: Sequence[Request],
        stops: Sequence[str], n: int, open_answers: Counter[str],
    ) -> None:  # fmt: skip
        """Take what the engine is asked, `n` requests for each prompt, and count it as open until `close`.

        Raises: ApiError if too much is waiting already, or the engine is dead.
        """
        waiting = backend.load().waiting
        if waiting and waiting + len(requests) > config.max_waiting:
            raise overloaded(f"{waiting} requests are waiting already, at most {config.max_waiting} may.")
        limit = config.max_running + config.max_waiting
        if open_answers[model.name] + len(requests) > limit:
            raise overloaded(f"{open_answers[model.name]} answers of {model.name} are open, at most {limit} may be.")
        if not backend.is_healthy:
            raise ApiError(503, "the engine has died; the replica is being replaced.", code="engine_dead")
        self.backend, self.config, self.model, self.requests, self.stops = backend, config, model, requests, stops
        self.n, self.began_s = n, time.monotonic()
        self.first_token_s: float | None = None
        """Seconds until something came."""
        self.completion_tokens = [request.continued for request in requests]
        self.finish_reasons: list[str | None] = [None] * len(requests)
        self.cached_tokens = 0
        self._open_answers, self._is_open = open_answers, True
        open_answers[model.name] += len(requests)

    def close(self) -> None:
        """Make room for others; once is enough."""
        if self._is_open:
            self._is_open = False
            self._open_answers[self.model.name] -= len(self.requests)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts; a prompt with several answers counts once."""
        return sum(len(one.prompt) - one.continued for one in self.requests[:: self.n])

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
                        self.cached_tokens += events[0].prompt.cached_tokens
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
