"""Coroutines to HTTP that ends when its client does: server-sent events, and waits that a disconnect cancels."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanochat.serving.errors import ApiError

T = TypeVar("T")
log = logging.getLogger("nanochat.serving")


class ClientGoneError(Exception):
    """The client has hung up."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` does; a client that hangs up cancels it. Raises: ClientGoneError, or what `work` raises."""
    return await _race(request.receive, work)


async def _race(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    task, watch = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A stream of events that ends in [DONE], or in an error event and a connection that breaks off."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], timeout_s: float, on_end: Callable[[], None]) -> None:
        """Take the events; the first of them has been waited for, so the status can be 200.

        A client that has not read all after `timeout_s` is left; `on_end` is called in any case.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.timeout_s, self.on_end = events, timeout_s, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; a client that hangs up closes them."""
        try:
            async with asyncio.timeout(self.timeout_s):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await _race(receive, self._send_all(send))
        except (ClientGoneError, TimeoutError):
            return
        finally:
            self.on_end()

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self.events) as events:
            try:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                last = b"data: [DONE]\n\n"
            except Exception as err:  # the edge of a stream: its client has to hear of whatever it was
                if not isinstance(err, ApiError):
                    log.exception("a stream failed")
                    err = ApiError(500, "an error that nobody foresaw.")
                await send({"type": "http.response.body", "body": event(err.body), "more_body": True})
                return  # without the last chunk: the server breaks the connection off
        await send({"type": "http.response.body", "body": last, "more_body": False})
