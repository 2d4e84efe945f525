"""Compiled steps say what the others say, at any number of tokens, without compiling again, after other weights too."""

import gc
import logging
import random
import threading

import pytest
import torch

from nanochat.config.model import ModelConfig
from nanochat.inference import compiled_steps
from nanochat.inference.completions import complete
from nanochat.inference.engine import Engine
from nanochat.inference.requests import Event, Request
from nanochat.model import int8
from nanochat.model.gpt import GPT
from nanochat.model.int8 import convert_to_int8, multiplies_int8
from nanochat.training.hardware import can_compile, multiplies_bfloat16

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(can_compile(CPU) is not None, reason="needs a C++ compiler"),
]
CONFIG = ModelConfig(sequence_len=256, vocab_size=300, n_layer=2, n_head=2, n_kv_head=1, n_embd=64, smear=True)


def model_of(seed: int, dtype: torch.dtype = torch.float32) -> GPT:
    """All parameters are random."""
    model, draw = GPT(CONFIG, dtype), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=draw).mul_(0.3)
    return model.to(dtype).prepare_for_inference()


def requests(count: int, seed: int = 1) -> list[Request]:
    """Prompts beside sequences that decode, in chunks, some behind known prefixes, drawn in several ways."""
    draw = random.Random(seed)
    known = [draw.randrange(300) for _ in range(100)]
    return [
        Request(
            prompt=(*known[: draw.choice([0, 0, 64, 90])], *(draw.randrange(300) for _ in range(draw.randint(1, 120)))),
            max_new_tokens=draw.randint(1, 30), temperature=draw.choice([0.0, 0.8]), seed=number, top_k=20,
            prompt_logprobs=draw.choice([None, 0]),
        )
        for number in range(count)
    ]  # fmt: skip


def warmed(model: GPT) -> Engine:
    engine = Engine(model, max_running=16, compiled=True)
    complete(engine, [Request(prompt=(5,) * 8, max_new_tokens=4)] * 2)
    assert engine.compiled is not None
    assert engine.compiled.is_compiled
    assert engine.compiled.has_run
    return engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    return warmed(model_of(0))


@pytest.fixture
def no_compiling():
    with torch.compiler.set_stance("fail_on_recompile"):
        yield


def events_of(engine: Engine, asked: list[Request]) -> list[list[Event]]:
    found = {engine.add(request): [] for request in asked}
    while any(not events or events[-1].finish_reason is None for events in found.values()):
        for event in engine.step():
            found[event.id].append(event)
    return list(found.values())


def test_every_token_and_probability_is_that_of_the_other_steps(engine, no_compiling):
    expected = events_of(Engine(model_of(0), max_running=16), requests(40))
    actual = events_of(engine, requests(40))
    assert [[event.token for event in one] for one in actual] == [[event.token for event in one] for one in expected]
    for one, other in zip(actual, expected, strict=True):
        assert [event.logprob for event in one] == pytest.approx([event.logprob for event in other], abs=1e-4)
        ours, theirs = ([like.logprob for like in events[0].prompt.likelihoods] for events in (one, other))
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert sum(len(one[0].prompt.likelihoods) for one in actual) > 1000
    assert engine.load().prefix_hits > 500


def test_other_weights_are_those_of_the_next_step(engine, no_compiling):
    for seed in (3, 0):
        engine.load_weights(model_of(seed).state_dict())
        expected = complete(Engine(model_of(seed), max_running=16), requests(10))
        assert [one.tokens for one in complete(engine, requests(10))] == [one.tokens for one in expected]


def test_another_thread_runs_what_was_compiled(engine, no_compiling):
    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.extend(one.tokens for one in complete(engine, requests(6))))
    thread.start()
    thread.join()
    assert found == [one.tokens for one in complete(Engine(model_of(0), max_running=16), requests(6))]


def test_two_models_of_one_shape_do_not_mix(engine):
    other = warmed(model_of(7))
    for one, seed in ((other, 7), (engine, 0), (other, 7)):
        expected = complete(Engine(model_of(seed), max_running=16), requests(5))
        assert [found.tokens for found in complete(one, requests(5))] == [found.tokens for found in expected]


def logits_by(engine: Engine, rows: list[list[int]]) -> torch.Tensor:
    """The logits after each row, all in one step."""
    kept: list[torch.Tensor] = []

    def keeping(hidden_BC: torch.Tensor) -> torch.Tensor:
        kept.append(GPT.logits(engine.model, hidden_BC))
        return kept[-1].clone()

    engine.model.logits = keeping
    complete(engine, [Request(prompt=tuple(row), max_new_tokens=1) for row in rows])
    return torch.cat(kept)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_packed_weights_and_integers_are_multiplied_by(dtype, monkeypatch):
    if not multiplies_bfloat16(CPU) or (dtype == "int8" and not multiplies_int8(CPU)):
        pytest.skip("needs AVX512-BF16, for int8 AVX512-VNNI")
    monkeypatch.setattr(int8, "MIN_WEIGHTS", 0)
    models = [model_of(0, torch.bfloat16) for _ in range(2)]
    if dtype == "int8":
        models = [convert_to_int8(one) for one in models]
    compiled, used = warmed(models[0]), set()
    for place, linear in enumerate(models[0].fused_linears()):
        assert linear.opaque is not None
        linear.product = noting(linear.product, place, used)
    rows = [list(range(start, start + 20)) for start in range(0, 200, 20)]
    plain, actual = logits_by(Engine(models[1], max_running=16), rows), logits_by(compiled, rows)
    exact = logits_by(Engine(model_of(0), max_running=16), rows)
    assert used == set(range(len(models[0].fused_linears())))
    assert (actual - exact).abs().mean() < 1.2 * (plain - exact).abs().mean()
    assert (actual - exact).abs().mean() < 0.1 * exact.std()
    with torch.compiler.set_stance("fail_on_recompile"):
        alone = [complete(compiled, [request])[0].tokens for request in requests(8, seed=5)]
        assert [one.tokens for one in complete(compiled, requests(8, seed=5))] == alone


def noting(product, place: int, used: set[int]):
    def noted(input):
        used.add(place)
        return product(input)

    return noted


def test_a_compiler_that_fails_is_said_and_steps_go_on_uncompiled(monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("no such compiler")

    engine = Engine(model_of(0), max_running=16, compiled=True)
    assert engine.compiled is not None
    monkeypatch.setattr(engine.compiled, "_forward", fails)
    with caplog.at_level(logging.WARNING):
        found = complete(engine, requests(5))
    assert [one.getMessage() for one in caplog.records] == ["steps are not compiled: no such compiler"]
    assert found == complete(Engine(model_of(0), max_running=16), requests(5))


def test_nothing_is_kept_of_an_engine_that_is_gone():
    gc.collect()
    before = len(compiled_steps._ALIVE)
    engine = warmed(model_of(0))
    assert len(compiled_steps._ALIVE) == before + 1
    del engine
    gc.collect()
    assert len(compiled_steps._ALIVE) == before
