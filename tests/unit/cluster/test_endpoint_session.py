"""A proxy that does not begin ends in one line, and leaves no Serve behind."""

import contextlib
from types import SimpleNamespace

import pytest
import ray.serve
from ray.serve import context

from nanochat import storage
from nanochat.cluster import endpoint_session, session
from nanochat.cluster.endpoint_session import serve_session
from nanochat.config.cluster import ClusterConfig
from nanochat.config.replicas import ReplicasConfig
from nanochat.config.serving import ServingConfig
from nanochat.errors import ClusterError, ConfigError
from nanochat.inference import load


def test_int8_is_refused_at_once_where_this_machine_serves_and_cannot(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "multiplies_int8", lambda device: False)
    serving = ServingConfig(run_dir=str(tmp_path), port=0, dtype="int8")
    with pytest.raises(ConfigError, match=r"^dtype=int8: is for CPUs with AVX512-VNNI"):
        with endpoint_session.endpoint_session(serving, ReplicasConfig(), ClusterConfig(), None):
            pytest.fail("it is served")


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("pretrain", "completions"),
        ("rl", "chat/completions"),
        ("mine=FOLDER", "completions"),
        ("mine=sft", "chat/comp"),
    ],
)
def test_the_command_that_is_shown_asks_a_model_what_it_can_answer(model, path, monkeypatch, tmp_path):
    said: list[str] = []
    terminal = SimpleNamespace(line=said.append)
    folder = tmp_path / "step_000001"
    storage.write_json(str(folder / "state.json"), {"format_version": 1, "stage": {}})  # a base model's
    monkeypatch.setattr(endpoint_session, "endpoint_session", lambda *_: contextlib.nullcontext("http://here"))
    monkeypatch.setattr(endpoint_session, "one_answer", lambda *_: "Me.")
    serving = ServingConfig(run_dir=str(tmp_path), models=(model.replace("FOLDER", str(folder)),))
    endpoint_session.run_endpoint(serving, ReplicasConfig(), ClusterConfig(), terminal, is_check=True)
    (line,) = [line for line in said if line.startswith("curl")]
    assert f" http://here/v1/{path}" in line


def test_a_proxy_that_does_not_begin_is_said_in_one_line(monkeypatch, tmp_path):
    def too_late(**options):
        calls.append("start")
        raise TimeoutError("HTTP proxies not available after 60s.")

    calls: list[str] = []
    monkeypatch.setattr(endpoint_session, "set_serve_environment", lambda: None)
    monkeypatch.setattr(session, "session", lambda *arguments, **options: contextlib.nullcontext())
    monkeypatch.setattr(session, "start_ray", lambda: None)
    monkeypatch.setattr(context, "_get_global_client", lambda **options: None)
    monkeypatch.setattr(ray.serve, "start", too_late)
    monkeypatch.setattr(ray.serve, "shutdown", lambda: calls.append("shutdown"))
    serving, replicas = ServingConfig(run_dir=str(tmp_path), port=8123), ReplicasConfig(haproxy=False)
    with pytest.raises(
        ClusterError, match=r"^host=127\.0\.0\.1, port=8123: .* not available after 60s\.\)\. If the mach"
    ):
        with serve_session(serving, replicas, ClusterConfig()):
            pytest.fail("it is served")
    assert calls == ["start", "shutdown"]
