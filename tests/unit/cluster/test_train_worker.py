"""What Ray Train calls in each worker, without a Ray."""

import platform
from types import SimpleNamespace

import pytest

from nanochat.cluster import trainer
from nanochat.config.pretrain import PretrainConfig
from nanochat.errors import ClusterError
from nanochat.storage import StageFolder, list_files


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
