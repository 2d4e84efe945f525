"""How fast the engine is, and what HTTP and Ray Serve cost beside it, on the benchmark's fixed model.

The model has the shape of the training benchmark (depth 4, width 256, 8,192 tokens of vocabulary) and random weights:
speed does not depend on them. Prompts are distinct, of 64 random tokens; answers have 128, at temperature 1 and top-k
50. Engine and endpoint are measured in one run, so that their ratio is one machine's at one time.
"""

import asyncio
import operator
import random
import statistics
import time
from dataclasses import asdict
from typing import Any

import torch

from nanochat import storage
from nanochat.cluster import benchmarks, load_generator
from nanochat.cluster.session import session
from nanochat.config.cluster import ClusterConfig
from nanochat.config.replicas import ReplicasConfig
from nanochat.config.serving import ServingConfig
from nanochat.data.tokenizer import Tokenizer
from nanochat.inference.completions import complete
from nanochat.inference.engine import Engine
from nanochat.inference.load import load_model
from nanochat.inference.requests import Request
from nanochat.model.gpt import GPT
from nanochat.run_context import RunContext
from nanochat.storage import RunFolder
from nanochat.training.checkpoint import CheckpointWriter, newest_of
from nanochat.training.plan import resolve

PROMPT_TOKENS, NEW_TOKENS = 64, 128
CONCURRENCY = (1, 8, 16, 32)
ROUNDS, SERVING_ROUNDS = 3, 7
PREFIX_TOKENS = 400
LONG_PROMPT_TOKENS, LONG_PROMPT_STEPS = 480, 40


def fixed_checkpoint(run_dir: str, corpus: str) -> str:
    """Return the run directory's checkpoint of random weights, made where it is missing, with its tokenizer."""
    folder = RunFolder(run_dir)
    _, tokenizer, _ = benchmarks.prepared(folder, corpus)
    stage = folder.pretrain
    if not storage.exists(stage.checkpoints):
        config = resolve(benchmarks.training_config(1), tokenizer.vocab_size, 512).model
        model = GPT(config)
        model.initialize(torch.Generator().manual_seed(0))
        state = {"model": asdict(config), "tokenizer_hash": tokenizer.hash, "stage": {}, "generation": {}}
        writer = CheckpointWriter(stage.checkpoints, rank=0, world_size=1, keep=1, attempt="benchmark")
        writer.save(0, dict(model.named_parameters()), {}, state)
        writer.wait()
    return newest_of(stage, print).folder


def measure_engine(run_dir: str, corpus: str) -> dict[str, Any]:
    """Return tokens per second by requests at a time, what a known prefix saves, and gaps while prompts arrive."""
    with session(ClusterConfig(), run_dir):
        fixed_checkpoint(run_dir, corpus)
    model = _model(run_dir)
    speeds: dict[int, list[float]] = {count: [] for count in CONCURRENCY}
    _tokens_per_s(model, 2, seed=0)
    for number in range(ROUNDS):
        for count in CONCURRENCY:
            speeds[count].append(_tokens_per_s(model, count, seed=number))
    results: dict[str, Any] = {
        f"engine_tokens_per_s_c{count}": statistics.median(found) for count, found in speeds.items()
    }
    results |= {"prefix_hit_ttft_ratio": _prefix_ratio(model), "itl_p99_over_p50": _gap_ratio(model)}
    return results | _changed_answers(model)


def measure_serving(run_dir: str, corpus: str, port: int = 0) -> dict[str, Any]:
    """Return the endpoint's throughput and first token beside the engine's own."""
    from nanochat.cluster.deployments import deploy, end
    from nanochat.cluster.endpoint_session import check_address, pinned, serve_session, wait_until_ready

    cluster, replicas = ClusterConfig(), ReplicasConfig(replica_cpus=1)
    serving = check_address(ServingConfig(run_dir=run_dir, models=("pretrain",), port=port, compile="off"))
    with session(ClusterConfig(), run_dir):
        fixed_checkpoint(run_dir, corpus)
    model = _model(run_dir)
    engine, limits = Engine(model, max_running=1), {"first_token_ms": 1000.0, "per_token_ms": 50.0}
    speeds: dict[str, list[float]] = {"engine": [], "serve": []}
    waits_ms: dict[str, list[float]] = {"engine": [], "serve": []}
    with serve_session(serving, replicas, cluster) as address:
        deploy("benchmark", "/", pinned(serving, print), replicas)
        wait_until_ready(address)
        url = f"{address}/v1/completions"
        asyncio.run(load_generator.closed_loop(url, bodies("pretrain", 32, seed=99), 16, None))
        _tokens_per_s(model, 16, seed=99)
        figures: dict[str, Any] = {}
        for number in range(SERVING_ROUNDS):  # in turn: so both see the same machine
            speeds["engine"].append(_tokens_per_s(model, 16, seed=number))
            timings = asyncio.run(load_generator.closed_loop(url, bodies("pretrain", 16, seed=number), 16, None))
            figures = load_generator.figures(timings, **limits)
            speeds["serve"].append(figures["tokens_per_s"])
            alone = bodies("pretrain", 8, seed=100 + number, max_tokens=8)
            waits_ms["engine"] += [1e3 * _first_token_s(engine, body["prompt"]) for body in alone]
            timings = asyncio.run(load_generator.closed_loop(url, alone, 1, None))
            waits_ms["serve"] += [1e3 * timing.first_token_s for timing in timings]
        end("benchmark")
    lost = [1 - serve / engine for engine, serve in zip(speeds["engine"], speeds["serve"], strict=True)]
    return {
        "engine_tokens_per_s_c16": statistics.median(speeds["engine"]),
        "serve_tokens_per_s_c16": statistics.median(speeds["serve"]),
        "serve_throughput_lost_c16": statistics.median(lost),
        "engine_ttft_ms_p50": statistics.median(waits_ms["engine"]),
        "serve_ttft_ms_p50": statistics.median(waits_ms["serve"]),
        "serve_ttft_added_ms": statistics.median(waits_ms["serve"]) - statistics.median(waits_ms["engine"]),
        **{f"serve_c16_{name}": value for name, value in figures.items()},
    }


