"""Who asks for vLLM where it is not, or with a model that it cannot compute, is told so before anything begins."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny_chat_run import write_tiny_chat_run

from nanochat.cluster.endpoint_session import pinned
from nanochat.cluster.rl_job import practise
from nanochat.cluster.terminal import Terminal
from nanochat.config.cluster import ClusterConfig
from nanochat.config.model import ModelConfig
from nanochat.config.rl import RLConfig, RolloutsConfig
from nanochat.config.serving import ServingConfig
from nanochat.errors import ConfigError
from nanochat.inference import vllm_engine

MODEL = ModelConfig(n_layer=2, n_head=2, n_kv_head=2, n_embd=64)
ABSENT = r"^backend=vllm: needs vLLM 0\.32\.\*, here is none\. On a CPU: make vllm, .* Or take backend=native\.$"


@pytest.fixture
def release(monkeypatch):
    """Sets which release of vLLM there is."""
    return lambda found: monkeypatch.setattr(vllm_engine, "_release_of", lambda package: found)


def rollouts_for(model: ModelConfig, run_dir: str) -> None:
    practice = SimpleNamespace(
        config=RLConfig(), base=None, plan=SimpleNamespace(model=model), inherited={}, task=[], held_out=[]
    )
    practise(run_dir, practice, RolloutsConfig(backend="vllm"), ClusterConfig(), Terminal())


def test_an_endpoint_is_refused_before_ray_begins(tmp_path, release):
    run_dir = str(write_tiny_chat_run(tmp_path))
    release(None)
    assert pinned(ServingConfig(run_dir=run_dir), pytest.fail).backend == "native"
    with pytest.raises(ConfigError, match=ABSENT):
        pinned(ServingConfig(run_dir=run_dir, backend="vllm"), pytest.fail)
    release("0.32.0")
    assert pinned(ServingConfig(run_dir=run_dir, backend="vllm"), pytest.fail).backend == "vllm"


def test_practice_is_refused_before_a_run_is_written(tmp_path, release):
    release(None)
    with pytest.raises(ConfigError, match=ABSENT):
        rollouts_for(MODEL, str(tmp_path))
    release("0.33.1")
    with pytest.raises(ConfigError, match=r"needs vLLM 0\.32\.\*, here is 0\.33\.1"):
        rollouts_for(MODEL, str(tmp_path))
    release("0.32.0")
    with pytest.raises(ConfigError, match="smear=True: neither transformers nor vLLM"):
        rollouts_for(replace(MODEL, smear=True), str(tmp_path))
    with pytest.raises(ConfigError, match="no attention for heads of 24 channels"):
        rollouts_for(replace(MODEL, n_embd=48), str(tmp_path))
    assert list(tmp_path.iterdir()) == []
