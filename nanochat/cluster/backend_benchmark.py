"""One checkpoint on our engine and on vLLM, in turns on the same cores: tokens per second, first token, gaps.

Each engine lives in a process of its own, so neither sees the other's settings of threads and memory; the one that is
not asked waits. Both leave a core free, as a replica does, and have the same requests and draws. Streams come all at
once.
"""

import itertools
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, get_args

import torch

from nanochat.cluster.serving_benchmark import NEW_TOKENS, token_request
from nanochat.config.serving import EngineName, ServingConfig
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import ClusterError
from nanochat.inference.engine import Engine
from nanochat.inference.load import load_engine
from nanochat.inference.requests import InferenceEngine
from nanochat.inference.vllm_engine import check_vllm
from nanochat.storage import RunFolder
from nanochat.training.checkpoint import config_of, newest_of

STREAMS = (1, 8, 16, 32)
ROUNDS = 5
LOAD_TIMEOUT_S = 180.0


def measure_backends(run_dir: str, streams: Sequence[int] = STREAMS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the medians over rounds by number of streams and backend, and the ratio of tokens per second.

    Raises: ConfigError if vLLM is not installed or cannot compute the run's base model.
    """
    folder = RunFolder(run_dir)
    check_vllm(config_of(newest_of(folder.pretrain, print), Tokenizer.load(folder.tokenizer)))
    workers: dict[str, _Worker] = {}
    try:
        for name in get_args(EngineName):
            workers[name] = _Worker(run_dir, name)
        found: dict[str, Any] = {}
        for count in streams:
            taken: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
            for number in range(-1, rounds):  # the first is a warm-up
                for name, worker in list(workers.items())[:: -1 if number % 2 else 1]:
                    figures = worker.measure(count, seed=1000 * count + number)
                    taken[name] += [figures] if number >= 0 else []
            medians = {name: _medians(of_one) for name, of_one in taken.items()}
            ratios = [ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in zip(*taken.values())]
            found[f"c{count}"] = medians | {
                "native_over_vllm": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)
            }  # fmt: skip
        return found
    finally:
        for worker in workers.values():
            worker.close()


class _Worker:
    """An engine in another process."""

    def __init__(self, run_dir: str, backend: EngineName) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, run_dir, backend), daemon=True)
        self._process.start()
        theirs.close()
        self._answer(LOAD_TIMEOUT_S)

    def measure(self, count: int, seed: int) -> dict[str, float]:
        """Return the figures of so many streams, as `timed` has them."""
        self._pipe.send((count, seed))
        return self._answer(LOAD_TIMEOUT_S)

    def _answer(self, timeout_s: float) -> Any:
        try:
            if self._pipe.poll(timeout_s):
                return self._pipe.recv()
        except EOFError:
            pass
        raise ClusterError("backend: its process has ended, or does not answer. What it said stands above.")

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


def _work(pipe: Connection, run_dir: str, backend: EngineName) -> None:
    folder = RunFolder(run_dir)
    checkpoint = newest_of(folder.pretrain, print)
    config = ServingConfig(run_dir=run_dir, models=("pretrain",), backend=backend, max_running=max(STREAMS))
    engine = load_engine(checkpoint, Tokenizer.load(folder.tokenizer), config, None)
    pipe.send(torch.get_num_threads())
    while True:
        try:
            count, seed = pipe.recv()
        except EOFError:
            return
        figures = timed(engine, count, seed)
        if isinstance(engine, Engine) and engine.compiled is not None and not engine.compiled.is_compiled:
            return  # why is in the log; it would not be compared with a compiled vLLM
        pipe.send(figures)


def timed(engine: InferenceEngine, count: int, seed: int) -> dict[str, float]:
    """Return tokens per second of so many streams that come at once, and their medians in milliseconds."""
    begin_s = time.perf_counter()
    heard_s: dict[int, list[float]] = {}
    for number in range(count):
        heard_s[engine.add(token_request(1000 * seed + number))] = []
    left = count
    while left:
        events = engine.step()
        now_s = time.perf_counter() - begin_s
        for event in events:
            heard_s[event.id].append(now_s)
            left -= event.finish_reason is not None
    gaps_s = [later - earlier for times in heard_s.values() for earlier, later in itertools.pairwise(times)]
    return {
        "tokens_per_s": count * NEW_TOKENS / (time.perf_counter() - begin_s),
        "first_token_ms": 1e3 * statistics.median(times[0] for times in heard_s.values()),
        "gap_ms": 1e3 * statistics.median(gaps_s),
    }


def _medians(of_rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in of_rounds) for name in of_rounds[0]}
