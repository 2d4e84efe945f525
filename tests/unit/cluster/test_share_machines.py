"""Who learns and who samples on what a cluster has."""

import pytest

from nanochat.cluster import rl_job, trainer
from nanochat.config.cluster import ClusterConfig
from nanochat.config.rl import RolloutsConfig
from nanochat.errors import ClusterError


@pytest.fixture
def cluster_of(monkeypatch):
    """Lets Ray say that it has so much."""
    monkeypatch.setattr(rl_job, "physical_cores", lambda: 8)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def have(**resources):
        for module in (rl_job, trainer):
            monkeypatch.setattr(module.ray, "cluster_resources", lambda: resources)

    return have


@pytest.mark.parametrize(
    ("resources", "cluster", "rollouts", "expected"),
    [
        ({"CPU": 96, "GPU": 8}, {}, {}, (2, 6, 0.0, True)),
        ({"CPU": 96, "GPU": 8}, {"num_workers": 4}, {}, (4, 4, 0.0, True)),
        ({"CPU": 96, "GPU": 8}, {}, {"gpus_per_actor": 2.0}, (2, 3, 0.0, True)),
        ({"CPU": 96, "GPU": 2}, {}, {}, (1, 1, 0.0, True)),
        ({"CPU": 8, "GPU": 1}, {}, {}, (1, 1, 0.5, True)),
        ({"CPU": 8, "GPU": 1}, {}, {"actors": 2, "gpus_per_actor": 0.25}, (1, 2, 0.5, True)),
        ({"CPU": 16, "GPU": 2}, {"use_gpu": False}, {}, (1, 4, 0.0, False)),
        ({"CPU": 16}, {}, {}, (1, 4, 0.0, False)),
        ({"CPU": 16}, {"num_workers": 5}, {}, (5, 3, 0.0, False)),
        ({"CPU": 16}, {"num_workers": 8}, {}, (8, 1, 0.0, False)),
        ({"CPU": 16}, {}, {"actors": 3}, (1, 3, 0.0, False)),
    ],
)
def test_learners_and_actors_share_what_there_is(cluster_of, resources, cluster, rollouts, expected):
    cluster_of(**resources)
    assert rl_job.share_machines(ClusterConfig(**cluster), RolloutsConfig(**rollouts), print) == expected


@pytest.mark.parametrize(
    ("resources", "rollouts", "message"),
    [
        ({"CPU": 2}, {"actors": 3}, "actors=3: with 1 learning needs 2.5 CPU, the cluster has 2. Ask for fewer"),
        ({"CPU": 99, "GPU": 2}, {"actors": 2}, "actors=2: with 1 learning needs 3 GPU, the cluster has 2."),
        ({"CPU": 99, "GPU": 1}, {"actors": 2}, "actors=2: with 1 learning needs 1.5 GPU, the cluster has 1."),
    ],
)
def test_more_than_there_is_is_refused_or_waited_for(cluster_of, resources, rollouts, message):
    cluster_of(**resources)
    with pytest.raises(ClusterError, match=message):
        rl_job.share_machines(ClusterConfig(), RolloutsConfig(**rollouts), print)
    noted: list[str] = []
    rl_job.share_machines(ClusterConfig(address="auto"), RolloutsConfig(**rollouts), noted.append)
    assert noted[-1].endswith("Waiting for nodes.")
