"""The endpoint for the time of a block: Ray joined or started, Serve with its proxy, the models ready; then drained."""

import contextlib
import json
import logging
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from nanochat import storage
from nanochat.cluster.ingress import free_ports, haproxy_environment, has_haproxy, private_folder, serve_environment
from nanochat.cluster.terminal import Terminal, on_interrupt
from nanochat.config.cluster import ClusterConfig
from nanochat.config.model import ModelConfig
from nanochat.config.replicas import ReplicasConfig
from nanochat.config.serving import ServingConfig
from nanochat.errors import ClusterError, ConfigError
from nanochat.storage import RunFolder

APPLICATION = "nanochat"
REACHABLE_S = 60.0


@contextlib.contextmanager
def endpoint_session(
    serving: ServingConfig, replicas: ReplicasConfig, cluster: ClusterConfig, terminal: Terminal
) -> Iterator[str]:
    """Serve models for the time of the block and yield the endpoint's address; leaving it lets streams finish.

    Raises: ConfigError if the address cannot be listened on; CheckpointError if there is no such model; ClusterError if
    no replica starts.
    """
    if not is_joined(cluster):
        serving = check_address(serving)
        if serving.dtype == "int8":
            from nanochat.inference.load import check_int8

            check_int8()
    serving = pinned(serving, terminal.line)
    terminal.line(f"models     {', '.join(serving.models)}; engine {serving.backend}, {serving.dtype}")
    longer = "; steps are compiled, which takes a while the first time" if serving.compile == "auto" else ""
    terminal.line(f"starting   replicas: processes, then weights{longer}")
    began_s = time.monotonic()
    with serve_session(serving, replicas, cluster) as address:
        from nanochat.cluster.deployments import deploy, end

        deploy(APPLICATION, "/", serving, replicas)
        if replicas.min_replicas:
            wait_until_ready(address)
        terminal.line(f"ready      after {time.monotonic() - began_s:.1f} s")
        try:
            yield address
        finally:
            end(APPLICATION)


def run_endpoint(
    serving: ServingConfig, replicas: ReplicasConfig, cluster: ClusterConfig, terminal: Terminal,
    is_check: bool = False,
) -> None:  # fmt: skip
    """Serve until Ctrl-C, which lets running answers finish; with `is_check` only until one answer has come.

    Raises: as `endpoint_session`; KeyboardInterrupt at a second Ctrl-C.
    """
    asked: list[bool] = []

    def stop() -> None:
        asked.append(True)
        terminal.line("ending when the running answers have; press Ctrl-C again to leave at once")

    from nanochat.serving.gate import api_keys
    from nanochat.training.checkpoint import STAGES, Checkpoint

    keys = api_keys(serving)
    with endpoint_session(serving, replicas, cluster, terminal) as address, on_interrupt(stop):
        terminal.line(f"page       {address}/")
        terminal.line(f"API        {address}/v1")
        name, _, folder = serving.models[0].partition("=")
        source = folder or name
        is_chat = source != "pretrain" if source in STAGES else Checkpoint(storage.absolute(source)).is_chat
        terminal.line(curl_line(address, {"id": name, "kind": "chat" if is_chat else "base"}, bool(keys)))
        if is_check:
            terminal.line(f"answer     {one_answer(address, name, keys[0].decode() if keys else None)}")
            return
        log = RunFolder(serving.run_dir).ray_log
        terminal.line(f"logs       {log}, which names the folder of Ray's; there serve/replica_*.log")
        terminal.line("Ctrl-C ends it")
        while not asked:
            time.sleep(0.2)


