"""Who learns and who samples on what a cluster has."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from nanochat.cluster import nodes, rl_job, trainer
from nanochat.config.cluster import ClusterConfig
from nanochat.config.rl import RolloutsConfig
from nanochat.errors import ClusterError


@pytest.fixture
def cluster_of(monkeypatch):
    """Lets Ray say that it has nodes of these resources, by label, and may grow to these groups (resources, count)."""
    monkeypatch.setattr(rl_job, "physical_cores", lambda: 8)

    def have(groups=None, **by_label):
        found = [{"Alive": True, "Labels": {"work": work}, "Resources": each} for work, each in by_label.items()]
        monkeypatch.setattr(
            nodes.ray, "nodes", lambda: [{"Alive": False, "Labels": {}, "Resources": {"GPU": 99}}, *found]
        )
        told = [
            SimpleNamespace(name=name, resources=each, max_count=count)
            for name, (each, count) in (groups or {}).items()
        ]
        monkeypatch.setattr(nodes.state, "get_cluster_config", lambda: SimpleNamespace(node_group_configs=told))

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
    cluster_of(any=resources)
    assert rl_job.share_machines(ClusterConfig(**cluster), RolloutsConfig(**rollouts), print) == expected


@pytest.mark.parametrize(
    ("resources", "rollouts", "message"),
    [
        ({"CPU": 2}, {"actors": 3}, "actors=3: with 1 learning: needs 2.5 CPU, the cluster has 2. Ask for fewer"),
        ({"CPU": 99, "GPU": 2}, {"actors": 2}, "actors=2: with 1 learning: needs 3 GPU, the cluster has 2."),
        ({"CPU": 99, "GPU": 1}, {"actors": 2}, "actors=2: with 1 learning: needs 1.5 GPU, the cluster has 1."),
    ],
)
def test_more_than_there_is_is_refused_or_waited_for(cluster_of, resources, rollouts, message):
    cluster_of(any=resources)
    with pytest.raises(ClusterError, match=message):
        rl_job.share_machines(ClusterConfig(), RolloutsConfig(**rollouts), print)
    noted: list[str] = []
    cluster_of(any=resources, groups={"worker": ({"CPU": 100, "GPU": 8}, 2)})
    rl_job.share_machines(ClusterConfig(), RolloutsConfig(**rollouts), noted.append)
    assert noted[-1].endswith("can be added. Waiting for nodes.")


def test_what_the_cluster_can_never_have_is_refused(cluster_of):
    cluster_of(groups={"worker": ({"CPU": 20, "GPU": 2}, 2)}, any={"CPU": 20, "GPU": 2})
    asked = "num_workers=8: needs 8 GPU, the cluster has 2, at most 2 can be added. Ask for fewer --num-workers"
    with pytest.raises(ClusterError, match=asked):
        trainer.workers_of(ClusterConfig(num_workers=8), print)
    assert trainer.workers_of(ClusterConfig(num_workers=4), print) == (4, True)


def test_what_fits_on_no_single_node_is_refused_at_once(cluster_of):
    """Two nodes have 8 GPUs together, none has 6."""
    two = {"a": {"CPU": 16, "GPU": 4}, "b": {"CPU": 64, "GPU": 4}}
    cluster_of(**two)
    asked = r"actors=1: with 2 learning: each needs 0.5 CPU and 6 GPU on one node, and no node has so much. Ask for"
    with pytest.raises(ClusterError, match=asked):
        rl_job.share_machines(ClusterConfig(), RolloutsConfig(actors=1, gpus_per_actor=6.0), print)
    with pytest.raises(ClusterError, match=r"num_workers=1: each needs 1 GPU and 65 CPU on one node"):
        trainer.workers_of(ClusterConfig(num_workers=1, cpus_per_worker=65.0), print)
    assert trainer.workers_of(ClusterConfig(num_workers=8, cpus_per_worker=8.0), print) == (8, True)
    cluster_of(groups={"small": ({"CPU": 64, "GPU": 8}, 9)}, **two)
    with pytest.raises(ClusterError, match=r"65 CPU on one node"):
        trainer.workers_of(ClusterConfig(num_workers=1, cpus_per_worker=65.0), print)
    cluster_of(groups={"large": ({"CPU": 65, "GPU": 8}, 1)}, **two)
    assert trainer.workers_of(ClusterConfig(num_workers=1, cpus_per_worker=65.0), print) == (1, True)


def test_what_can_be_added_is_counted_for_the_label(cluster_of):
    """cluster.yaml's groups: 64 GPUs for training, whatever the others have; groups of other names count all."""
    eight = {"CPU": 192, "GPU": 8}
    cluster_of(groups={"train": (eight, 8), "rollouts": (eight, 4), "serve": (eight, -1)}, head={"CPU": 0})
    by_label = ClusterConfig(by_label=True, use_gpu=True, num_workers=65)
    with pytest.raises(ClusterError, match=r"num_workers=65: needs 65 GPU, the cluster has 0 on .*, at most 64 can be"):
        trainer.workers_of(by_label, print)
    noted: list[str] = []
    assert trainer.workers_of(replace(by_label, num_workers=64), noted.append) == (64, True)
    assert len(noted) == 2
    assert trainer.workers_of(replace(by_label, by_label=False), print) == (65, True)
    cluster_of(groups={"a": (eight, 8), "b": (eight, 4)}, head={"CPU": 0})
    assert trainer.workers_of(by_label, print) == (65, True)


def test_each_kind_of_work_counts_the_nodes_of_its_label(cluster_of):
    cluster_of(
        data={"CPU": 64}, train={"CPU": 192, "GPU": 8}, rollouts={"CPU": 192, "GPU": 6}, serve={"CPU": 48, "GPU": 4}
    )
    by_label = ClusterConfig(by_label=True)
    assert trainer.workers_of(by_label, print) == (8, True)
    assert rl_job.share_machines(by_label, RolloutsConfig(), print) == (8, 6, 0.0, True)
    assert rl_job.share_machines(ClusterConfig(), RolloutsConfig(), print) == (4, 14, 0.0, True)
    with pytest.raises(
        ClusterError, match=r"actors=7: needs 7 GPU, the cluster has 6 on nodes with the label work=rollouts\."
    ):
        rl_job.share_machines(by_label, RolloutsConfig(actors=7), print)
    assert nodes.on_nodes_for("data", by_label) == {"label_selector": {"work": "data"}}
    assert nodes.on_nodes_for("data", ClusterConfig()) == {}
