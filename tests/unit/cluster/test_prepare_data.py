"""Preparing data without Ray: what a second command may change, and what a kill leaves behind."""

import json
import re
from pathlib import Path

import pytest
import tiktoken

from nanochat.cluster import jobs
from nanochat.cluster.jobs import prepare_data
from nanochat.cluster.terminal import Terminal
from nanochat.config.cluster import ClusterConfig
from nanochat.config.corpus import CorpusConfig
from nanochat.config.shards import ShardsConfig
from nanochat.config.tokenizer import TokenizerConfig
from nanochat.errors import ConfigError, NanochatError
from nanochat.run_context import RunContext


@pytest.fixture(autouse=True)
def without_ray_and_network(monkeypatch):
    def refuse(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    monkeypatch.setattr(jobs, "ray_context", lambda progress, cluster: RunContext(progress=progress))


@pytest.fixture
def corpus(tmp_path) -> CorpusConfig:
    text = " ".join(f"number {number} of the words" for number in range(300))
    for name in ("a.jsonl", "b.jsonl", "z.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": f"{name}: {text}"}) + "\n")
    return CorpusConfig(corpus=str(tmp_path), max_bytes=1)


def prepare(run_dir: Path, corpus: CorpusConfig, vocab_size: int = 300, sequence_len: int = 16):
    tokenizer, shards = TokenizerConfig(vocab_size=vocab_size), ShardsConfig(sequence_len=sequence_len)
    return prepare_data(str(run_dir), corpus, tokenizer, shards, None, ClusterConfig(), Terminal())


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_corpus_vocabulary_or_length_is_refused_and_fetches_and_changes_nothing(tmp_path, corpus):
    run = tmp_path / "run"
    prepare(run, corpus)
    before = contents(run)
    for difference, arguments in (
        (f"corpus.corpus='pydocs' (was '{corpus.corpus}')", {"corpus": CorpusConfig(corpus="pydocs")}),
        ("tokenizer.vocab_size=301 (was 300)", {"corpus": corpus, "vocab_size": 301}),
        ("shards.sequence_len=20 (was 16)", {"corpus": corpus, "sequence_len": 20}),
    ):
        with pytest.raises(ConfigError, match=re.escape(difference)) as raised:
            prepare(run, **arguments)
        assert "--run-dir (make: RUN_DIR=...)" in str(raised.value)
        assert contents(run) == before


def test_more_text_is_no_other_run(tmp_path, corpus):
    first = prepare(tmp_path / "run", corpus)
    tokenizer = (tmp_path / "run/tokenizer/tokenizer.json").read_bytes()
    more = prepare(tmp_path / "run", CorpusConfig(corpus=corpus.corpus))
    assert (len(first.split("train")), len(more.split("train"))) == (1, 2)
    assert (tmp_path / "run/tokenizer/tokenizer.json").read_bytes() == tokenizer


def test_a_mistyped_corpus_is_no_identity(tmp_path, corpus):
    with pytest.raises(NanochatError, match="must be a file"):
        prepare(tmp_path / "run", CorpusConfig(corpus=corpus.corpus + "/nosuch"))
    prepare(tmp_path / "run", corpus)


def test_a_report_that_a_kill_prevented_is_written_by_the_next_command(tmp_path, corpus, monkeypatch):
    report = tmp_path / "run/tokenizer/report.json"
    with monkeypatch.context() as killed:
        killed.setattr(jobs, "compression_report", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "run", corpus)
    assert (tmp_path / "run/tokenizer/tokenizer.json").exists()
    prepare(tmp_path / "run", corpus)
    assert json.loads(report.read_text())["encodings"]["ours"]["vocab_size"] == 300
    report.write_text('{"kept": true}')
    prepare(tmp_path / "run", corpus)
    assert report.read_text() == '{"kept": true}'
    (tmp_path / "run/tokenizer/tokenizer.json").unlink()
    prepare(tmp_path / "run", corpus)
    assert "kept" not in report.read_text(), "it was another tokenizer's"
