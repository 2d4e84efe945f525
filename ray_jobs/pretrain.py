"""Token shards to a base model. Run again, it resumes; Ctrl-C leaves with a checkpoint."""

import sys

import tyro

from nanochat import storage
from nanochat.cluster.environment import set_ray_environment
from nanochat.config.cluster import ClusterConfig
from nanochat.config.pretrain import PretrainConfig


def pretrain(
    config: tyro.conf.OmitArgPrefixes[PretrainConfig],
    cluster: tyro.conf.OmitArgPrefixes[ClusterConfig],
    run_dir: str = "runs/base",
) -> int:
    """Pretrain a base model on a run directory's token shards.

    Args:
        run_dir: Run directory with tokenizer and shards, a local path or URI.
    """
    set_ray_environment()
    from nanochat.cluster.jobs import pretrain_base
    from nanochat.cluster.session import session
    from nanochat.cluster.terminal import Terminal, run_job

    def main() -> None:
        with storage.claimed(run_dir), session(cluster, run_dir):
            pretrain_base(run_dir, config, cluster, Terminal())

    return run_job(main, run_dir)


if __name__ == "__main__":
    sys.exit(tyro.cli(pretrain))
