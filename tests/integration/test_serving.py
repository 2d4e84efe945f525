"""The endpoint on Ray Serve with a tiny real model: one replica, the proxy before it, a stream, and its end."""

import asyncio
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml
from serving_client import BACKEND, note, replica_pids, run, serving_ray, stream
from tiny_chat_run import write_tiny_chat_run

from nanochat.config.replicas import ReplicasConfig
from nanochat.errors import ClusterError, ConfigError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

CHAT = "/v1/chat/completions"
HELLO = {"model": "sft", "messages": [{"role": "user", "content": "Hello"}], "return_token_ids": True, "temperature": 0}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    """The address of one replica."""
    folder = write_tiny_chat_run(tmp_path_factory.mktemp("run"))
    with serving_ray(tmp_path_factory, run_dir=str(folder), models=("sft",), dtype="float32") as (address, serving):
        from nanochat.cluster.deployments import deploy, pinned
        from nanochat.cluster.endpoint_session import wait_until_ready

        deploy("nanochat", "/", pinned(serving, note), ReplicasConfig(replica_cpus=0.5))
        wait_until_ready(address)
        yield address, serving


def get(address: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as err:
        return err.code, err.read().decode()


def test_a_chat_answer_is_streamed_and_the_rest_is_there(endpoint):
    address, _ = endpoint
    named = {"X-Request-Id": "mine"}
    outcome = run(lambda session: stream(session, address, HELLO | {"max_tokens": 24}, headers=named, path=CHAT))
    assert outcome.is_complete, outcome
    assert 1 <= len(outcome.tokens) <= 24
    assert outcome.headers["Content-Type"].startswith("text/event-stream")
    assert outcome.headers["X-Request-Id"] == "mine"
    assert get(f"{address}/health")[0] == get(f"{address}/ready")[0] == 200
    status, models = get(f"{address}/v1/models")
    assert status == 200
    assert '"sft"' in models
    status, wrong = get(f"{address}/v1/nothing")
    assert status == 404
    assert '"error"' in wrong


def test_a_client_that_hangs_up_leaves_nothing_running(endpoint):
    address, _ = endpoint

    async def main(session):
        await stream(session, address, HELLO | {"max_tokens": 200}, path=CHAT, hang_up_after=2)
        for _ in range(40):
            _, text = await asyncio.to_thread(get, f"{address}/metrics")
            running = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
            if running and all(float(line.split()[-1]) == 0 for line in running):
                return True
            await asyncio.sleep(0.05)
        return False

    assert run(main)


@pytest.mark.skipif(sys.platform != "linux", reason="HAProxy is there on Linux")
def test_the_proxy_is_private_to_this_user_and_on_loopback(endpoint):
    program = Path(os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert stat.S_IMODE(program.parent.stat().st_mode) == 0o700
    (socket_path,) = program.parent.glob("*/admin.sock")
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    mine = [
        one for one in psutil.process_iter(["cmdline"]) if str(program.parent) in " ".join(one.info["cmdline"] or [])
    ]
    listening = {
        place.laddr.ip for one in mine for place in one.net_connections(kind="inet") if place.status == "LISTEN"
    }
    assert listening == {"127.0.0.1"}


def test_a_model_that_cannot_be_loaded_is_said_in_one_line(endpoint):
    from nanochat.cluster.deployments import deploy

    _, serving = endpoint
    broken = replace(serving, models=("sft=/nowhere",))
    with pytest.raises(ClusterError, match=r"no replica could start.*nowhere"):
        deploy("broken", "/broken", broken, ReplicasConfig(replica_cpus=0.1))
    from ray import serve

    serve.delete("broken")


def test_too_small_a_cluster_is_said_before_anything_is_deployed(endpoint):
    from nanochat.cluster.deployments import deploy

    _, serving = endpoint
    with pytest.raises(ClusterError, match="min_replicas=1: needs 100 CPU, the cluster has"):
        deploy("big", "/big", serving, ReplicasConfig(replica_cpus=100))


@pytest.mark.slow
def test_a_cut_answer_goes_on_exactly_after_its_replica_was_killed(endpoint):
    address, _ = endpoint
    body = HELLO | {"max_tokens": 120, "ignore_eos": True, "temperature": 1.0, "seed": 5}
    whole = run(lambda session: stream(session, address, body, path=CHAT))
    assert whole.is_complete
    (pid,) = replica_pids().values()

    async def cut(session):
        task = asyncio.create_task(stream(session, address, body, path=CHAT))
        await asyncio.sleep(whole.all_s / 3)
        os.kill(pid, signal.SIGKILL)
        return await task

    first = run(cut)
    assert first.error
    assert 0 < len(first.tokens) < 120
    assert first.tokens == whole.tokens[: len(first.tokens)]
    began_s = time.monotonic()
    rest = run(lambda session: stream(session, address, body | {"continue_token_ids": first.tokens}, path=CHAT))
    note(f"cut after {len(first.tokens)} tokens, went on {time.monotonic() - began_s:.1f} s later")
    assert rest.is_complete
    assert first.tokens + rest.tokens == whole.tokens
    assert first.text + rest.text == whole.text


@pytest.mark.slow
def test_the_job_serves_until_ctrl_c_and_lets_an_answer_finish(tmp_path):
    from nanochat.cluster.ingress import free_ports

    folder, (port,) = write_tiny_chat_run(tmp_path / "run", sequence_len=1024), free_ports(1)
    command = [
        sys.executable,
        str(Path(__file__).parents[2] / "ray_jobs/serve.py"),
        "--run-dir",
        str(folder),
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--backend",
        BACKEND,
    ]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        lines = []
        while not lines or not lines[-1].startswith("curl"):
            line = job.stderr.readline()
            assert line, lines
            lines.append(line)
        address = f"http://127.0.0.1:{port}"
        assert f"page       {address}/\n" in lines

        async def main(session):
            body = HELLO | {"max_tokens": 800, "ignore_eos": True}
            task = asyncio.create_task(stream(session, address, body, path=CHAT))
            await asyncio.sleep(0.5)
            assert not task.done()
            os.killpg(job.pid, signal.SIGINT)  # as a terminal does: to every process of the job
            await asyncio.sleep(0.5)
            ready, _ = await asyncio.to_thread(get, f"{address}/ready")
            return ready, await task

        ready, outcome = run(main)
        assert job.wait(60) == 0
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert ready == 503, "it says that it ends, or is not routed to any more"
    assert outcome.is_complete
    assert len(outcome.tokens) == 800


def serve_job(tmp_path, host: str, *flags: str) -> tuple[subprocess.Popen, int]:
    """ray_jobs/serve.py with a tiny model, once it is ready, and its port."""
    from nanochat.cluster.ingress import free_ports

    folder, (port,) = write_tiny_chat_run(tmp_path / "run"), free_ports(1)
    command = [sys.executable, str(Path(__file__).parents[2] / "ray_jobs/serve.py"), "--run-dir", str(folder),
               "--host", host, "--port", str(port), "--replica-cpus", "0.5", "--backend", BACKEND,
               "--compile", "off", *flags]  # fmt: skip
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    lines = [""]
    while not lines[-1].startswith("curl"):
        lines.append(job.stderr.readline())
        assert lines[-1], lines
    return job, port


def own_address() -> str | None:
    """An address of this machine that is not loopback."""
    found = [one.address for each in psutil.net_if_addrs().values() for one in each if one.family == socket.AF_INET]
    return next((address for address in found if not address.startswith("127.")), None)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or own_address() is None, reason="needs HAProxy and a network")
@pytest.mark.parametrize("is_named", [True, False])
def test_others_reach_it_with_a_key_where_it_is_told_to_listen(tmp_path, is_named):
    """By an address of its own, where also the first replica is woken, and on all interfaces."""
    address = own_address()
    (tmp_path / "keys").write_text("sesame\n")
    flags = ("--api-keys-file", str(tmp_path / "keys"), *(("--min-replicas", "0") if is_named else ()))
    job, port = serve_job(tmp_path, address if is_named else "0.0.0.0", *flags)
    try:
        url = f"http://{address}:{port}"
        keyless = run(lambda session: stream(session, url, HELLO, path=CHAT))
        assert keyless.status == 401
        key = {"Authorization": "Bearer sesame"}
        outcome = run(lambda session: stream(session, url, HELLO | {"max_tokens": 4}, path=CHAT, headers=key))
        assert outcome.is_complete, outcome
        os.kill(job.pid, signal.SIGINT)
        assert job.wait(60) == 0
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_cluster_leaves_no_proxy_on_the_port(tmp_path):
    job, port = serve_job(tmp_path, "127.0.0.1")
    try:
        os.killpg(job.pid, signal.SIGTERM)  # as `timeout` does: Ray's own processes end, and nobody ends the proxy
        deadline_s = time.monotonic() + 30
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)):
                    break
            assert time.monotonic() < deadline_s, "something still listens"
            time.sleep(0.2)
    finally:
        os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_config_file_is_served(tmp_path):
    from nanochat.cluster.endpoint_session import wait_until_ready
    from nanochat.cluster.ingress import free_ports

    root, (port,) = Path(__file__).parents[2], free_ports(1)
    config = yaml.safe_load((root / "serve_config.yaml").read_text())
    config["http_options"]["port"] = port
    run_dir = str(write_tiny_chat_run(tmp_path / "run"))
    config["applications"][0]["args"] |= {"run_dir": run_dir, "replica_cpus": 0.5, "backend": BACKEND}
    file = tmp_path / "serve_config.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_SERVE", "RAY_ADDRESS"))}
    environment.pop("RAY_AUTH_MODE", None)
    environment |= {"PYTHONPATH": str(root)}
    command = [str(Path(sys.executable).with_name("serve")), "run", str(file)]
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_ready(address, 200)  # its steps are compiled, for the first time perhaps
        outcome = run(lambda session: stream(session, address, HELLO | {"max_tokens": 8}, path=CHAT))
        assert outcome.is_complete, outcome
        dashboard = re.search(r"dashboard at \S*?(http://[\d.:]+)", (tmp_path / "log").read_text())
        with pytest.raises(
            urllib.error.HTTPError, match="401"
        ):  # a Ray of its own: nobody submits jobs without a token
            urllib.request.urlopen(f"{dashboard[1]}/api/jobs/", timeout=10)
        os.kill(job.pid, signal.SIGINT)
        assert job.wait(60) == 0
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


def test_a_config_file_needs_keys_where_its_proxy_can_be_reached_by_others(endpoint, monkeypatch):
    from ray import serve

    from nanochat.cluster.deployments import build_app

    _, serving = endpoint
    args = {"run_dir": serving.run_dir}
    assert build_app(args)  # this Serve listens on loopback
    with pytest.raises(ConfigError, match="host: is no setting of the endpoint"):
        build_app(args | {"host": "127.0.0.1"})
    monkeypatch.setattr(serve.context._get_global_client().http_config, "host", "0.0.0.0")
    with pytest.raises(ConfigError, match=r"host=0\.0\.0\.0: others could reach the endpoint without a key"):
        build_app(args)
