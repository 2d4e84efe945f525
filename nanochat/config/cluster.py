"""What a job asks of Ray."""

from dataclasses import dataclass

from nanochat.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Workers and resources; none of it changes the numbers."""

    address: str | None = None
    """Ray cluster to join (`auto` = the running one); none = the job's own cluster, or a Ray on this machine."""
    use_gpu: bool | None = None
    """Train on GPUs; none = if the cluster has any now (say so where GPU nodes are started on demand)."""
    num_workers: int | None = None
    """Training workers; none = one per GPU that is there now, or one on CPU."""
    min_workers: int | None = None
    """Go on with as few as this when nodes are lost, in numbers that divide a step's rows; none = wait for all."""
    cpus_per_worker: float = 1.0
    """Logical CPUs that a training worker reserves."""
    by_label: bool = False
    """Put work on nodes whose label `work` names it: data, train, rollouts. cluster.yaml gives its nodes labels."""
    max_failures: int = 3
    """Restarts after a lost worker or node, a RuntimeError or an OSError; other errors end the run at once."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "min_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1. Leave it out for the default.")
        if self.min_workers is not None and self.num_workers is not None and self.min_workers > self.num_workers:
            raise ConfigError(
                f"min_workers={self.min_workers}: must not exceed num_workers={self.num_workers}. Lower it."
            )
        if self.cpus_per_worker <= 0:
            raise ConfigError(f"cpus_per_worker={self.cpus_per_worker}: must be positive. 0.5 suits a small machine.")
