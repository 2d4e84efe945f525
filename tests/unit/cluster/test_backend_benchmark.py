"""The comparison of engines: the same requests in turns, ratios of one round each, no process left behind."""

import multiprocessing
import threading
from types import SimpleNamespace
from typing import ClassVar

import pytest

from nanochat.cluster import backend_benchmark
from nanochat.cluster.backend_benchmark import measure_backends, timed
from nanochat.cluster.serving_benchmark import NEW_TOKENS
from nanochat.config.model import ModelConfig
from nanochat.errors import ClusterError, ConfigError
from nanochat.inference import vllm_engine
from nanochat.inference.engine import Engine
from nanochat.inference.requests import Event
from nanochat.model.gpt import GPT

SPEEDS = {"native": [5.0, 300.0, 100.0, 220.0], "vllm": [1.0, 200.0, 125.0, 100.0]}
"""Of a warm-up and three rounds: 1.5, 0.8 and 2.2 times as fast."""


class FakeWorker:
    asked: ClassVar[list[tuple[str, int, int]]] = []
    closed: ClassVar[list[str]] = []
    fails: ClassVar[str | None] = None

    def __init__(self, run_dir: str, backend: str) -> None:
        if backend == self.fails:
            raise ClusterError("backend: its process has ended")
        self.backend = backend

    def measure(self, count: int, seed: int) -> dict[str, float]:
        self.asked.append((self.backend, count, seed))
        number = sum(one[:2] == (self.backend, count) for one in self.asked) - 1
        return {"tokens_per_s": SPEEDS[self.backend][number], "gap_ms": float(number)}

    def close(self) -> None:
        self.closed.append(self.backend)


@pytest.fixture
def worker(monkeypatch):
    for name, value in (("asked", []), ("closed", []), ("fails", None)):
        monkeypatch.setattr(FakeWorker, name, value)
    for name in ("check_vllm", "config_of", "newest_of"):
        monkeypatch.setattr(backend_benchmark, name, lambda *_: None)
    monkeypatch.setattr(backend_benchmark.Tokenizer, "load", lambda folder: None)
    monkeypatch.setattr(backend_benchmark, "_Worker", FakeWorker)
    return FakeWorker


def test_both_have_the_same_requests_and_each_is_first_in_every_other_round(worker):
    found = measure_backends("run", streams=(1, 8), rounds=3)
    expected = {
        "native_over_vllm": 1.5, "lowest": 0.8, "highest": 2.2,
        "native": {"tokens_per_s": 220.0, "gap_ms": 2.0}, "vllm": {"tokens_per_s": 125.0, "gap_ms": 2.0},
    }  # fmt: skip
    assert found == {"c1": expected, "c8": expected}
    rounds = [worker.asked[place : place + 2] for place in range(0, len(worker.asked), 2)]
    assert [[one[1:] for one in pair] for pair in rounds] == [
        [(count, 1000 * count + number)] * 2 for count in (1, 8) for number in (-1, 0, 1, 2)
    ]
    assert [pair[0][0] for pair in rounds[:4]] == ["vllm", "native", "vllm", "native"]
    assert worker.closed == ["native", "vllm"]


def test_who_has_begun_is_closed_if_the_other_does_not_begin(worker):
    worker.fails = "vllm"
    with pytest.raises(ClusterError, match="its process has ended"):
        measure_backends("run")
    assert worker.closed == ["native"]


def test_a_process_that_ends_is_said(monkeypatch):
    monkeypatch.setattr(backend_benchmark, "_work", ends_at_once)
    with pytest.raises(ClusterError, match=r"^backend: its process has ended, or does not answer"):
        backend_benchmark._Worker("run", "native")


@pytest.mark.parametrize("is_compiled", [True, False])
def test_an_engine_whose_steps_could_not_be_compiled_is_not_measured(monkeypatch, tiny_engine, is_compiled):
    tiny_engine.compiled = SimpleNamespace(is_compiled=is_compiled)
    for name in ("newest_of", "load_engine", "timed"):
        monkeypatch.setattr(backend_benchmark, name, lambda *_, of=name: tiny_engine if of == "load_engine" else of)
    monkeypatch.setattr(backend_benchmark.Tokenizer, "load", lambda folder: None)
    ours, theirs = multiprocessing.Pipe()
    ours.send((1, 0))
    worker = threading.Thread(target=backend_benchmark._work, args=(theirs, "run", "native"), daemon=True)
    worker.start()
    ours.recv()  # its threads
    if is_compiled:
        assert ours.recv() == "timed"
        ours.close()
    worker.join(20)
    assert not worker.is_alive()
    assert is_compiled or not ours.poll()


@pytest.fixture
def tiny_engine() -> Engine:
    return Engine(GPT(ModelConfig(sequence_len=32, vocab_size=40, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)))


def ends_at_once(*_) -> None:
    """In the place of an engine's process."""


def test_without_vllm_nothing_begins(monkeypatch, worker):
    monkeypatch.setattr(backend_benchmark, "check_vllm", vllm_engine.check_vllm)
    monkeypatch.setattr(vllm_engine, "_release_of", lambda package: None)
    with pytest.raises(ConfigError, match=r"^backend=vllm: needs vLLM 0\.32\.\*, here is none"):
        measure_backends("run")
    assert worker.asked == worker.closed == []


def test_times_are_those_of_the_events(monkeypatch):
    """Two streams: first tokens after 2 and 4 s, then one each second."""

    class Source:
        step_count = 0

        def __init__(self) -> None:
            self.requests: list[object] = []

        def add(self, request) -> int:
            self.requests.append(request)
            return len(self.requests)

        def step(self) -> list[Event]:
            self.step_count += 1
            clock[0] += 1.0
            said = {1: self.step_count - 2, 2: self.step_count - 4}
            return [
                Event(id, 7, "length" if count + 1 == NEW_TOKENS else None)
                for id, count in said.items() if 0 <= count < NEW_TOKENS
            ]  # fmt: skip

    clock, source = [50.0], Source()
    monkeypatch.setattr(backend_benchmark.time, "perf_counter", lambda: clock[0])
    found = timed(source, 2, seed=3)
    assert found == {
        "tokens_per_s": pytest.approx(2 * NEW_TOKENS / (NEW_TOKENS + 3)), "first_token_ms": 3000.0, "gap_ms": 1000.0
    }  # fmt: skip
    assert len({request.prompt for request in source.requests}) == 2
