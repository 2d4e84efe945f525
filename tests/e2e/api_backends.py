"""What stands behind the endpoint in tests of its API: tiny models of random weights, and what follows a script.

Tokens are bytes here, and nine special tokens, so every character that is not ASCII is split over tokens.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace

import torch

from nanochat.config.model import ModelConfig
from nanochat.config.serving import ServingConfig
from nanochat.data.conversations import Part, render_parts
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.inference.engine import Engine
from nanochat.inference.requests import Event, InferenceEngine, Load, PromptReport, Request
from nanochat.inference.sampling import Likelihood
from nanochat.inference.tool_loop import ToolLoop
from nanochat.inference.vllm_engine import VllmEngine
from nanochat.model.gpt import GPT
from nanochat.serving.backend import EngineBackend, Hosted, ServedModel

TOKENIZER = Tokenizer([], SPLIT_PATTERNS["nanochat"])
BOS = TOKENIZER.bos
END = TOKENIZER.special("<|assistant_end|>")
CAPACITY = 256
MAX_RUNNING = 8
CREATED = 1_700_000_000
CALCULATION = (Part("text", "6*7 is "), Part("python", "6*7"), Part("python_output", "42"), Part("text", ", 確か🙂."))
"""What the model `calc` always says; its calculator is the real one."""


def ids_of(text: str, *, ends: bool = True) -> list[int]:
    return [*text.encode(), *([END] if ends else [])]


def random_model(seed: int, sequence_len: int = CAPACITY) -> GPT:
    """All parameters are random: where they are zero at the start, errors would not be seen."""
    model = GPT(
        ModelConfig(
            sequence_len=sequence_len, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=64
        )
    )
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=draw).mul_(0.4)
    return model


def logprobs_of(model: GPT, ids: Sequence[int]) -> list[list[float]]:
    """The log probabilities of every token behind each prefix of ids: one plain forward of the whole row."""
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([list(ids)])))[0].float()
    return logits[:, : TOKENIZER.vocab_size].log_softmax(-1).tolist()


def served(name: str, *, is_chat: bool, capacity: int = CAPACITY, **defaults: float) -> ServedModel:
    return ServedModel(name, TOKENIZER, is_chat, capacity, CREATED, f"runs/{name}/checkpoint", defaults)


class ScriptedSource:
    """A TokenSource that says the same answer to everybody, a token a step."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids, self._requests, self._next_id = list(ids), {}, 0

    def add(self, request: Request) -> int:
        self._next_id += 1
        self._requests[self._next_id] = (request, 0)
        return self._next_id

    def abort(self, id: int) -> None:
        self._requests.pop(id, None)

    def step(self) -> list[Event]:
        events = []
        for id, (request, count) in list(self._requests.items()):
            token = self.ids[request.continued + count]
            reason = "stop" if token in request.stop_tokens else None
            if reason is None and count + 1 == request.max_new_tokens:
                reason = "length"
            events.append(Event(id, token, reason, prompt=None if count else PromptReport(0)))
            self._requests[id] = (request, count + 1)
            if reason:
                del self._requests[id]
        return events


def engine_of(model: GPT, max_running: int = MAX_RUNNING) -> InferenceEngine:
    """Return the engine that NANOCHAT_BACKEND names, native if nothing does."""
    if os.environ.get("NANOCHAT_BACKEND", "native") == "native":
        return Engine(model, max_running=max_running)
    return VllmEngine(
        model.config, model.state_dict(), dtype=torch.float32, device=torch.device("cpu"), max_running=max_running
    )


def engine_backend() -> EngineBackend:
    """A chat model and a base model that compute, and one that always calls its calculator."""

    def hosted(model: ServedModel, engine: Engine) -> Hosted:
        return Hosted(model, engine, ToolLoop(engine, TOKENIZER) if model.is_chat else engine)

    engines = [engine_of(random_model(seed)) for seed in range(3)]
    script = [*render_parts(TOKENIZER, CALCULATION), END]
    calc = Hosted(
        served("calc", is_chat=True, temperature=0.0), engines[2], ToolLoop(ScriptedSource(script), TOKENIZER)
    )
    return EngineBackend(
        [hosted(served("sft", is_chat=True, temperature=0.9, top_k=200.0), engines[0]),
         hosted(served("pretrain", is_chat=False), engines[1]), calc]
    )  # fmt: skip


@dataclass
class Script:
    """What is said, and what goes wrong."""

    ids: list[int] = field(default_factory=lambda: ids_of("hello"))
    at_once: int = 1
    """Tokens that come together."""
    token_s: float = 0.0
    fails: dict[int, Exception] = field(default_factory=dict)
    """At which token what is raised."""
    stalls_at: int | None = None
    cached: int = 0


class ScriptedBackend:
    """A Backend that says what its script has, to everybody; the script is changed by tests."""

    def __init__(self) -> None:
        self.models = {
            "sft": served("sft", is_chat=True, temperature=0.6, top_k=50.0),
            "org/base.model": served("org/base.model", is_chat=False),
        }
        self.reset()

    def reset(self) -> None:
        self.script = Script()
        self.is_healthy = True
        self.waiting = 0
        """Requests of others that wait, because every place is taken."""
        self.running = 0
        self.asked: list[tuple[str, Request]] = []
        self.aborted = 0

    async def generate(self, model: str, request: Request) -> AsyncGenerator[list[Event], None]:
        script, begun, ended = self.script, request.continued, False
        self.asked.append((model, request))
        self.running += 1
        batch: list[Event] = []
        try:
            for place in range(begun, len(script.ids)):
                if place == script.stalls_at:
                    await asyncio.sleep(1000)
                if place in script.fails:
                    if batch:
                        yield batch
                    raise script.fails[place]
                await asyncio.sleep(script.token_s)
                batch.append(self._event(request, place))
                ended = batch[-1].finish_reason is not None
                if ended or len(batch) == script.at_once:
                    yield batch
                    batch = []
                if ended:
                    return
            raise AssertionError("the script must end with an end token, or be longer than max_tokens")
        finally:
            self.running -= 1
            self.aborted += not ended

    def _event(self, request: Request, place: int) -> Event:
        token, count = self.script.ids[place], place - request.continued
        reason = "stop" if token in request.stop_tokens else None
        if reason is None and count + 1 == request.max_new_tokens:
            reason = "length"
        event = Event(1, token, reason)
        if request.logprobs is not None:
            likeliest = tuple((other, -0.5 - other / 1000) for other in range(65, 65 + request.logprobs))
            event = replace(event, likelihood=Likelihood(-0.25, likeliest))
        if count == 0:
            told = ()
            if request.prompt_logprobs is not None:
                told = tuple(Likelihood(-1.0, ((id, -1.0),)) for id in request.prompt[1:])
            event = replace(event, prompt=PromptReport(self.script.cached, told))
        return event

    def load(self) -> Load:
        running = len(self.models) * ServingConfig.max_running if self.waiting else self.running
        return Load(running=running, waiting=self.waiting, kv_tokens=1024, kv_tokens_free=1024)
