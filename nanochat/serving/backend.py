"""Requests of an event loop to engines in a thread, and their events back: what the endpoint asks for tokens.

One thread owns all engines of a replica and steps them in turn, so the event loop never waits for the model. Requests
and aborts go to it through a queue; the events of a step come back in one call into the event loop. A request that an
engine refuses fails alone; if the thread dies, all that wait fail at once and the backend is not healthy any more.
"""

import asyncio
import logging
import queue
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nanochat.config.serving import ServingConfig
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import ConfigError, NanochatError
from nanochat.inference.completions import complete
from nanochat.inference.load import load_engine
from nanochat.inference.requests import Event, InferenceEngine, Load, Request, TokenSource
from nanochat.inference.tool_loop import ToolLoop
from nanochat.training.checkpoint import named_checkpoint, tokenizer_of

SWITCH_INTERVAL_S = 5e-4
"""The event loop and the engine's thread share the interpreter; Python's own 5 ms is as long as a step."""
log = logging.getLogger("nanochat.serving")


class BackendDeadError(NanochatError):
    """The engine's thread has died; nothing can be answered any more."""


@dataclass(frozen=True)
class ServedModel:
    """A model as clients know it."""

    name: str
    tokenizer: Tokenizer
    is_chat: bool
    """Whether it was fine-tuned on conversations."""
    capacity: int
    """Tokens of prompt and completion together at most."""
    created: int
    """Seconds since 1970."""
    checkpoint: str
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Sampling parameters where a request names none."""


class Backend(Protocol):
    """What turns prompts into tokens for the endpoint."""

    models: Mapping[str, ServedModel]

    @property
    def is_healthy(self) -> bool:
        """Tell whether requests can be answered."""
        ...

    def generate(self, model: str, request: Request) -> AsyncGenerator[list[Event], None]:
        """Yield the events of a request as they come, all that are there at once; closing it aborts the request.

        Raises: ConfigError if the request cannot be served; BackendDeadError if the engine has died.
        """
        ...

    def load(self) -> Load:
        """Return what the backend is doing now."""
        ...


class _Mailbox:
    """What has come for one request and was not taken yet; lives in the event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.events: list[Event] = []
        self.error: Exception | None = None
        self._filled = asyncio.Event()

    def put(self, events: Sequence[Event], error: Exception | None = None) -> None:
        self.events += events
        self.error = self.error or error
        self._filled.set()

    async def take(self) -> list[Event]:
        """Wait for events and return all. Raises: what the request failed with."""
        await self._filled.wait()
        self._filled.clear()
        events, self.events = self.events, []
        if self.error is not None and not events:
            raise self.error
        if self.error is not None:
            self._filled.set()
        return events


@dataclass(frozen=True)
class _Add:
    model: str
    request: Request
    mailbox: _Mailbox


@dataclass(frozen=True)
class _Abort:
    mailbox: _Mailbox


@dataclass
class Hosted:
    """A model with what computes it."""

    model: ServedModel
    engine: InferenceEngine
    source: TokenSource
    """The engine, or a tool loop above it."""
    mailboxes: dict[int, _Mailbox] = field(default_factory=dict)
    """By the source's id of a request that has not ended."""


