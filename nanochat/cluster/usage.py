"""What each stage of a line takes of the cluster: seconds of nodes at work and idle, and of waiting for any to work.

A thread looks at the nodes every few seconds. A node works while something has reserved a CPU or GPU of it; a stage
waits while none does: for nodes, for processes to start, for what the job itself computes. Looks are summed up in
usage.jsonl, a line a minute, so a killed job loses a minute of account at most; what a resumed one takes comes on top.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

import ray
from ray._private.state import available_resources_per_node

from nanochat import storage
from nanochat.cluster.nodes import WORK_LABEL
from nanochat.errors import excerpt
from nanochat.storage import RunFolder

LOOK_S = 2.0
LINE_S = 60.0


class Usage:
    """Keeps the account of one command."""

    def __init__(self, folder: RunFolder, prices: dict[str, float]) -> None:
        self.folder, self.prices = folder, prices
        self.cost = 0.0
        """Dollars so far, of this command; without prices 0."""
        self.kinds: set[str] = set()
        """Of the nodes that there were."""
        self.missed: str | None = None
        """Why the last of the looks failed that did."""

    @contextlib.contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Account for a stage while the block runs."""
        ended = threading.Event()
        thread = threading.Thread(target=self._look, args=(stage, ended), name="usage", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _look(self, stage: str, ended: threading.Event) -> None:
        lap, before_s, is_over = _Lap(), time.monotonic(), False
        while not is_over:
            is_over = ended.wait(LOOK_S)
            try:
                before_s = _count(lap, before_s)
                if lap.elapsed_s >= LINE_S or (is_over and lap.elapsed_s):
                    self._keep(lap.as_json(stage, self.prices))
                    lap = _Lap()
            except (OSError, RuntimeError, ray.exceptions.RayError) as err:  # the next look makes it up
                self.missed = excerpt(err)

    def _keep(self, record: dict) -> None:
        storage.append_jsonl(self.folder.usage, record)
        self.cost += record["cost"] or 0.0
        self.kinds |= record["working_s"].keys() | record["idle_s"].keys()

    def cost_text(self) -> str:
        """Return what it has cost, for the end of a line, and what is wrong with that."""
        if not self.prices:
            return ""
        unpriced = sorted(self.kinds - self.prices.keys())
        text = f", no --price for {' and '.join(unpriced)}" if unpriced else f", {self.cost:.2f} dollars"
        if unseen := sorted(self.prices.keys() - self.kinds):
            text += f"; no node was {' or '.join(unseen)}"
        return text if self.missed is None else f"{text}; a part may be missing ({self.missed})"


class _Lap:
    def __init__(self) -> None:
        self.elapsed_s = self.waiting_s = 0.0
        self.working_s: dict[str, float] = {}
        self.idle_s: dict[str, float] = {}

    def add(self, seconds: float, nodes: list[tuple[str, bool]]) -> None:
        """Count some seconds in which these nodes, of a kind each, worked or not."""
        self.elapsed_s += seconds
        if not any(works for _, works in nodes):
            self.waiting_s += seconds
        for kind, works in nodes:
            account = self.working_s if works else self.idle_s
            account[kind] = account.get(kind, 0.0) + seconds

    def as_json(self, stage: str, prices: dict[str, float]) -> dict:
        """Return the record; a node costs its price whether it works or not, and None where one's is not known."""
        there = {kind: self.working_s.get(kind, 0.0) + self.idle_s.get(kind, 0.0) for kind in
                 self.working_s | self.idle_s}  # fmt: skip
        is_known = there.keys() <= prices.keys()
        return {
            "stage": stage, "elapsed_s": self.elapsed_s, "waiting_s": self.waiting_s, "working_s": self.working_s,
            "idle_s": self.idle_s,
            "cost": sum(prices[kind] * s / 3600 for kind, s in there.items()) if is_known else None,
        }  # fmt: skip


def _count(lap: _Lap, before_s: float) -> float:
    """Count the time since the last look that worked, if there is a Ray by now; returns this look's time."""
    now_s = time.monotonic()
    if ray.is_initialized():
        lap.add(now_s - before_s, nodes_at_work())
    return now_s


def nodes_at_work() -> list[tuple[str, bool]]:
    """Return each node's kind, its label `work` or else `node`, and whether a CPU or GPU of it is reserved."""
    free = available_resources_per_node()
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            left = free.get(node["NodeID"], {})
            has = {kind: node["Resources"].get(kind, 0.0) for kind in ("CPU", "GPU")}
            works = any(left.get(kind, 0.0) < amount for kind, amount in has.items())
            found.append((node["Labels"].get(WORK_LABEL, "node"), works))
    return found
