"""A backend without a model: a token every so often, which tests of Ray Serve name in place of the real one."""

import asyncio
import os
from collections.abc import AsyncIterator

from nanochat.config.serving import ServingConfig
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.inference.requests import Event, Load, PromptReport, Request
from nanochat.serving.backend import BackendDeadError, ServedModel

FACTORY = "paced_backend:PacedBackend"
TOKEN_S = 0.02
PROMPT_THAT_KILLS = "die"
LETTERS = b"abcdefghijklmnopqrstuvwxyz"


class PacedBackend:
    """Says the alphabet, one letter in TOKEN_S, to however many ask; dies when it is asked to."""

    def __init__(self, config: ServingConfig) -> None:
        self.tokenizer = Tokenizer([], SPLIT_PATTERNS["nanochat"])
        self.models = {"paced": ServedModel("paced", self.tokenizer, False, 4096, 0, f"process {os.getpid()}")}
        self.running = 0
        self.is_healthy = True

    async def generate(self, model: str, request: Request) -> AsyncIterator[list[Event]]:
        if self.tokenizer.encode_ordinary(PROMPT_THAT_KILLS) == list(request.prompt)[-len(PROMPT_THAT_KILLS) :]:
            self.is_healthy = False
        if not self.is_healthy:
            raise BackendDeadError("the engine has died. Try again.")
        self.running += 1
        try:
            for place in range(request.max_new_tokens):
                if place:
                    await asyncio.sleep(TOKEN_S)
                token = self.tokenizer.encode_ordinary(chr(LETTERS[(request.continued + place) % len(LETTERS)]))[0]
                reason = "length" if place + 1 == request.max_new_tokens else None
                yield [Event(1, token, reason, prompt=None if place else PromptReport(0))]
        finally:
            self.running -= 1

    def load(self) -> Load:
        return Load(running=self.running)