class EngineBackend:
    """Engines of this process, stepped by a thread."""

    def __init__(self, hosted: Sequence[Hosted], stall_s: float = 60.0) -> None:
        """Take models with their engines and start the thread; `close` ends it.

        A step that takes longer than `stall_s` hangs.
        """
        self.stall_s = stall_s
        self._step_began_s: float | None = None
        self._hosted = {one.model.name: one for one in hosted}
        self.models: Mapping[str, ServedModel] = {one.model.name: one.model for one in hosted}
        self._inbox: queue.SimpleQueue[_Add | _Abort | None] = queue.SimpleQueue()
        self._ids: dict[_Mailbox, tuple[Hosted, int]] = {}
        self._error: Exception | None = None
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        """Tell whether the thread runs, and no step of it hangs."""
        began_s = self._step_began_s
        hangs = began_s is not None and time.monotonic() - began_s > self.stall_s
        return self._is_open and self._thread.is_alive() and not hangs

    @classmethod
    def open(cls, config: ServingConfig) -> "EngineBackend":
        """Load the models of a config, let each answer once, and start.

        Raises: CheckpointError, DataError or TokenizerMismatchError if one cannot be loaded.
        """
        hosted = [_hosted(config, name) for name in config.models]
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        for one in hosted:
            complete(one.source, [Request(prompt=(one.model.tokenizer.bos,) * 8, max_new_tokens=4)] * 2)
        return cls(hosted, config.stall_s)

    def close(self) -> None:
        """End the thread after its present step; who still waits gets BackendDeadError."""
        self._inbox.put(None)
        self._thread.join()

    async def generate(self, model: str, request: Request) -> AsyncGenerator[list[Event], None]:
        """See `Backend`."""
        mailbox = _Mailbox()
        self._inbox.put(_Add(model, request, mailbox))
        if not self.is_healthy:
            raise self._death()
        ended = False
        try:
            while not ended:
                events = await mailbox.take()
                ended = events[-1].finish_reason is not None
                yield events
        finally:
            if not ended:
                self._inbox.put(_Abort(mailbox))

    def load(self) -> Load:
        """See `Backend`."""
        loads = (one.engine.load() for one in self._hosted.values())
        return sum(loads, Load(waiting=self._inbox.qsize()))

    def _death(self) -> BackendDeadError:
        return BackendDeadError(f"the engine has died ({self._error!r}). The replica is being replaced; try again.")

    def _run(self) -> None:
        try:
            while self._take_in(is_idle=not any(one.mailboxes for one in self._hosted.values())):
                for one in self._hosted.values():
                    if one.mailboxes:
                        self._step_began_s = time.monotonic()
                        events = one.source.step()
                        self._step_began_s = None
                        self._deliver(one, events)
        except Exception as err:  # whatever it was, everybody who waits has to hear of it
            self._error = err
            log.exception("the engine has died")
        finally:
            self._is_open = False  # who puts a request into the inbox after this looks at it afterwards
            while not self._inbox.empty():
                if isinstance(command := self._inbox.get(), _Add):
                    _post(command.mailbox, [], self._death())
            for one in self._hosted.values():
                for mailbox in one.mailboxes.values():
                    _post(mailbox, [], self._death())

    def _take_in(self, is_idle: bool) -> bool:
        """Do what has been asked for, and tell whether to go on; an idle thread waits for something."""
        while is_idle or not self._inbox.empty():
            command = self._inbox.get()
            is_idle = False
            if command is None:
                return False
            if isinstance(command, _Abort):
                if command.mailbox in self._ids:
                    hosted, id = self._ids.pop(command.mailbox)
                    hosted.source.abort(id)
                    del hosted.mailboxes[id]
                continue
            hosted = self._hosted[command.model]
            try:
                id = hosted.source.add(command.request)
            except ConfigError as err:
                _post(command.mailbox, [], err)
                continue
            hosted.mailboxes[id] = command.mailbox
            self._ids[command.mailbox] = (hosted, id)
        return True

    def _deliver(self, hosted: Hosted, events: Sequence[Event]) -> None:
        """Put a step's events into their mailboxes, with one call into each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, dict[_Mailbox, list[Event]]] = {}
        for event in events:
            mailbox = hosted.mailboxes[event.id]
            by_loop.setdefault(mailbox.loop, {}).setdefault(mailbox, []).append(event)
            if event.finish_reason is not None:
                del hosted.mailboxes[event.id], self._ids[mailbox]
        for loop, letters in by_loop.items():
            _call(loop, _put_all, letters)


def _hosted(config: ServingConfig, spec: str) -> Hosted:
    """Load a model NAME or NAME=CHECKPOINT_FOLDER and give it its share of the cache."""
    name, _, folder = spec.partition("=")
    checkpoint = named_checkpoint(config.run_dir, folder or name, log.warning)
    tokenizer = Tokenizer.load(tokenizer_of(config.run_dir, checkpoint.folder))
    share = config.kv_cache_tokens and config.kv_cache_tokens // len(config.models)
    engine = load_engine(checkpoint, tokenizer, config, share)
    is_chat = checkpoint.is_chat
    model = ServedModel(
        name, tokenizer, is_chat, engine.capacity, int(time.time()), checkpoint.folder, checkpoint.generation
    )
    return Hosted(model, engine, ToolLoop(engine, tokenizer) if is_chat else engine)


def _put_all(letters: Mapping[_Mailbox, list[Event]]) -> None:
    for mailbox, events in letters.items():
        mailbox.put(events)


def _post(mailbox: _Mailbox, events: Sequence[Event], error: Exception) -> None:
    _call(mailbox.loop, mailbox.put, events, error)


def _call(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:  # the loop is closed: nobody waits there any more
        return
