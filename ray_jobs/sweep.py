"""Many pretraining runs side by side: a grid or list of flags to a table and the iso-FLOP picture. It resumes."""

import sys

import tyro

from nanochat import storage
from nanochat.cluster.environment import set_ray_environment
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.sweep import SweepConfig


def sweep(config: tyro.conf.OmitArgPrefixes[SweepConfig], pretrain: tyro.conf.OmitArgPrefixes[PretrainConfig]) -> int:
    """Pretrain with every combination of flags, as many runs at a time as there is room for.

    Run again, it starts what is not finished. Ctrl-C leaves with checkpoints.
    """
    set_ray_environment()
    from nanochat.cluster.session import session
    from nanochat.cluster.sweep import plan_sweep, run_sweep
    from nanochat.cluster.terminal import Terminal, run_job

    def main() -> None:
        runs = plan_sweep(config, pretrain)
        with storage.claimed(config.run_dir), session(config.cluster, config.run_dir):
            run_sweep(config, runs, Terminal())

    return run_job(main, config.run_dir)


if __name__ == "__main__":
    sys.exit(tyro.cli(sweep))
