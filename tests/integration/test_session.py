"""The map that runs on Ray: order, a task that dies, errors as they were; and who may join that Ray."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.errors import DataError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


def test_results_come_in_order(ray_session):
    from nanochat.cluster.session import ray_map

    assert list(ray_map(lambda item: item * item, range(20))) == [item * item for item in range(20)]


def test_a_task_whose_process_is_killed_runs_again(ray_session, tmp_path):
    from nanochat.cluster.session import ray_map

    def work(item):
        marker = tmp_path / str(item)
        if item == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    assert list(ray_map(work, range(3))) == [0, 1, 2]
    assert (tmp_path / "1").exists()


def test_an_error_comes_out_as_it_was(ray_session):
    from nanochat.cluster.session import ray_map

    def work(item):
        raise DataError(f"corpus={item}: is empty.")

    with pytest.raises(DataError, match=r"^corpus=a: is empty\.") as caught:
        list(ray_map(work, ["a"]))
    assert "test_session.py" in caught.value.__notes__[0], "and says where it was raised"


def test_packing_on_ray_equals_packing_here(ray_session, tiny_run, tmp_path):
    """Killed half-way and run again, the shards are the same, and finished ones are not made again."""
    from nanochat.cluster.session import ray_context
    from nanochat.config.corpus import CorpusConfig
    from nanochat.config.shards import ShardsConfig
    from nanochat.data.corpora import prepare_corpus
    from nanochat.data.document_shards import write_token_shards
    from nanochat.data.token_shards import TokenShards
    from nanochat.data.tokenizer import Tokenizer

    run = ray_context(lambda line: None)
    corpus = prepare_corpus(CorpusConfig(corpus=f"{tiny_run.parent}/text_*.jsonl"), run, str(tmp_path / "text"), None)
    tokenizer = Tokenizer.load(str(tiny_run / "tokenizer"))
    folder = tmp_path / "shards"
    packed = write_token_shards(ShardsConfig(sequence_len=64), run, corpus, tokenizer, str(folder))
    assert packed.manifest_hash == TokenShards.load(str(tiny_run / "shards")).manifest_hash
    kept, lost = sorted(folder.glob("train/*.parquet"))
    before = kept.stat().st_mtime_ns
    lost.unlink()
    (folder / "manifest.json").unlink()
    again = write_token_shards(ShardsConfig(sequence_len=64), run, corpus, tokenizer, str(folder))
    assert again.manifest_hash == packed.manifest_hash
    assert kept.stat().st_mtime_ns == before


def test_nodes_with_other_software_or_without_the_run_directory_are_named(ray_session, tmp_path, monkeypatch):
    from nanochat.cluster import nodes
    from nanochat.errors import ClusterError

    nodes.check_nodes(str(tmp_path))
    with pytest.raises(ClusterError, match=r"^node=[\d.]+: does not see run_dir=.*/away\. Put it where all"):
        nodes.check_nodes(str(tmp_path / "away"))
    mine = nodes.software()
    for name in ("Python", "Ray", "torch", "nanochat"):
        monkeypatch.setattr(nodes, "software", lambda name=name: mine | {name: "0.0"})
        with pytest.raises(ClusterError, match=rf"^node=[\d.]+: has {name} \S+.*, the driver 0\.0\. Use one image"):
            nodes.check_nodes(str(tmp_path))


def test_a_node_that_dies_while_it_is_asked_is_none_of_them(ray_session, tmp_path, monkeypatch):
    """Listed as alive by what knows all nodes, and not known any more where its task is scheduled."""
    import ray

    from nanochat.cluster import nodes
    from nanochat.errors import ClusterError

    real, lists = ray.nodes(), []
    ghost = real[0] | {"NodeID": "a" * len(real[0]["NodeID"]), "NodeManagerAddress": "192.0.2.7"}

    def listed():
        lists.append(1)
        return [*real, ghost] if len(lists) < 3 else real

    monkeypatch.setattr(ray, "nodes", listed)
    nodes.check_nodes(str(tmp_path))
    assert len(lists) == 3
    monkeypatch.setattr(ray, "nodes", lambda: [*real, ghost])
    monkeypatch.setattr(nodes, "ANSWER_S", 5.0)
    with pytest.raises(ClusterError, match=r"^node=192\.0\.2\.7: cannot run this project \(TaskUnschedulableError: "):
        nodes.check_nodes(str(tmp_path))

    def crashes(path):
        os._exit(1)

    monkeypatch.setattr(ray, "nodes", lambda: real)
    monkeypatch.setattr(nodes, "_answer", crashes)
    with pytest.raises(ClusterError, match=r"^node=[\d.]+: cannot run this project \(WorkerCrashedError: "):
        nodes.check_nodes(str(tmp_path))


def test_a_cluster_that_can_grow_is_waited_for(ray_session):
    """As the autoscaler tells Ray what it may start."""
    from ray._raylet import GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, GCS_AUTOSCALER_STATE_NAMESPACE
    from ray.core.generated.autoscaler_pb2 import ClusterConfig as Growth
    from ray.core.generated.autoscaler_pb2 import NodeGroupConfig
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

    from nanochat.cluster.nodes import ANYWHERE, check_resources
    from nanochat.errors import ClusterError

    growth = Growth(node_group_configs=[NodeGroupConfig(resources={"GPU": 2}, max_count=3, name="train")])
    where = {"namespace": GCS_AUTOSCALER_STATE_NAMESPACE.encode()}
    key = GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode()
    noted: list[str] = []

    def ask(gpus):
        check_resources("num_workers=x", [{"GPU": 1.0}] * gpus, "train", ANYWHERE, "Ask for fewer.", noted.append)

    with pytest.raises(ClusterError, match=r"^num_workers=x: needs 6 GPU, the cluster has 0\. Ask for fewer\.$"):
        ask(6)
    _internal_kv_put(key, growth.SerializeToString(), **where)
    try:
        ask(6)
        assert noted == ["num_workers=x: needs 6 GPU, the cluster has 0, at most 6 can be added. Waiting for nodes."]
        with pytest.raises(ClusterError, match=r"needs 7 GPU, the cluster has 0, at most 6 can be added\. Ask"):
            ask(7)
    finally:
        _internal_kv_del(key, **where)


def test_a_run_directory_in_a_jobs_package_is_refused(tmp_path):
    from nanochat.cluster.session import session
    from nanochat.config.cluster import ClusterConfig
    from nanochat.errors import ConfigError

    inside = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0" / "runs" / "base"
    with (
        pytest.raises(ConfigError, match="lies in this job's own copy of the project"),
        session(ClusterConfig(), str(inside)),
    ):
        pass


ASK = "import sys, ray._raylet; print(ray._raylet.GcsClient(address=sys.argv[1]).internal_kv_keys(b'', b'', 5))"


@pytest.mark.parametrize(
    ("environment", "is_let_in"),
    [({}, True), ({"RAY_AUTH_MODE": "disabled"}, False), ({"RAY_AUTH_TOKEN": "0" * 32}, False)],
)
def test_a_ray_of_ones_own_answers_to_the_token_alone(ray_session, environment, is_let_in):
    import ray

    asked = [sys.executable, "-c", ASK, ray.get_runtime_context().gcs_address]
    done = subprocess.run(asked, env=os.environ | environment, capture_output=True, text=True, timeout=50)
    assert (done.returncode == 0) == is_let_in, done.stderr
    assert is_let_in or "token is missing or incorrect" in done.stderr


def test_no_other_user_reads_the_token(ray_session):
    assert (Path.home() / ".ray" / "auth_token").is_file()
    assert (Path.home() / ".ray").stat().st_mode & 0o077 == 0
