"""What Ray Train calls of this project, in each worker and where it counts them, without a Ray."""

import platform
from types import SimpleNamespace

import pytest
import ray
from ray.train import ScalingConfig

from nanochat.cluster import trainer
from nanochat.config.pretrain import PretrainConfig
from nanochat.errors import ClusterError
from nanochat.storage import StageFolder, list_files, read_jsonl


def test_a_worker_of_other_software_does_not_train(tmp_path, monkeypatch):
    """It may be on a node that came after the nodes were looked at; another try on the same image would not help."""
    monkeypatch.setattr(trainer.ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 3))
    trained = []
    job = trainer.TrainJob(
        config=PretrainConfig(), tokenizer_folder="", folder=StageFolder(str(tmp_path)), use_gpu=False,
        worker=trained.append, workers=[4],
    )  # fmt: skip
    trainer._work(job)
    assert trained == [job]
    object.__setattr__(job, "software", job.software | {"nanochat": "0.1.0 (code 0)"})
    with pytest.raises(
        ClusterError, match=rf"^node={platform.node()}: has nanochat .*, the driver 0.1.0 \(code 0\)"
    ) as it:
        trainer._work(job)
    assert not trainer.is_retried(it.value)
    assert trained == [job]
    assert [path.rpartition("_")[2] for path in list_files(str(tmp_path))] == ["03.txt"]


@pytest.mark.parametrize(
    ("allowed", "label", "draining", "expected"),
    [
        ([1, 2, 3, 6], None, [], 6),
        ([1, 2, 4, 8], None, [], 4),
        ([8], None, [], 0),
        ([1, 2, 3, 6], None, ["b"], 3),
        ([1, 2, 3, 4, 5, 6], {"work": "train"}, [], 5),
        ([1, 2, 3, 4, 5, 6], {"work": "train"}, ["a"], 2),
    ],
)
def test_workers_are_counted_where_they_have_a_place_and_divide_a_step(monkeypatch, allowed, label, draining, expected):
    """Of 2 CPUs each. Ray reserves less of the nodes a and b than they have, and some of c, which has not the label."""
    has = {"a": ("train", 6, True), "b": ("train", 4, True), "c": ("data", 9, True), "dead": ("train", 8, False)}
    nodes = [
        {"NodeID": name, "Labels": {"work": work}, "Resources": {"CPU": float(cpus)}, "Alive": alive}
        for name, (work, cpus, alive) in has.items()
    ]
    monkeypatch.setattr(trainer.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(trainer.state, "get_draining_nodes", lambda: dict.fromkeys(draining, 0))
    config = ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 2}, label_selector=label)
    reserved = {"a": {"CPU": 4.0}, "b": {"CPU": 3.0}, "c": {"CPU": 6.0}}
    assert trainer.DividingScalingPolicy(config, allowed)._count_possible_workers(reserved) == expected


def test_a_lost_process_is_named(tmp_path):
    """In Ray's own words, which begin with a line that says nothing."""
    died = ray.exceptions.ActorDiedError(
        ray.core.generated.common_pb2.ActorDiedErrorContext(
            error_message="Worker exit type: SYSTEM_ERROR", class_name="RayTrainWorker", actor_id=b"1" * 16, pid=4567,
            node_ip_address="10.0.0.7", name="worker", ray_namespace="a",
        )
    )  # fmt: skip
    folder = StageFolder(str(tmp_path))
    errors = {1: died, 0: OSError("a disk\nthat is slow"), 2: ray.exceptions.ActorDiedError()}
    trainer.OnFailure(folder).after_exception(None, errors)
    assert [record["note"] for record in read_jsonl(folder.notes)] == [
        "worker 0 failed: OSError: a disk",
        "worker 1 failed: its process 4567 on 10.0.0.7 is gone: killed, out of memory or crashed",
        f"worker 2 failed: ActorDiedError: {str(ray.exceptions.ActorDiedError()).splitlines()[0]}",
    ]
