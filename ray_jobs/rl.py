"""A chat model to one that is better at what can be checked. Run again, it resumes; Ctrl-C leaves with a checkpoint."""

import sys

import tyro

from nanochat import storage
from nanochat.cluster.environment import set_ray_environment
from nanochat.config.cluster import ClusterConfig
from nanochat.config.rl import RLConfig, RolloutsConfig


def rl(
    config: tyro.conf.OmitArgPrefixes[RLConfig],
    rollouts: tyro.conf.OmitArgPrefixes[RolloutsConfig],
    cluster: tyro.conf.OmitArgPrefixes[ClusterConfig],
    run_dir: str = "runs/base",
) -> int:
    """Improve a run directory's chat model by reinforcement learning on a task.

    Args:
        run_dir: Run directory with a fine-tuned model, a local path or URI.
    """
    set_ray_environment()
    from nanochat.cluster.rl_job import practise, prepare_practice
    from nanochat.cluster.session import session
    from nanochat.cluster.terminal import Terminal, run_job
    from nanochat.pages.report import write_report

    def main() -> None:
        terminal = Terminal()
        with storage.claimed(run_dir):
            practice = prepare_practice(run_dir, config, terminal)
            with session(cluster, run_dir):
                practise(run_dir, practice, rollouts, cluster, terminal)
            terminal.line(f"report     {write_report(run_dir)}")

    return run_job(main, run_dir)


if __name__ == "__main__":
    sys.exit(tyro.cli(rl))
