"""The map that runs on Ray: order, a task that dies, errors as they were."""

import os
import signal

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
