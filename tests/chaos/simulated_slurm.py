"""A Slurm of two nodes on this machine: each with a network, a name, processes, a /dev/shm and a local disk of its own.

Run as a program it is what those nodes run: `nodes` (makes them), `slurmd`, and the commands `srun` and `scontrol`. A
batch script runs on node 0, and its signals reach it alone; `srun` runs a command once on each node.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

ADDRESSES = ("10.0.0.1", "10.0.0.2")
NODES = len(ADDRESSES)
OWN = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
ME = (sys.executable, __file__)
INIT = ("bash", "-c", '"$@" & wait', "init")
"""A node's first process: it collects the orphans that have ended."""


class Step:
    """A command on a node."""

    def __init__(self, folder: Path, node: int, command: list[str], environment: dict[str, str], cwd: str) -> None:
        self.connection: Connection = Client(str(folder / f"node{node}"), "AF_UNIX")
        self.connection.send((command, environment | {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}, cwd))

    def signal(self, number: int) -> None:
        """Send a signal to the command's own process."""
        self.connection.send(number)

    def result(self, timeout_s: float | None = None) -> int | None:
        """Wait for the exit code; None = not yet."""
        return self.connection.recv() if self.connection.poll(timeout_s) else None


class Slurm:
    """Where jobs are submitted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, itertools.count(1)
        self.requeued = folder / "requeued"

    def sbatch(self, *command: str, cwd: Path, restarts: int = 0, **environment: str) -> Step:
        """Run a batch script on node 0, its #SBATCH lines unread; what it and its steps say goes to `log` in `cwd`."""
        path = f"{self.folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        slurm = {"SLURM_JOB_ID": str(next(self.jobs)), "SLURM_JOB_NUM_NODES": str(NODES),
                 "SLURM_CPUS_ON_NODE": "4", "SLURM_RESTART_COUNT": str(restarts)}  # fmt: skip
        place = {"PATH": path, "HOME": str(self.folder / "home"), "TMPDIR": str(self.folder / "local")}
        stub = {"STUB_FOLDER": str(self.folder)}
        return Step(self.folder, 0, ["bash", *command], place | slurm | stub | environment, str(cwd))


@contextlib.contextmanager
def simulated_slurm(folder: Path) -> Iterator[Slurm]:
    """Nodes for the time of the block; whatever runs on them then ends with them. `folder` has a short name."""
    for name in ("bin", "home", "local"):
        (folder / name).mkdir(parents=True)
    for name in ("srun", "scontrol"):
        command = folder / "bin" / name
        command.write_text(f'#!/bin/sh\nexec {" ".join(ME)} {name} "$@"\n')
        command.chmod(0o755)
    nodes = subprocess.Popen([OWN[0], "--map-root-user", *OWN[1:], *ME, "nodes", str(folder)], stdout=subprocess.PIPE)
    try:
        assert nodes.stdout is not None
        assert nodes.stdout.readline() == b"ready\n", "no nodes"
        yield Slurm(folder)
    finally:
        nodes.kill()
        nodes.wait()


def nodes(folder: str) -> None:
    """Start the nodes and join them by a cable."""
    processes = [subprocess.Popen([*OWN, *INIT, *ME, "slurmd", folder, str(node)]) for node in range(NODES)]
    while not all(Path(folder, f"node{node}").exists() for node in range(NODES)):
        time.sleep(0.05)
    first, second = (str(process.pid) for process in processes)
    cable = f"link add eth0 netns {first} type veth peer name eth0 netns {second}"
    subprocess.run(["ip", *cable.split()], check=True)
    for node, process in enumerate(processes):
        for words in ("link set lo up", f"addr add {ADDRESSES[node]}/24 dev eth0", "link set eth0 up"):
            subprocess.run(["nsenter", "-t", str(process.pid), "-n", "ip", *words.split()], check=True)
    print("ready", flush=True)
    processes[0].wait()


def slurmd(folder: str, node: str) -> None:
    """Run what is sent to this node."""
    hosts = Path(folder, f"hosts{node}")  # gloo listens where a node's own name leads
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{ip} node{i}\n" for i, ip in enumerate(ADDRESSES)))
    for command in (
        f"hostname node{node}", f"mount --bind {hosts} /etc/hosts", "mount -t tmpfs none /dev/shm",
        f"mount -t tmpfs none {folder}/local",
    ):  # fmt: skip
        subprocess.run(command.split(), check=True)
    with Listener(f"{folder}/node{node}", "AF_UNIX") as listener:
        while True:
            threading.Thread(target=run, args=(listener.accept(),), daemon=True).start()


def run(connection: Connection) -> None:
    """Run one command to its end, passing signals on; it is killed if whoever sent it is gone."""
    command, environment, cwd = connection.recv()
    step = uuid.uuid4().hex
    with open(f"{cwd}/log", "ab") as file:
        process = subprocess.Popen(
            command, env=environment | {"STUB_STEP": step}, cwd=cwd, stdout=file, stderr=file, stdin=subprocess.DEVNULL
        )
    while process.poll() is None:
        try:
            if connection.poll(0.1):
                process.send_signal(connection.recv())
        except EOFError:
            process.kill()
            return
    while left := processes_of(step):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    connection.send(process.returncode if process.returncode >= 0 else 128 - process.returncode)


def processes_of(step: str) -> list[int]:
    """Return what is left of a step on this node, Ray's daemons included: Slurm's cgroups end all of it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"STUB_STEP={step}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def srun(*arguments: str) -> int:
    """Run a command once on each node; returns the highest exit code. A failed one ends the others."""
    options = list(itertools.takewhile(lambda word: word.startswith("--"), arguments))
    folder, command = Path(os.environ["STUB_FOLDER"]), list(arguments[len(options) :])
    steps = [Step(folder, node, command, dict(os.environ), os.getcwd()) for node in range(NODES)]
    signal.signal(signal.SIGTERM, lambda number, _: [step.signal(number) for step in steps])
    codes: dict[Step, int] = {}
    while len(codes) < NODES:
        for step in set(steps) - set(codes):
            if (code := step.result(0.1)) is not None:
                codes[step] = code
                if code and "--kill-on-bad-exit=1" in options:
                    for other in set(steps) - set(codes):
                        other.signal(signal.SIGTERM)
    return max(codes.values())


def scontrol(*arguments: str) -> None:
    """Note that a job is to be queued again."""
    Path(os.environ["STUB_FOLDER"], "requeued").write_text(" ".join(arguments))


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))