def measure_url(
    url: str, model: str, key: str | None, concurrency: tuple[int, ...], rates: tuple[float, ...], requests: int,
    first_token_ms: float, per_token_ms: float,
) -> dict[str, Any]:  # fmt: skip
    """Return the figures of any endpoint: closed loops of so many clients, then random arrivals at each rate."""
    results: dict[str, Any] = {}
    path = f"{url.rstrip('/')}/completions"
    for count in concurrency:
        timings = asyncio.run(load_generator.closed_loop(path, bodies(model, requests, seed=count), count, key))
        results[f"c{count}"] = load_generator.figures(timings, first_token_ms, per_token_ms)
    for rate in rates:
        some = bodies(model, requests, seed=int(1000 * rate))
        timings = asyncio.run(load_generator.open_loop(path, some, rate, 0, key))
        results[f"rate_{rate:g}"] = load_generator.figures(timings, first_token_ms, per_token_ms)
    return results


def bodies(model: str, count: int, seed: int, max_tokens: int = NEW_TOKENS) -> list[dict[str, Any]]:
    """Return the bodies of completions of distinct prompts, each of exactly `max_tokens` new tokens."""
    return [
        {
            "model": model, "prompt": _prompt(PROMPT_TOKENS, 1000 * seed + number), "max_tokens": max_tokens,
            "temperature": 1.0, "top_k": 50, "seed": number, "ignore_eos": True,
        }
        for number in range(count)
    ]  # fmt: skip


def token_request(seed: int) -> Request:
    """Return a request for NEW_TOKENS behind a prompt of its own."""
    return _request(_prompt(PROMPT_TOKENS, seed), seed=seed)


def _model(run_dir: str) -> GPT:
    folder = RunFolder(run_dir)
    return load_model(newest_of(folder.pretrain, print), Tokenizer.load(folder.tokenizer), RunContext())


def _prompt(tokens: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000), k=tokens)


def _request(prompt: list[int], new_tokens: int = NEW_TOKENS, seed: int = 0) -> Request:
    return Request(prompt=tuple(prompt), max_new_tokens=new_tokens, temperature=1.0, top_k=50, seed=seed)


def _tokens_per_s(model: GPT, count: int, seed: int) -> float:
    engine = Engine(model, max_running=count)
    requests = [_request(_prompt(PROMPT_TOKENS, 1000 * seed + number), seed=number) for number in range(count)]
    begin_s = time.perf_counter()
    complete(engine, requests)
    return count * NEW_TOKENS / (time.perf_counter() - begin_s)


def _first_token_s(engine: Engine, prompt: list[int]) -> float:
    begin_s = time.perf_counter()
    engine.add(_request(prompt, 1))
    while not engine.step():
        pass
    return time.perf_counter() - begin_s


def _prefix_ratio(model: GPT) -> float:
    """Return the time to the first token of a prompt that is known, over that of the same prompt when it is new."""
    engine = Engine(model, max_running=4)
    ratios = []
    for number in range(4 * ROUNDS):
        prompt = _prompt(PREFIX_TOKENS, number)
        cold_s = _first_token_s(engine, prompt)
        ratios.append(_first_token_s(engine, prompt) / cold_s)
    return statistics.median(ratios)


def _changed_answers(model: GPT) -> dict[str, int]:
    """Return how many of 64 answers are others in company, after a prefix hit, and with preemptions than alone.

    In float32 none may be; in bfloat16 other groupings round otherwise.
    """
    requests = [_request(_prompt(PROMPT_TOKENS + 1, 7000 + number), seed=number) for number in range(64)]
    alone, known = [], []
    for request in requests:
        engine = Engine(model, max_running=1)
        alone.append(complete(engine, [request])[0].tokens)
        known.append(complete(engine, [request])[0].tokens)
    tight = Engine(model, max_running=32, cache_tokens=3200)
    ways = {
        "in_company": [one.tokens for one in complete(Engine(model, max_running=32), requests)],
        "by_a_prefix_hit": known,
        "with_preemptions": [one.tokens for one in complete(tight, requests)],
    }
    changed = {f"changed_{name}_of_64": sum(map(operator.ne, alone, found)) for name, found in ways.items()}
    return changed | {"preemptions_meanwhile": tight.preemptions}


def _gap_ratio(model: GPT) -> float:
    """Return p99 over p50 of the seconds between an answer's tokens, for 8 streams while long prompts arrive."""
    engine = Engine(model, max_running=16)
    streams = {engine.add(_request(_prompt(PROMPT_TOKENS, number), 400, seed=number)) for number in range(8)}
    last_s: dict[int, float] = {}
    gaps: list[float] = []
    steps = 0
    while streams:
        if steps % LONG_PROMPT_STEPS == LONG_PROMPT_STEPS - 1:
            engine.add(_request(_prompt(LONG_PROMPT_TOKENS, steps), 8))
        steps += 1
        for event in engine.step():
            now_s = time.perf_counter()
            if event.id in streams:
                if event.id in last_s:
                    gaps.append(now_s - last_s[event.id])
                last_s[event.id] = now_s
                if event.finish_reason:
                    streams.discard(event.id)
    return load_generator.percentile(gaps, 99) / load_generator.percentile(gaps, 50)
