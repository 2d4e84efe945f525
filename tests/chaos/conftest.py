"""A cluster of several nodes for each module, and text that it trains on."""

import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.cluster.environment import set_ray_environment

set_ray_environment()

WORDS = ["red", "green", "blue", "apple", "pear", "runs", "sleeps", "over", "under", "the", "a", "quick"]


@pytest.fixture(scope="module")
def cluster() -> Iterator["SimulatedCluster"]:  # noqa: F821
    """A head without work; tests add nodes."""
    from simulated_cluster import simulated_cluster

    folder = Path(tempfile.mkdtemp(prefix="sc", dir="/tmp"))  # short: Ray's sockets lie in it
    try:
        with simulated_cluster(folder / "ray") as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """Six files of documents."""
    draw = random.Random(0)
    folder = tmp_path_factory.mktemp("text")
    for shard in range(6):
        lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(20, 900)))}) for _ in range(400)]
        (folder / f"text_{shard}.jsonl").write_text("\n".join(lines))
    return str(folder / "text_*.jsonl")
