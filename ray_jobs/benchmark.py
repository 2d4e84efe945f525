"""Measure training, packing and streaming on this machine; prints a table and writes JSON."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nanochat import storage
from nanochat.cluster.environment import set_ray_environment
from nanochat.config.cluster import ClusterConfig


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """One benchmark on this machine."""

    what: Annotated[Literal["train", "pack", "stream"], tyro.conf.Positional]
    """train (Ray Train against a plain process), pack (text to token shards), stream (shards into a worker)."""
    json: Path | None = None
    """Write hardware and results here."""
    steps: int = 120
    """train: steps of 8,192 tokens on each side."""
    corpus: str = "pydocs"
    """Text to use: pydocs, or a path, glob or URI."""
    run_dir: str = "runs/benchmark"
    """Scratch space, kept between runs."""


def benchmark(config: BenchmarkConfig) -> int:
    """Measure and show."""
    job_start_s = time.time()
    set_ray_environment()
    from nanochat.cluster import benchmarks
    from nanochat.cluster.session import session
    from nanochat.cluster.terminal import run_job
    from nanochat.config.pretrain import PretrainConfig
    from nanochat.run_context import RunContext
    from nanochat.training.hardware import choose_hardware, describe_machine

    log_path = storage.RunFolder(config.run_dir).ray_log
    cluster = ClusterConfig(num_workers=1, cpus_per_worker=0.5)

    def main() -> None:
        with storage.claimed(config.run_dir), session(cluster, log_path):
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
        hardware = describe_machine(choose_hardware(PretrainConfig(), RunContext()))
        show(hardware, results)
        if config.json is not None:
            storage.write_json(str(config.json), {"hardware": hardware, "results": results})

    return run_job(main, log_path)


def show(hardware: dict[str, object], results: dict[str, object]) -> None:
    """Print a table."""
    for name, value in {**hardware, **results}.items():
        if isinstance(value, list):
            text = " ".join(f"{number:,.0f}" for number in value)
        else:
            text = (
                f"{value:,.4g}"
                if isinstance(value, float) and abs(value) < 100
                else f"{value:,.0f}"
                if isinstance(value, (int, float))
                else str(value)
            )
        print(f"{name:40} {text}")


if __name__ == "__main__":
    sys.exit(benchmark(tyro.cli(BenchmarkConfig)))
