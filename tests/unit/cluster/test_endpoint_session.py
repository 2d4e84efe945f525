"""A proxy that does not begin ends in one line, and leaves no Serve behind."""

import contextlib

import pytest
import ray.serve
from ray.serve import context

from nanochat.cluster import endpoint_session, session
from nanochat.cluster.endpoint_session import serve_session
from nanochat.config.cluster import ClusterConfig
from nanochat.config.replicas import ReplicasConfig
from nanochat.config.serving import ServingConfig
from nanochat.errors import ClusterError


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
