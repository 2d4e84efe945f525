"""Requests reach the engine's thread and come back, whatever becomes of others; nobody waits for a dead engine."""

import asyncio
import random
import uuid
from contextlib import aclosing
from dataclasses import asdict

import pytest
import torch

from nanochat.config.model import ModelConfig
from nanochat.config.serving import ServingConfig
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.errors import ConfigError
from nanochat.inference.completions import complete
from nanochat.inference.engine import Engine
from nanochat.inference.requests import Event, Request
from nanochat.inference.tool_loop import ToolLoop
from nanochat.model.gpt import GPT
from nanochat.serving.backend import BackendDeadError, EngineBackend, Hosted, ServedModel
from nanochat.storage import RunFolder
from nanochat.training.checkpoint import CheckpointWriter, newest_of

TOKENIZER = Tokenizer([], SPLIT_PATTERNS["nanochat"])


def random_model(seed: int) -> GPT:
    config = ModelConfig(
        sequence_len=128, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=16
    )  # fmt: skip
    model = GPT(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=draw).mul_(0.5)
    return model


def hosted(name: str, engine: Engine, source=None) -> Hosted:
    return Hosted(ServedModel(name, TOKENIZER, True, engine.capacity, 0, name), engine, source or engine)


@pytest.fixture
def engines():
    return {name: Engine(random_model(seed), max_running=4) for seed, name in enumerate(("one", "two"))}


@pytest.fixture
def backend(engines):
    opened = EngineBackend([hosted(name, engine) for name, engine in engines.items()])
    yield opened
    opened.close()


def request(prompt: str = "hello", **changes) -> Request:
    values = {"max_new_tokens": 20, "temperature": 1.0, "seed": 3} | changes
    return Request(prompt=tuple(prompt.encode()), **values)


async def tokens_of(backend: EngineBackend, model: str, wanted: Request) -> list[int]:
    async with aclosing(backend.generate(model, wanted)) as batches:
        return [event.token async for events in batches for event in events]


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_both_models_answer_at_once_as_each_does_alone(backend):
    async def run():
        wanted = [request(f"{number}", seed=number) for number in range(12)]
        names = ["one", "two"] * 6
        return await asyncio.gather(*(tokens_of(backend, name, one) for name, one in zip(names, wanted)))

    answers = asyncio.run(run())
    for number, tokens in enumerate(answers):
        alone = Engine(random_model(number % 2))
        assert tokens == complete(alone, [request(f"{number}", seed=number)])[0].tokens


def test_a_request_that_cannot_be_served_fails_alone(backend):
    async def run():
        good = asyncio.create_task(tokens_of(backend, "one", request()))
        for bad in (request(max_new_tokens=1000), request(logit_bias={999_999: 1.0}), request("")):
            with pytest.raises(ConfigError):
                await tokens_of(backend, "one", bad)
        return await good

    assert len(asyncio.run(run())) == 20
    assert backend.is_healthy


def test_who_leaves_at_any_moment_leaves_nothing_behind(backend, engines):
    draw = random.Random(0)
    size = backend.load().kv_tokens

    async def leave():
        try:
            async with asyncio.timeout(draw.random() * 0.05):
                await tokens_of(backend, draw.choice(["one", "two"]), request(max_new_tokens=100))
        except TimeoutError:
            return 1
        return 0

    async def run():
        left = sum(await asyncio.gather(*(leave() for _ in range(100))))
        await until(lambda: backend.load().running == backend.load().waiting == 0)
        return left

    assert asyncio.run(run()) > 50
    load = backend.load()
    assert (load.kv_tokens, load.kv_tokens_free) == (size, size)
    assert all(not one.mailboxes for one in backend._hosted.values())
    assert not backend._ids


def test_when_the_engine_dies_all_who_wait_hear_of_it_at_once_and_so_does_who_comes_later():
    engine = Engine(random_model(0), max_running=2)

    class Dying:
        steps = 0

        def add(self, wanted: Request) -> int:
            return engine.add(wanted)

        def abort(self, id: int) -> None:
            engine.abort(id)

        def step(self) -> list[Event]:
            self.steps += 1
            if self.steps == 5:
                raise RuntimeError("CUDA error: an illegal memory access")
            return engine.step()

    backend = EngineBackend([hosted("one", engine, Dying())])

    async def run():
        waiting = [asyncio.create_task(tokens_of(backend, "one", request(seed=n))) for n in range(5)]
        async with asyncio.timeout(5):
            ends = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(end, BackendDeadError) for end in ends)
            assert "illegal memory access" in str(ends[0])
            with pytest.raises(BackendDeadError):
                await tokens_of(backend, "one", request())

    asyncio.run(run())
    assert not backend.is_healthy
    backend.close()


def test_closing_ends_who_still_waits(backend):
    async def run():
        waiting = asyncio.create_task(tokens_of(backend, "one", request(max_new_tokens=120)))
        await until(lambda: backend.load().running)
        await asyncio.to_thread(backend.close)
        with pytest.raises(BackendDeadError):
            await waiting

    asyncio.run(run())


def write_chat_checkpoint(run_dir: str) -> str:
    """A run directory with a tokenizer and one chat checkpoint; returns the checkpoint's folder."""
    run, model = RunFolder(run_dir), random_model(7)
    TOKENIZER.save(run.tokenizer)
    writer = CheckpointWriter(run.sft.checkpoints, rank=0, world_size=1, keep=1, attempt="only")
    state = {"model": asdict(model.config), "tokenizer_hash": TOKENIZER.hash, "stage": {"base_sha256": ""},
             "generation": {"temperature": 0.5, "top_k": 7}}  # fmt: skip
    writer.save(1, dict(model.named_parameters()), {}, state)
    writer.wait()
    return newest_of(run.sft, pytest.fail).folder


@pytest.mark.parametrize("where", ["local", "uri"])
def test_models_are_read_from_a_path_or_uri_and_answer_alike(tmp_path, where, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    run_dir = str(tmp_path / "run") if where == "local" else f"memory://{uuid.uuid4().hex}"
    folder = write_chat_checkpoint(run_dir)
    models = ("sft", f"other={folder}")
    config = ServingConfig(run_dir=run_dir, models=models, dtype="float32", max_running=2, compile="off")
    opened = EngineBackend.open(config)
    try:
        found = opened.models["other"]
        assert (found.checkpoint, found.is_chat, found.capacity) == (folder, True, 128)
        assert found.defaults == {"temperature": 0.5, "top_k": 7}
        engine = Engine(random_model(7).prepare_for_inference())
        expected = complete(ToolLoop(engine, TOKENIZER), [request()])[0].tokens
        for name in ("sft", "other"):
            assert asyncio.run(tokens_of(opened, name, request())) == expected
    finally:
        opened.close()
