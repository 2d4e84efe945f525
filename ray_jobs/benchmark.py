"""Measure training, data, scoring, the engine and the endpoint on this machine; prints a table and writes JSON."""

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nanochat import storage
from nanochat.cluster.environment import set_ray_environment
from nanochat.config.cluster import ClusterConfig


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """One benchmark on this machine."""

    what: Annotated[
        Literal["train", "pack", "stream", "core", "engine", "backends", "serve", "rl", "estimate"],
        tyro.conf.Positional,
    ]
    """train (Ray Train against a plain process), pack (text to token shards), stream (shards into a worker), core (a
    run directory's base model on few-shot multiple choice, batched against one example at a time), engine (requests in
    this process), backends (a run directory's base model on our engine and on vLLM, in turns), serve (requests through
    HTTP and Ray Serve, or what --url names), rl (a run directory's chat model on word problems of two steps: what it
    learns, and how fast it is beside one group at a time), estimate (on paper: the time to GPT-2's grade on 8 H100, and
    what that assumes)."""
    json: Path | None = None
    """Write hardware and results here."""
    steps: int = 120
    """train: steps of 8,192 tokens on each side."""
    corpus: str = "pydocs"
    """Text to use: pydocs, or a path, glob or URI."""
    run_dir: str = "runs/benchmark"
    """Scratch space, kept between runs; core, backends, rl: the run directory of the model."""
    seeds: int = 3
    """rl: so many runs, each from the chat model; 0 = speed alone."""
    updates: int = 30
    """rl: updates of each."""
    throughput: bool = True
    """rl: measure speed, too."""
    bundle: str | None = None
    """core: folder of the evaluation bundle."""
    max_per_task: int = 32
    """core: examples of each task."""
    url: str | None = None
    """serve: measure this endpoint (http://HOST:PORT/v1) instead of one that is started here."""
    model: str = "pretrain"
    """serve --url: the model to ask."""
    api_key: str | None = None
    """serve --url: the key."""
    concurrency: tuple[int, ...] = (1, 8, 16, 32)
    """serve --url: numbers of clients, one after the other."""
    rates: tuple[float, ...] = ()
    """serve --url: requests per second that arrive at random, one after the other."""
    requests: int = 64
    """serve --url: requests of each level."""
    first_token_ms: float = 200.0
    """serve: what goodput asks of the first token."""
    per_token_ms: float = 50.0
    """serve: what goodput asks of the following ones."""


def benchmark(config: BenchmarkConfig) -> int:
    """Measure and show."""
    if config.what == "estimate":
        from nanochat.training.estimate import Assumptions, estimate

        show(asdict(Assumptions()), estimate(Assumptions()))
        return 0
    job_start_s = time.time()
    set_ray_environment()
    from nanochat.cluster import benchmarks, rl_benchmark
    from nanochat.cluster.core_benchmark import measure_core
    from nanochat.cluster.session import session
    from nanochat.cluster.terminal import run_job
    from nanochat.config.pretrain import PretrainConfig
    from nanochat.errors import ConfigError
    from nanochat.run_context import RunContext
    from nanochat.training.hardware import choose_hardware, describe_machine

    cluster = ClusterConfig(num_workers=1, cpus_per_worker=0.5)

    def main() -> None:
        if config.what == "core":
            if config.bundle is None:
                raise ConfigError("bundle=None: core needs an evaluation bundle. Give its folder with --bundle.")
            report(flat(measure_core(config.run_dir, config.bundle, config.max_per_task), "core"))
            return
        if config.what == "rl":
            with storage.claimed(config.run_dir), session(rl_benchmark.CLUSTER, config.run_dir):
                results = measure_rl(config)
            report(results)
            return
        if config.what in ("engine", "backends", "serve"):
            with storage.claimed(config.run_dir):
                report(measure_inference(config))
            return
        with storage.claimed(config.run_dir), session(cluster, config.run_dir):
            if config.what == "train":
                results = benchmarks.measure_training(config.run_dir, config.corpus, config.steps, cluster, job_start_s)
                results |= benchmarks.measure_checkpoint(config.run_dir)
                for depth in (4, 12):
                    results |= {
                        f"depth_{depth}_{name}": n for name, n in benchmarks.memory_by_calculation(depth).items()
                    }
            elif config.what == "pack":
                results = benchmarks.measure_packing(config.run_dir, config.corpus)
            else:
                results = benchmarks.measure_streaming(config.run_dir, config.corpus)
        report(results)

    def report(results: dict[str, object]) -> None:
        hardware = describe_machine(choose_hardware(PretrainConfig(), RunContext()))
        show(hardware, results)
        if config.json is not None:
            storage.write_json(str(config.json), {"hardware": hardware, "results": results})

    return run_job(main, config.run_dir)


def measure_rl(config: BenchmarkConfig) -> dict[str, Any]:
    """Measure what reinforcement learning learns, and how fast."""
    from nanochat.cluster.rl_benchmark import measure_learning, measure_throughput
    from nanochat.cluster.terminal import Terminal

    results = measure_throughput(config.run_dir, Terminal()) if config.throughput else {}
    if config.seeds:
        results |= measure_learning(config.run_dir, config.seeds, config.updates, Terminal())
    return results


def measure_inference(config: BenchmarkConfig) -> dict[str, object]:
    """Measure the engine, an endpoint here, or one elsewhere."""
    from nanochat.cluster import serving_benchmark

    if config.what == "engine":
        from nanochat.cluster.int8_benchmark import measure_int8

        results = serving_benchmark.measure_engine(config.run_dir, config.corpus)
        return results | flat(measure_int8(config.run_dir), "int8")
    if config.what == "backends":
        from nanochat.cluster.backend_benchmark import measure_backends

        return flat(measure_backends(config.run_dir), "backends")
    if config.url is None:
        return serving_benchmark.measure_serving(config.run_dir, config.corpus)
    found = serving_benchmark.measure_url(
        config.url, config.model, config.api_key, config.concurrency, config.rates, config.requests,
        config.first_token_ms, config.per_token_ms,
    )  # fmt: skip
    return flat(found, "serve")


def flat(values: dict[str, Any], prefix: str) -> dict[str, object]:
    """Return nested results by their joined names."""
    found: dict[str, object] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}_{name}") if isinstance(value, dict) else {f"{prefix}_{name}": value}
    return found


def show(hardware: Mapping[str, object], results: Mapping[str, object]) -> None:
    """Print a table."""
    for name, value in {**hardware, **results}.items():
        if isinstance(value, list):
            text = " ".join(f"{number:,.4g}" for number in value)
        else:
            text = (
                f"{value:,.4g}"
                if isinstance(value, float) and abs(value) < 100
                else f"{value:,.0f}"
                if isinstance(value, (int, float))
                else str(value)
            )
        print(f"{name:64} {text}")


if __name__ == "__main__":
    sys.exit(benchmark(tyro.cli(BenchmarkConfig)))
