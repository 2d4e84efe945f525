"""The endpoint over the nodes of a cluster: replicas come with the load and go, and a node dies under it."""

import asyncio
import json
import os
import subprocess
import threading
import time
import urllib.request

import aiohttp
import pytest
from simulated_cluster import RAY, SimulatedCluster
from tiny_chat_run import write_tiny_chat_run

from nanochat.cluster.ingress import free_ports
from nanochat.cluster.load_generator import Timing, ask

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

BACKEND = os.environ.get("NANOCHAT_BACKEND", "native")
LOADING_S = {"native": 0.0, "vllm": 25.0}[BACKEND]
"""A replica's process is there before its model is: a kill would hit nobody."""
BODY = {"model": "sft", "prompt": "Once", "max_tokens": 100}


def replica_nodes(cluster: SimulatedCluster) -> list[str]:
    """The node of each replica that runs."""
    said = subprocess.run(
        [RAY, "list", "actors", "--address", cluster.address, "--format", "json", "--limit", "1000", "--filter",
         "state=ALIVE"], capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    return [one["node_id"] for one in json.loads(said[said.index("[") :]) if "ServeReplica" in one["class_name"]]


class Clients:
    """Ask again and again; an answer that breaks off or fails is asked for once more."""

    def __init__(self, address: str) -> None:
        self.url = f"{address}/v1/completions"
        self.answers: list[list[Timing]] = []
        self.is_over = False

    async def run(self, count: int) -> None:
        """Ask from so many clients until it is over."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            await asyncio.gather(*[self._client(session) for _ in range(count)])

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while not self.is_over:
            tries = [await ask(session, self.url, BODY)]
            if tries[0].error:
                tries.append(await ask(session, self.url, BODY))
            self.answers.append(tries)

    @property
    def failed(self) -> list[str]:
        """Why answers failed that failed twice."""
        return [f"{one[0].error}, then {one[1].error}" for one in self.answers if len(one) == 2 and one[1].error]


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/ready", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def until(condition, timeout_s: float) -> float:
    """Return after how many seconds a condition held."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < timeout_s, "waited too long"
        time.sleep(0.5)
    return time.monotonic() - began_s


def test_replicas_spread_over_nodes_and_a_dead_node_fails_no_request(cluster: SimulatedCluster, tmp_path):
    for _ in range(3):
        cluster.add("serve")
    run_dir = write_tiny_chat_run(tmp_path / "run")
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    job = cluster.start(
        "ray_jobs/serve.py", "--run-dir", str(run_dir), "--models", "sft", "--port", str(port), "--address", "auto",
        "--backend", BACKEND, "--compile", "off",
        "--replica-by-label",
        "--min-replicas", "1", "--max-replicas", "3", "--target-ongoing-requests", "3",
        "--look-back-s", "2", "--upscale-delay-s", "1", "--downscale-delay-s", "5", "--health-check-s", "0.5",
    )  # fmt: skip
    job.wait_for(lambda: is_ready(address), 180)
    assert len(replica_nodes(cluster)) == 1

    clients = Clients(address)
    load = threading.Thread(target=lambda: asyncio.run(clients.run(12)))
    load.start()
    try:
        up_s = until(lambda: len(set(replica_nodes(cluster))) == 3, 60)
        time.sleep(LOADING_S)
        gone = cluster.nodes["serve"][-1].node_id
        assert gone in replica_nodes(cluster)
        cluster.kill("serve")
        killed_s = time.monotonic()
        cluster.add("serve")
        until(lambda: len(set(replica_nodes(cluster)) - {gone}) == 3, 60)
        back_s = time.monotonic() - killed_s
        time.sleep(5)
    finally:
        clients.is_over = True
        load.join()
    down_s = until(lambda: len(replica_nodes(cluster)) == 1, 90)
    again = sum(len(tries) == 2 for tries in clients.answers)
    print(
        f"three nodes after {up_s:.1f} s, again {back_s:.1f} s after the kill, one replica {down_s:.1f} s after the "
        f"load; {len(clients.answers)} requests, {again} asked twice"
    )
    assert clients.failed == []
    assert again > 0, "the kill hit answers"
    assert len(clients.answers) > 50
    job.stop()
    job.process.wait(60)
