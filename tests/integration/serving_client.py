"""A client that sees how a stream ends, and a Serve session for tests."""

import asyncio
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
from multidict import CIMultiDict

from nanochat.config.replicas import ReplicasConfig
from nanochat.config.serving import ServingConfig

BACKEND: Any = os.environ.get("NANOCHAT_BACKEND", "native")
"""Who computes in tests with a real model."""


@dataclasses.dataclass
class Outcome:
    """What became of a request for a stream."""

    status: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    is_done: bool = False
    """Whether [DONE] came."""
    error: str | None = None
    """An error event's, an answer's that is none, or the broken connection's."""
    first_s: float = 0.0
    all_s: float = 0.0
    body: Any = None
    headers: CIMultiDict[str] = dataclasses.field(default_factory=CIMultiDict)

    @property
    def is_complete(self) -> bool:
        return self.finish_reason is not None and self.is_done and self.error is None

    @property
    def ended_falsely(self) -> bool:
        """A clean end that looks like success, without one."""
        return self.error is None and not self.is_complete


async def stream(
    session: aiohttp.ClientSession, address: str, body: dict[str, Any], headers: dict[str, str] | None = None,
    hang_up_after: int | None = None, path: str = "/v1/completions",
) -> Outcome:  # fmt: skip
    outcome, began_s = Outcome(), time.monotonic()
    try:
        async with session.post(address + path, json={"stream": True, **body}, headers=headers) as answer:
            outcome.status = answer.status
            outcome.headers = CIMultiDict((key, ", ".join(answer.headers.getall(key))) for key in answer.headers)
            if answer.status != 200:
                outcome.body = await answer.text()
                outcome.error = f"{answer.status} {outcome.body}"
                return outcome
            async for line in answer.content:
                if line.strip() == b"data: [DONE]":
                    outcome.is_done = True
                elif line.startswith(b"data: "):
                    take(outcome, json.loads(line[6:]), began_s)
                if hang_up_after is not None and len(outcome.tokens) >= hang_up_after:
                    break
    except aiohttp.ClientError as err:
        outcome.error = repr(err)
    finally:
        outcome.all_s = time.monotonic() - began_s
    return outcome


def take(outcome: Outcome, event: dict[str, Any], began_s: float) -> None:
    if "error" in event:
        outcome.error = str(event["error"])
    for choice in event.get("choices", []):
        outcome.first_s = outcome.first_s or time.monotonic() - began_s
        outcome.tokens += choice.get("token_ids") or []
        outcome.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        outcome.finish_reason = choice["finish_reason"] or outcome.finish_reason


def note(line: str) -> None:
    """Print what a test measured; the session sends sys.stdout into Ray's log."""
    print(line, file=sys.__stdout__, flush=True)


def run(main: Any, timeout_s: float = 120) -> Any:
    """Run a function of a client session to its end."""

    async def inside() -> Any:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            return await main(session)

    return asyncio.run(asyncio.wait_for(inside(), timeout_s))


@contextlib.contextmanager
def serving_ray(tmp_path_factory: Any, **fields: Any) -> Iterator[tuple[str, ServingConfig]]:
    """Ray, Serve and its proxy; yields the address, and a config for it. The environment is put back."""
    from nanochat.cluster.endpoint_session import serve_session
    from nanochat.cluster.ingress import free_ports
    from nanochat.config.cluster import ClusterConfig

    before = dict(os.environ)
    folder = os.path.dirname(__file__)  # replicas import paced_backend
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [before.get("PYTHONPATH")])])
    serving = ServingConfig(
        port=free_ports(1)[0],
        backend=BACKEND,
        compile="off",
        **{"models": ("paced",), "run_dir": str(tmp_path_factory.mktemp("serve")), **fields},
    )
    try:
        with serve_session(serving, ReplicasConfig(cold_start_s=20), ClusterConfig()) as address:
            yield address, serving
    finally:
        os.environ.clear()
        os.environ.update(before)


def replica_pids(name: str = "nanochat") -> dict[str, int]:
    """The running replicas of an application: the processes that Serve says they are."""
    import ray
    from ray import serve
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    serve.status()
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    details = ray.get(controller.get_serve_instance_details.remote(), timeout=20)
    replicas = details["applications"].get(name, {"deployments": {}})["deployments"]
    return {
        one["replica_id"]: one["pid"]
        for deployment in replicas.values()
        for one in deployment["replicas"]
        if one["state"] == "RUNNING"
    }
