"""A cluster of several nodes on this machine: a head, to which jobs are submitted, and nodes with labels."""

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from ray.cluster_utils import Cluster

from nanochat.cluster.ingress import free_ports

PROJECT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
OBJECT_STORE_BYTES = 150 << 20


class SimulatedCluster:
    """Nodes are processes of this one; `submit` runs a job as its users do."""

    def __init__(self, folder: Path) -> None:
        self.dashboard_port, agent_port = free_ports(2)
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the entry points' python
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES, "labels": {"work": "head"},
                "include_dashboard": True, "dashboard_port": self.dashboard_port, "temp_dir": str(folder),
                "dashboard_agent_listen_port": agent_port,  # its default is every Ray's: another's would run the jobs
            },
        )  # fmt: skip
        self.folder, self.started = folder, 0
        self.nodes: dict[str, list] = {}

    @property
    def address(self) -> str:
        """Where jobs are submitted to."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def add(self, work: str, num_cpus: int = 1):
        """Start a node for a kind of work."""
        self.started += 1
        node = self.cluster.add_node(
            num_cpus=num_cpus, labels={"work": work}, object_store_memory=OBJECT_STORE_BYTES,
            dashboard_agent_listen_port=free_ports(1)[0],
            temp_dir=f"{self.folder}{self.started}",  # of its own: agents of two nodes unpack a job's files there
        )  # fmt: skip
        self.nodes.setdefault(work, []).append(node)
        return node

    def kill(self, work: str) -> None:
        """End the newest node of a kind, and all its processes, without a word."""
        self.cluster.remove_node(self.nodes[work].pop(), allow_graceful=False)

    def drain(self, work: str, deadline_s: int) -> None:
        """Say that the newest node of a kind will be taken away, as a cloud says it of a spot node."""
        node = self.nodes[work][-1]
        subprocess.run(
            [RAY, "drain-node", "--address", self.cluster.address, "--node-id", node.node_id, "--reason",
             "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test", "--deadline-remaining-seconds",
             str(deadline_s)], check=True, capture_output=True, timeout=60,
        )  # fmt: skip

    def submit(self, *command: str, timeout_s: float = 300, **environment: str) -> subprocess.CompletedProcess:
        """Run `ray job submit` with the project as working directory, to the end of the job."""
        return self.start(*command, **environment).result(timeout_s)

    def start(self, *command: str, **environment: str) -> "Submitted":
        """Submit a job and return at once."""
        submit = [RAY, "job", "submit", "--address", self.address, "--submission-id", (name := uuid.uuid4().hex)]
        runtime_env = {"working_dir": str(PROJECT), "env_vars": environment}
        submit += ["--runtime-env-json", json.dumps(runtime_env), "--", "python", *command]
        return Submitted(
            self.address, name, subprocess.Popen(submit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )

    def shutdown(self) -> None:
        """End all nodes."""
        self.cluster.shutdown()


class Submitted:
    """A job on its way."""

    def __init__(self, address: str, name: str, process: subprocess.Popen) -> None:
        self.address, self.name, self.process = address, name, process

    def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait for something that happens before the job ends."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"ended before: {self.process.communicate()[0][-4000:]}"
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.05)
        assert self.process.poll() is None, "has ended already"

    def stop(self) -> None:
        """Ask Ray to end the job, as Ctrl-C would."""
        subprocess.run([RAY, "job", "stop", "--address", self.address, self.name], check=True, capture_output=True)

    def result(self, timeout_s: float) -> subprocess.CompletedProcess:
        """Wait for the job's end."""
        try:
            said, _ = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            said, _ = self.process.communicate()
            raise AssertionError(f"has not ended in {timeout_s} s: {said[-4000:]}") from None
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, said)


@contextlib.contextmanager
def simulated_cluster(folder: Path) -> Iterator[SimulatedCluster]:
    """A cluster for the time of the block."""
    cluster = SimulatedCluster(folder)
    try:
        yield cluster
    finally:
        cluster.shutdown()
