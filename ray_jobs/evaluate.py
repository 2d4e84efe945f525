"""Models to scores: chat tasks, CORE, bits per byte, on as many actors as there are GPUs. Each has n and its error."""

import sys

import tyro

from nanochat import storage
from nanochat.cluster.environment import set_ray_environment
from nanochat.config.cluster import ClusterConfig
from nanochat.config.evaluation import EvaluationConfig


def evaluate(
    config: tyro.conf.OmitArgPrefixes[EvaluationConfig],
    cluster: tyro.conf.OmitArgPrefixes[ClusterConfig],
    run_dir: str = "runs/base",
) -> int:
    """Score a run directory's models and write them to evaluation/ and report.html.

    Args:
        run_dir: Run directory with trained models, a local path or URI.
    """
    set_ray_environment()
    from nanochat.cluster.jobs import evaluate_models
    from nanochat.cluster.session import session
    from nanochat.cluster.terminal import Terminal, run_job
    from nanochat.pages.report import write_report

    def main() -> None:
        terminal = Terminal()
        with storage.claimed(run_dir), session(cluster, run_dir):
            evaluate_models(run_dir, config, cluster, terminal)
        terminal.line(f"report     {write_report(run_dir)}")

    return run_job(main, run_dir)


if __name__ == "__main__":
    sys.exit(tyro.cli(evaluate))
