"""HAProxy's configuration: what of Serve's is changed, that a change of Serve's is noticed, and whole error answers."""

import json
import os
import stat
import tempfile

import pytest

from nanochat.cluster.ingress import (
    ERRORS,
    error_file,
    free_ports,
    haproxy_environment,
    has_haproxy,
    private_folder,
    tightened,
)
from nanochat.config.replicas import ReplicasConfig
from nanochat.config.serving import ServingConfig

BY_SERVE = """global
    stats socket /folder/admin.sock mode 666 level admin expose-fd listeners
defaults
    errorfile 502 /folder/500.http
    errorfile 503 /folder/500.http
    balance leastconn
frontend prometheus
    bind :9101
frontend http_frontend
    bind 0.0.0.0:8000
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path"
backend http-nanochat
    log global
    server A 127.0.0.1:30000 check
    server B 127.0.0.1:30001 check
    server PROXY 127.0.0.1:8500 check backup
backend http-empty
    server PROXY 127.0.0.1:8500 check backup
listen stats
  bind *:8404
"""


def test_what_is_open_by_default_is_closed_and_what_is_asked_for_stays():
    config = tightened(BY_SERVE, 20, "/folder")
    assert "mode 666" not in config
    assert "bind 127.0.0.1:9101" in config
    assert "bind 127.0.0.1:8404" in config
    assert "bind 0.0.0.0:8000" in config
    assert "errorfile 503 /folder/503.http" in config
    assert "text/plain lf-string" not in config


def test_all_interfaces_stay_all_interfaces_and_one_address_is_that_of_serves_own_proxy_too():
    config = tightened(BY_SERVE.replace("bind 0.0.0.0:8000", "bind *:8000"), 20, "/folder")
    assert "bind *:8000" in config
    assert "bind *:8404" not in config
    assert "server PROXY 127.0.0.1:8500 check backup" in config
    config = tightened(BY_SERVE.replace("bind 0.0.0.0:8000", "bind 10.0.0.7:8000"), 20, "/folder")
    assert config.count("server PROXY 10.0.0.7:8500 check backup") == 2
    assert "server A 127.0.0.1:30000 check" in config


def test_what_is_served_nowhere_is_404_beside_others_and_503_while_nothing_is():
    assert "return status 404 content-type application/json" in tightened(BY_SERVE, 20, "/folder")
    config = tightened(BY_SERVE.replace("backend http-", "backend grpc-"), 20, "/folder")
    assert "return status 404" not in config
    assert "return status 503 content-type application/json" in config


def test_requests_wait_for_a_first_replica_only_where_there_is_none():
    config = tightened(BY_SERVE, 20, "/folder")
    assert "set-timeout server 20000ms if !{ srv_is_up(http-nanochat/A) } !{ srv_is_up(http-nanochat/B) }\n" in config
    assert "set-timeout server 20000ms\n" in config


def test_a_replica_keeps_its_place_in_the_hash_whatever_others_come_and_go():
    def ids(config: str) -> dict[str, str]:
        lines = [line.split() for line in tightened(config, 20, "/folder").splitlines() if " id " in line]
        return {words[1]: words[-1] for words in lines}

    both, one = ids(BY_SERVE), ids(BY_SERVE.replace("    server A 127.0.0.1:30000 check\n", ""))
    assert set(both) == {"A", "B"}
    assert one == {"B": both["B"]}


def test_a_configuration_is_tightened_once_and_a_changed_serve_is_noticed():
    config = tightened(BY_SERVE, 20, "/folder")
    assert tightened(config, 20, "/folder") == config
    with pytest.raises(ValueError, match="balance"):
        tightened(BY_SERVE.replace("balance", "spread"), 20, "/folder")


@pytest.mark.parametrize("status", [502, 503, 504])
def test_an_error_file_is_a_whole_answer_in_openais_shape(status):
    head, body = error_file(status).split("\r\n\r\n")
    assert f"Content-Length: {len(body)}" in head
    assert json.loads(body)["error"]["message"] == ERRORS[status]
    assert ("Retry-After" in head) == (status != 502)


@pytest.mark.skipif(not has_haproxy(), reason="needs HAProxy")
def test_each_run_has_a_folder_and_ports_of_its_own(monkeypatch, tmp_path):
    (long := tmp_path / ("long" * 20)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))  # too long for sockets
    folder = private_folder()
    try:
        environment = haproxy_environment(folder, ServingConfig(), ReplicasConfig())
        assert not folder.startswith(str(long))
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        assert all(
            value.startswith(folder) for name, value in environment.items() if "SOCKET" in name or "FILE" in name
        )
        assert int(environment["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > ServingConfig().request_s
    finally:
        os.remove(os.path.join(folder, "haproxy"))
        os.rmdir(folder)
    assert len(set(free_ports(4))) == 4
