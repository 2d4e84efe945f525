"""Runs of pretraining in this process, from text that is prepared once."""

import pytest
from tiny_pretraining import Prepared, Run, prepare

from nanochat.storage import StageFolder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Prepared:
    """A tokenizer and token shards of a few sentences."""
    return prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def on_one_core(monkeypatch):
    """Training in this process runs on one core and on no GPU, so that its numbers are the same everywhere."""
    monkeypatch.setattr("nanochat.training.loop.gc.collect", lambda: 0)  # 0.2 s in the heap of a test session
    monkeypatch.setattr("nanochat.training.hardware.psutil.cpu_count", lambda logical: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)


@pytest.fixture
def new_run(prepared, tmp_path, on_one_core):
    """Makes runs in folders of their own, local or behind a URI."""
    return lambda name="run": Run(prepared, StageFolder(name if "://" in name else str(tmp_path / name)))
