"""The account of nodes, with nodes that a test makes up."""

import threading
from types import SimpleNamespace

import pytest

from nanochat import storage
from nanochat.cluster import usage
from nanochat.cluster.usage import Usage
from nanochat.storage import RunFolder


@pytest.fixture
def looks(monkeypatch):
    """Nodes that each look finds, one list after the other; the last one stays. No look waits."""
    found: list[list[tuple[str, bool]]] = []
    clock = {"now_s": 0.0}

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return clock["now_s"]

    class Ended:
        def set(self) -> None:
            pass

        def wait(self, seconds: float) -> bool:
            clock["now_s"] += seconds
            return not found

    monkeypatch.setattr(usage, "time", Clock)
    monkeypatch.setattr(usage, "threading", SimpleNamespace(Event=Ended, Thread=threading.Thread))
    monkeypatch.setattr(usage.ray, "is_initialized", lambda: bool(found))
    monkeypatch.setattr(usage, "nodes_at_work", lambda: found.pop(0))
    return found


def test_seconds_of_nodes_are_counted_by_what_they_do(looks, tmp_path):
    looks += [
        [("head", False)],
        [("head", False), ("train", True), ("train", False)],
        [("head", False), ("train", True)],
    ]
    folder = RunFolder(str(tmp_path))
    account = Usage(folder, {"train": 3600.0, "head": 36.0})
    with account.of("pretrain"):
        pass
    (record,) = storage.read_jsonl(folder.usage)
    assert record == {
        "stage": "pretrain", "elapsed_s": 6.0, "waiting_s": 2.0, "working_s": {"train": 4.0},
        "idle_s": {"head": 6.0, "train": 2.0}, "cost": pytest.approx(6.0 + 0.06),
    }  # fmt: skip
    assert account.cost == pytest.approx(6.06)
    assert account.cost_text() == ", 6.06 dollars"


def test_there_is_a_line_every_minute_and_the_rest_at_the_end(looks, tmp_path):
    looks += [[("node", True)]] * 70
    folder = RunFolder(str(tmp_path))
    with Usage(folder, {}).of("sft"):
        pass
    assert [record["elapsed_s"] for record in storage.read_jsonl(folder.usage)] == [60.0, 60.0, 20.0]


def test_a_stage_that_needs_no_ray_takes_nothing(looks, tmp_path):
    account = Usage(RunFolder(str(tmp_path)), {})
    with account.of("sft"):
        pass
    assert storage.read_jsonl(account.folder.usage) == []
    assert account.cost_text() == ""


def test_what_has_no_price_has_no_cost(looks, tmp_path):
    looks += [[("train", True), ("node", True)]] * 30
    account = Usage(RunFolder(str(tmp_path)), {"train": 60.0, "gpu": 3.0})
    with account.of("pretrain"):
        pass
    (record,) = storage.read_jsonl(account.folder.usage)
    assert record["cost"] is None
    assert account.cost_text() == ", no --price for node; no node was gpu"


def test_a_look_that_fails_is_made_up_for_by_the_next(looks, tmp_path, monkeypatch):
    """Three looks, the second of which finds no nodes; the third one's account cannot be written at first."""
    looks += [[("train", True)], [], [("train", True)], [("train", True)]]
    monkeypatch.setattr(usage, "LINE_S", 6.0)
    append, failures = storage.append_jsonl, iter([True, False])

    def nodes():
        if not (found := looks.pop(0)):
            raise OSError("the control store is away")
        return found

    def failing(path, record):
        if next(failures):
            raise OSError("the bucket is away")
        append(path, record)

    monkeypatch.setattr(usage, "nodes_at_work", nodes)
    monkeypatch.setattr(usage.storage, "append_jsonl", failing)
    account = Usage(RunFolder(str(tmp_path)), {"train": 3600.0, "trian": 1.0})
    with account.of("pretrain"):
        pass
    (record,) = storage.read_jsonl(account.folder.usage)
    assert record["working_s"] == {"train": 8.0}
    assert account.cost_text() == ", 8.00 dollars; no node was trian; a part may be missing (the bucket is away)"


def test_a_node_works_while_a_cpu_or_gpu_of_it_is_reserved(monkeypatch):
    """Ray says what a node has left, of one with nothing left nothing. Dead nodes are none."""

    def node(name: str, labels: dict, alive: bool = True, **resources: float) -> dict:
        return {"NodeID": name, "Labels": labels, "Alive": alive, "Resources": resources}

    train = {"work": "train"}
    nodes = [
        node("idle", train, CPU=8.0, GPU=1.0, memory=9.0), node("cpu", train, CPU=8.0, GPU=1.0),
        node("gpu", train, CPU=8.0, GPU=1.0), node("full", {}, CPU=8.0), node("no_resources", {"work": "head"}),
        node("dead", train, alive=False, CPU=8.0),
    ]  # fmt: skip
    free = {
        "idle": {"CPU": 8.0, "GPU": 1.0, "memory": 1.0}, "cpu": {"CPU": 7.5, "GPU": 1.0},
        "gpu": {"CPU": 8.0, "GPU": 0.5}, "full": {}, "dead": {"CPU": 8.0},
    }  # fmt: skip
    monkeypatch.setattr(usage.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(usage, "available_resources_per_node", lambda: free)
    assert usage.nodes_at_work() == [
        ("train", False), ("train", True), ("train", True), ("node", True), ("head", False)
    ]  # fmt: skip
