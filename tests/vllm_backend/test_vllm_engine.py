"""What vLLM's own scheduling could change and does not: little memory, aborts, tools, penalties, weights that lack."""

import random

import pytest
import torch
from naive_gpt import randomise

from nanochat.config.model import ModelConfig
from nanochat.errors import CheckpointError, ConfigError
from nanochat.inference.completions import complete
from nanochat.inference.engine import Engine
from nanochat.inference.requests import Request
from nanochat.inference.vllm_engine import VllmEngine
from nanochat.model.gpt import GPT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CONFIG = ModelConfig(sequence_len=256, vocab_size=300, n_layer=2, n_head=2, n_kv_head=1, n_embd=64)
STOPS = frozenset({3, 7, 9})


@pytest.fixture(scope="module")
def model() -> GPT:
    found = GPT(CONFIG).eval()
    randomise(found)
    return found


def by_vllm(model: GPT, **options) -> VllmEngine:
    return VllmEngine(
        CONFIG, model.state_dict(), dtype=torch.float32, device=torch.device("cpu"), **{"max_running": 16, **options}
    )


def mixed_requests(count: int) -> list[Request]:
    draw = random.Random(1)
    return [
        Request(
            prompt=tuple(draw.randrange(300) for _ in range(draw.choice([1, 5, 31, 32, 33, 96, 100, 150]))),
            max_new_tokens=draw.randint(1, 60), temperature=draw.choice([0.0, 0.7, 1.0]), seed=number,
            top_k=draw.choice([None, 1, 20]), top_p=draw.choice([1.0, 0.9]), min_p=draw.choice([0.0, 0.05]),
            repetition_penalty=draw.choice([1.0, 1.2]), frequency_penalty=draw.choice([0.0, 0.5]),
            presence_penalty=draw.choice([0.0, 0.3]), stop_tokens=STOPS, min_new_tokens=draw.choice([0, 10]),
            logit_bias=draw.choice([{}, {5: 4.0, 6: -100.0}]), logprobs=draw.choice([None, 0, 3]),
            prompt_logprobs=draw.choice([None, None, 2]),
        )
        for number in range(count)
    ]  # fmt: skip


def events_of(engine, requests: list[Request], aborted: set[int] = frozenset()) -> list[list]:
    """The events of each request; some are aborted, one a step."""
    ids = [engine.add(request) for request in requests]
    found = {id: [] for id in ids}
    left = {id for number, id in enumerate(ids) if number not in aborted}
    doomed = [ids[number] for number in sorted(aborted)]
    while left:
        for event in engine.step():
            found[event.id].append(event)
            left -= {event.id} if event.finish_reason else set()
        if doomed:
            engine.abort(doomed.pop())
    for id in doomed:
        engine.abort(id)
    return [found[id] for number, id in enumerate(ids) if number not in aborted]


def test_little_memory_and_aborts_change_no_token_and_no_probability(model):
    requests, aborted = mixed_requests(60), set(range(0, 60, 7))
    engine = by_vllm(model, cache_tokens=512, step_tokens=64)
    actual = events_of(engine, requests, aborted)
    assert engine.load().preemptions > 0
    expected = events_of(Engine(model, max_running=16), requests, aborted)
    for ours, theirs in zip(expected, actual, strict=True):
        assert [(event.token, event.finish_reason) for event in theirs] == [
            (event.token, event.finish_reason) for event in ours
        ]
        for event, other in zip(ours, theirs, strict=True):
            assert other.logprob == pytest.approx(event.logprob, abs=1e-4)
            assert (other.likelihood is None) == (event.likelihood is None)
            if event.likelihood is not None:
                assert other.likelihood.logprob == pytest.approx(event.likelihood.logprob, abs=1e-4)
                assert [id for id, _ in other.likelihood.likeliest] == [id for id, _ in event.likelihood.likeliest]
        told, said = theirs[0].prompt.likelihoods, ours[0].prompt.likelihoods
        assert [one.logprob for one in told] == pytest.approx([one.logprob for one in said], abs=1e-4)
        assert [[id for id, _ in one.likeliest] for one in told] == [[id for id, _ in one.likeliest] for one in said]
    load = engine.load()
    assert (load.running, load.waiting, load.kv_tokens_free) == (0, 0, load.kv_tokens)
    assert engine._answers == engine._drawn == {}


def test_an_answer_that_comes_back_from_a_tool_does_not_queue_again(model):
    engine = by_vllm(model, max_running=2)
    for number in range(8):
        engine.add(Request(prompt=(number + 1,) * 8, max_new_tokens=30, seed=number))
    while engine.load().running < 2:
        engine.step()
    back = engine.add(Request(prompt=(5, 6, 7, 8), max_new_tokens=4, continued=2))
    ended = []
    while back not in ended:
        ended += [event.id for event in engine.step() if event.finish_reason]
    assert len(ended) <= 3, "only who had begun"


@pytest.mark.parametrize("lacking", ["lm_head.weight", "transformer.h.1.mlp.c_proj.weight"])
def test_weights_that_lack_are_refused_at_the_start_and_later(model, lacking):
    weights = {name: one for name, one in model.state_dict().items() if name != lacking}
    with pytest.raises(CheckpointError, match=lacking):
        VllmEngine(CONFIG, weights, dtype=torch.float32, device=torch.device("cpu"))
    engine = by_vllm(model)
    with pytest.raises(CheckpointError, match=lacking):
        engine.load_weights(weights)
    request = Request(prompt=(1, 2, 3), max_new_tokens=8)
    assert complete(engine, [request]) == complete(Engine(model), [request])


def test_two_models_live_in_one_process(model):
    other = GPT(CONFIG).eval()
    randomise(other, seed=5)
    engines = [by_vllm(model), by_vllm(other)]
    requests = mixed_requests(8)
    for engine, of_engine in zip(engines, (model, other), strict=True):
        assert complete(engine, requests) == complete(Engine(of_engine), requests)
    assert complete(engines[0], requests) == complete(Engine(model), requests)


def test_a_request_that_it_cannot_take_fails_alone(model):
    engine = by_vllm(model)
    with pytest.raises(ConfigError, match="vLLM does not take this request"):
        engine.add(Request(prompt=(1, 2), max_new_tokens=2, prompt_logprobs=-7))
    request = Request(prompt=(1, 2, 3), max_new_tokens=4)
    assert complete(engine, [request]) == complete(Engine(model), [request])
