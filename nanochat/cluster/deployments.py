"""The endpoint on Ray Serve: replicas that each hold the models, an engine and the whole FastAPI app, one hop away.

Serve counts requests, replaces replicas and lets them end in peace; everything that a client sees is the app's own.
So Serve's limits stand above the app's, and no request is refused by Serve while a replica lives.
"""

import asyncio
import contextlib
import importlib
import json
import logging
import operator
import os
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import psutil
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError

from nanochat.cluster.endpoint_session import pinned
from nanochat.cluster.environment import compile_cache
from nanochat.cluster.ingress import RETRY_AFTER_S
from nanochat.cluster.nodes import check_resources, on_nodes_for, resources
from nanochat.config.cluster import ClusterConfig
from nanochat.config.replicas import ReplicasConfig
from nanochat.config.serving import ServingConfig
from nanochat.errors import ClusterError, ConfigError, excerpt

ENGINES = "nanochat.serving.backend:EngineBackend.open"
"""MODULE:ATTRIBUTE of a function from a ServingConfig to a backend."""
SPARE_REQUESTS = 64
"""Requests beside those for tokens that a replica takes at once: the page, health, metrics, refusals."""
HEALTH_TIMEOUT_S = 10.0
METRICS_INTERVAL_S = 1.0
SHUTDOWN_SPARE_S = 15.0
log = logging.getLogger("nanochat.serving")


