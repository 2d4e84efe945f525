"""Models behind an OpenAI-compatible endpoint with a chat page, until Ctrl-C."""

import sys

import tyro

from nanochat.cluster.environment import set_ray_environment
from nanochat.config.replicas import ReplicasConfig
from nanochat.config.serving import ServingConfig


def serve(
    config: tyro.conf.OmitArgPrefixes[ServingConfig],
    replicas: tyro.conf.OmitArgPrefixes[ReplicasConfig],
    address: str | None = None,
) -> int:
    """Serve a run directory's models; the first Ctrl-C lets running answers finish, the second does not.

    Args:
        address: Ray cluster to join (auto = the running one); none = the job's own cluster, or a Ray on this machine.
    """
    set_ray_environment()
    from nanochat.cluster.terminal import run_job

    return run_job(lambda: _run(config, replicas, address), config.run_dir)


def _run(config: ServingConfig, replicas: ReplicasConfig, address: str | None) -> None:
    from nanochat.cluster.endpoint_session import run_endpoint
    from nanochat.cluster.terminal import Terminal
    from nanochat.config.cluster import ClusterConfig

    run_endpoint(config, replicas, ClusterConfig(address=address), Terminal())


if __name__ == "__main__":
    sys.exit(tyro.cli(serve))