def one_answer(address: str, model: str, key: str | None) -> str:
    """Return what a chat model says to 'Who are you?'. Raises: ClusterError if it does not answer."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 64})
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{address}/v1/chat/completions", body.encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=REACHABLE_S) as answer:
            return json.load(answer)["choices"][0]["message"]["content"]
    except (urllib.error.URLError, OSError) as err:
        raise ClusterError(f"{address}: gives no answer ({err}). Look into Ray's log for why.") from err


@contextlib.contextmanager
def serve_session(serving: ServingConfig, replicas: ReplicasConfig, cluster: ClusterConfig) -> Iterator[str]:
    """Join or start Ray, and Serve with one proxy, for the time of the block; yield the proxy's address.

    In a joined cluster the proxy is what the cluster's own environment says; in an own one HAProxy, where there is one.
    Raises: ConfigError if the cluster serves already, at another address.
    """
    set_serve_environment()
    folder = private_folder() if replicas.haproxy and has_haproxy() and not is_joined(cluster) else None
    if folder is not None:
        os.environ.update(haproxy_environment(folder, serving, replicas))
    try:
        from nanochat.cluster.session import session, start_ray

        with session(cluster, serving.run_dir, is_alone=False):
            start_ray()
            from ray import serve

            logging.getLogger("ray.serve").handlers[:] = logging.getLogger("ray").handlers
            found = serve.context._get_global_client(raise_if_no_controller_running=False)
            if found and (found.http_config.host, found.http_config.port) != (serving.host, serving.port):
                raise ConfigError(
                    f"host={serving.host}, port={serving.port}: the cluster's Serve listens at "
                    f"{found.http_config.host}, {found.http_config.port} already. Name these, or `serve shutdown` it."
                )
            try:
                serve.start(proxy_location="HeadOnly", http_options={"host": serving.host, "port": serving.port})
            except TimeoutError as err:
                serve.shutdown()
                raise ClusterError(
                    f"host={serving.host}, port={serving.port}: Ray's proxy did not begin in time ({err}). If the "
                    "machine was busy, try again; --no-haproxy takes Ray's other proxy."
                ) from err
            try:
                yield address_of(serving)
            finally:
                if not found:  # else others may be served there
                    serve.shutdown()
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def is_joined(cluster: ClusterConfig) -> bool:
    """Tell whether a Ray cluster is to be used that others have started."""
    return cluster.address is not None or "RAY_ADDRESS" in os.environ


def set_serve_environment() -> None:
    """Set what Serve reads from the environment and the user has not set; ray.serve reads it at its import."""
    for name, value in serve_environment().items():
        os.environ.setdefault(name, value)


def pinned(serving: ServingConfig, note: Callable[[str], None]) -> ServingConfig:
    """Return a config that names each model's checkpoint, so that all replicas load the same, from anywhere.

    Raises: CheckpointError if there is none; ConfigError if vLLM is asked for and cannot compute one.
    """
    from nanochat.inference.vllm_engine import check_vllm
    from nanochat.training.checkpoint import named_checkpoint

    models = []
    for model in serving.models:
        name, _, folder = model.partition("=")
        checkpoint = named_checkpoint(serving.run_dir, folder or name, note)
        if serving.backend == "vllm":
            check_vllm(ModelConfig(**checkpoint.state["model"]))
        models.append(f"{name}={checkpoint.folder}")
    keys = serving.api_keys_file and storage.absolute(serving.api_keys_file)
    return replace(serving, run_dir=storage.absolute(serving.run_dir), models=tuple(models), api_keys_file=keys)


def check_address(serving: ServingConfig) -> ServingConfig:
    """Return a config whose port is known and free. Raises: ConfigError if it is taken."""
    if serving.port == 0:
        return replace(serving, port=free_ports(1)[0])
    try:
        family, kind, *_, place = socket.getaddrinfo(serving.host, serving.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as err:
        raise ConfigError(
            f"port={serving.port}: cannot be listened on at {serving.host} ({err.strerror}). Name another with --port."
        ) from err
    return serving


def free_or_any(port: int) -> int:
    """Return a port of loopback if it is free, else 0: any."""
    try:
        return check_address(ServingConfig(port=port)).port
    except ConfigError:
        return 0


def address_of(serving: ServingConfig) -> str:
    """Return how this machine reaches the endpoint."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(serving.host, serving.host)
    return f"http://[{host}]:{serving.port}" if ":" in host else f"http://{host}:{serving.port}"


def wait_until_ready(address: str, timeout_s: float = REACHABLE_S) -> None:
    """Return once /ready answers 200. Raises: ClusterError if it does not in time."""
    deadline_s = time.monotonic() + timeout_s
    said: object = "nothing"
    while time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(f"{address}/ready", timeout=5) as answer:
                answer.read()
                return
        except (urllib.error.URLError, OSError) as err:
            said = err
            time.sleep(0.1)
    raise ClusterError(f"{address}: is not ready after {timeout_s:g} s ({said}). Look into Ray's log for why.")


def curl_line(address: str, model: dict[str, Any], has_keys: bool) -> str:
    """Return a command that asks a model, as /v1/models describes it, something."""
    if model.get("kind") == "base":
        path, body = "completions", {"prompt": "The", "max_tokens": 32}
    else:
        path, body = "chat/completions", {"messages": [{"role": "user", "content": "Who are you?"}]}
    key = " -H 'Authorization: Bearer YOUR_KEY'" if has_keys else ""
    text = json.dumps({"model": model["id"], **body, "stream": True})
    return f"curl -N {address}/v1/{path} -H 'Content-Type: application/json'{key} -d '{text}'"