class _OneRequestId:
    """Takes the app's X-Request-Id out of its answers: Serve adds the same, and two would be read as one, joined."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_without(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
            await send(message)

        await self.app(scope, receive, send_without)


@serve.ingress()
class Endpoint:
    """A replica. It counts as started once its models have answered, and as healthy while its engine runs."""

    async def __init__(self, serving: ServingConfig, factory: str) -> None:
        begun_s = time.time()
        for handler in logging.getLogger("ray.serve").handlers:  # the replica's own file
            log.addHandler(handler)
        log.setLevel(logging.INFO)
        module, _, attribute = factory.partition(":")
        create = operator.attrgetter(attribute)(importlib.import_module(module))
        from nanochat.serving.app import create_app

        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", compile_cache())  # this user's alone, and kept
        imported_s = time.time()
        self.backend = await asyncio.to_thread(create, serving)
        self.asgi = create_app(self.backend, serving)
        self.asgi.add_middleware(_OneRequestId)
        cold_start = {
            "process": begun_s - psutil.Process().create_time(), "imports": imported_s - begun_s,
            "weights_and_warm_up": time.time() - imported_s,
        }  # fmt: skip
        told = {name: round(value, 2) for name, value in cold_start.items()}
        log.info(json.dumps({"backend": serving.backend, "dtype": serving.dtype, "cold_start_s": told}))

    def __serve_build_asgi_app__(self) -> Any:
        return self.asgi

    async def check_health(self) -> None:
        """Tell Serve whether this replica is to be replaced. Raises: ClusterError if its engine has died."""
        if not self.backend.is_healthy:
            raise ClusterError("replica: its engine has died. It is being replaced.")

    async def drain(self) -> None:
        """Answer /ready with 503 from now on; everything else goes on."""
        self.asgi.state.draining = True

    async def __del__(self) -> None:
        if hasattr(self, "backend") and hasattr(self.backend, "close"):
            await asyncio.to_thread(self.backend.close)


def build_app(args: dict[str, Any]) -> serve.Application:
    """Return the application of a Serve config file; args are fields of ServingConfig and ReplicasConfig.

    Where the endpoint listens is said in the file's http_options alone. Raises: ConfigError if a field is none or
    breaks its rule, or others could come without a key; CheckpointError if there is no such model.
    """
    known = {one.name for config in (ServingConfig, ReplicasConfig) for one in fields(config)} - {"host", "port"}
    if unknown := set(args) - known:
        raise ConfigError(f"{min(unknown)}: is no setting of the endpoint. These are: {', '.join(sorted(known))}")
    from nanochat.serving.gate import api_keys

    # ServingConfig's host is where Serve's proxies listen: what others can reach is not left to a second setting.
    host = serve.context._get_global_client().http_config.host
    serving = _from_args(ServingConfig, {**args, "host": host, "port": 0})
    replicas = _from_args(ReplicasConfig, args)
    api_keys(serving)
    return application(pinned(serving, log.warning), replicas, ENGINES)


def _from_args(config: type[Any], args: Mapping[str, Any]) -> Any:
    given = {one.name: args[one.name] for one in fields(config) if one.name in args}
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def application(serving: ServingConfig, replicas: ReplicasConfig, factory: str = ENGINES) -> serve.Application:
    """Return the endpoint as a Serve application; `factory` is what its replicas call, MODULE:ATTRIBUTE.

    Raises: ClusterError if the cluster is too small for its least number of replicas.
    """
    placed, gpus = ClusterConfig(by_label=replicas.replica_by_label), replicas.replica_gpus
    if gpus is None:
        gpus = 1.0 if resources("serve", placed).get("GPU", 0) else 0.0
    least = max(1, replicas.min_replicas)
    needed = [{"CPU": replicas.replica_cpus, "GPU": gpus}] * least
    remedy = "Ask for fewer --min-replicas, or lower --replica-cpus and --replica-gpus."
    check_resources(f"min_replicas={least}", needed, "serve", placed, remedy, log.warning)
    number: dict[str, Any] = {"num_replicas": replicas.max_replicas}
    if replicas.min_replicas < replicas.max_replicas:
        number = {"autoscaling_config": _autoscaling(serving, replicas)}
    deployment = serve.deployment(
        Endpoint,
        name="endpoint",
        # The app refuses earlier, in OpenAI's words.
        max_ongoing_requests=len(serving.models) * (serving.max_running + serving.max_waiting) + SPARE_REQUESTS,
        # From zero replicas as many wait for the first one as it will take.
        max_queued_requests=serving.max_running + serving.max_waiting,
        backpressure_config={"status_code": 503, "retry_after_s": RETRY_AFTER_S},
        # No stream is cut: the app ends each after request_s.
        graceful_shutdown_timeout_s=serving.request_s + SHUTDOWN_SPARE_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=replicas.health_check_s,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        max_constructor_retry_count=3,
        ray_actor_options={"num_cpus": replicas.replica_cpus, "num_gpus": gpus, **on_nodes_for("serve", placed)},
        logging_config={"enable_access_log": False},  # the app writes its own, with more in it
        **number,
    )
    return deployment.bind(serving, factory)


def _autoscaling(serving: ServingConfig, replicas: ReplicasConfig) -> dict[str, Any]:
    return {
        "min_replicas": replicas.min_replicas,
        "max_replicas": replicas.max_replicas,
        "target_ongoing_requests": replicas.target(serving),
        "look_back_period_s": replicas.look_back_s,
        # How often replicas tell their load; Serve's 10 s would come on top of every reaction. Deprecated for two
        # environment variables, which 2.60 reads and then does not use.
        "metrics_interval_s": METRICS_INTERVAL_S,
        "upscale_delay_s": replicas.upscale_delay_s,
        "downscale_delay_s": replicas.downscale_delay_s,
    }


def deploy(name: str, prefix: str, serving: ServingConfig, replicas: ReplicasConfig, factory: str = ENGINES) -> None:
    """Deploy or update an application and wait until it is ready; a new version takes over without a gap.

    Raises: ClusterError if no replica could start, or the cluster is too small.
    """
    try:
        serve.run(application(serving, replicas, factory), name=name, route_prefix=prefix)
    except RuntimeError as err:
        found = serve.status().applications.get(name)
        stories = [one.message for one in found.deployments.values()] if found else []
        story = next((one for one in stories if one), str(err)).rstrip()
        raise ClusterError(f"models={','.join(serving.models)}: no replica could start. {_last_error(story)}") from err


def _last_error(story: str) -> str:
    """Return the line of a traceback that says what it was."""
    lines = [line.strip() for line in story.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line and not line.startswith("ray.exceptions")]
    return excerpt((errors or lines or ["?"])[-1])


def end(name: str) -> None:
    """Take an application away: /ready says 503, then its replicas end when their streams have."""
    if name not in serve.status().applications:
        return
    with contextlib.suppress(DeploymentUnavailableError):  # it has no replica now
        serve.get_app_handle(name).broadcast("drain").results(timeout_s=5, return_exceptions=True)
    serve.delete(name, _blocking=False)
    while name in serve.status().applications:
        time.sleep(0.2)
