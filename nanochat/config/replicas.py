"""How many replicas of the endpoint there are, where they run, and when one is added or taken away."""

from dataclasses import dataclass

from nanochat.config.serving import ServingConfig
from nanochat.config.training import below_least
from nanochat.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ReplicasConfig:
    """Ray Serve's part of the endpoint; Serve's own defaults suit short requests, not streams."""

    min_replicas: int = 1
    """Replicas that there always are; 0 = none while nobody asks, see cold_start_s."""
    max_replicas: int = 1
    """Replicas at most."""
    target_ongoing_requests: float | None = None
    """Requests per replica that autoscaling aims at; none = three quarters of max_running."""
    look_back_s: float = 10.0
    """Autoscaling goes by the mean of so many seconds."""
    upscale_delay_s: float = 5.0
    """Too many requests for so long add replicas."""
    downscale_delay_s: float = 120.0
    """Too few requests for so long take replicas away; they end when their streams have."""
    cold_start_s: float = 60.0
    """While no replica is there a request waits so long for one, then gets 503 with Retry-After (with HAProxy)."""
    health_check_s: float = 2.0
    """Seconds between health checks; a replica whose engine has died is replaced after three."""
    replica_cpus: float = 1.0
    """Logical CPUs that a replica reserves."""
    replica_gpus: float | None = None
    """GPUs of a replica; none = one if the cluster has any."""
    replica_by_label: bool = False
    """Put replicas on nodes whose label `work` is serve."""
    haproxy: bool = True
    """Put HAProxy before the replicas where the platform has it; else Serve's own proxy, 9 ms slower."""

    def __post_init__(self) -> None:
        found = below_least(
            self, min_replicas=0, max_replicas=1, target_ongoing_requests=0.01, look_back_s=1.5, upscale_delay_s=0,
            downscale_delay_s=0, cold_start_s=1, health_check_s=0.1, replica_cpus=0, replica_gpus=0,
        )  # fmt: skip
        if self.max_replicas < self.min_replicas:
            found.append(
                f"max_replicas={self.max_replicas}: must be at least min_replicas={self.min_replicas}. Raise it."
            )
        if found:
            raise ConfigError(" ".join(found))

    def target(self, serving: ServingConfig) -> float:
        """Return the requests per replica that autoscaling aims at."""
        return self.target_ongoing_requests or max(1.0, 0.75 * serving.max_running)
