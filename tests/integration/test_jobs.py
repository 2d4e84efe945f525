"""The stages as jobs, without a Ray: what a person sees of them, what a second command keeps, the summary."""

import json
import uuid

import pytest

from nanochat import storage
from nanochat.cluster import jobs
from nanochat.config.cluster import ClusterConfig
from nanochat.config.corpus import CorpusConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.shards import ShardsConfig
from nanochat.config.tokenizer import TokenizerConfig
from nanochat.data.tokenizer import Tokenizer
from nanochat.run_context import RunContext
from nanochat.storage import RunFolder, StageFolder
from nanochat.training.checkpoint import Checkpoint
from nanochat.training.metrics import progress_line


class Screen:
    """A terminal that remembers: (how, line)."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, str]] = []

    def live(self, line: str) -> None:
        self.shown.append(("live", line))

    def line(self, line: str) -> None:
        self.shown.append(("line", line))

    def take(self) -> list[tuple[str, str]]:
        """Return what was shown since the last call."""
        shown, self.shown = self.shown, []
        return shown


def record(step: int) -> dict:
    return {"step": step, "loss": 5.0 - step, "tokens_per_s": 1000.0, "flops_per_s": 2e9, "mfu": None,
            "data_wait_share": 0.01, "eta_s": 60.0}  # fmt: skip


def test_the_view_shows_each_new_note_once_and_the_newest_record(tmp_path):
    folder, screen = StageFolder(str(tmp_path)), Screen()
    folder.note("of an earlier start")
    view = jobs._MetricsView(folder, 9, screen)
    view.update()
    assert screen.take() == []
    folder.note("a worker group starts at step 0")
    storage.append_jsonl(folder.metrics, {"step": 0, "val_bpb": 3.25})
    view.update()
    assert screen.take() == [
        ("line", "           a worker group starts at step 0"),
        ("live", "validation 3.250 bits per byte before training"),
    ]
    storage.append_jsonl(folder.metrics, record(0))
    storage.append_jsonl(folder.metrics, record(1))
    view.update()
    assert screen.take() == [("live", progress_line(record(1), 9, 3.25))]
    view.update()
    assert screen.take() == [], "nothing is new"
    storage.append_jsonl(folder.metrics, {"step": 2, "val_bpb": 2.5})
    folder.note("a worker group starts at step 2")
    view.update()
    assert screen.take() == [
        ("line", "           a worker group starts at step 2"),
        ("live", progress_line(record(1), 9, 2.5)),
    ]
    assert view.val_bpb == 2.5


def test_the_view_follows_a_restart_that_drops_records(tmp_path):
    folder, screen = StageFolder(str(tmp_path)), Screen()
    view = jobs._MetricsView(folder, 9, screen)
    for step in range(3):
        storage.append_jsonl(folder.metrics, record(step))
    storage.append_jsonl(folder.metrics, {"step": 3, "val_bpb": 2.5})
    view.update()
    screen.take()
    storage.remove(folder.metrics)
    storage.append_jsonl(folder.metrics, record(0))
    view.update()
    assert screen.take() == [("live", progress_line(record(0), 9, None))]
    assert view.val_bpb is None


def test_the_view_looks_at_an_object_store_every_ten_seconds(monkeypatch):
    now_s = 1000.0
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now_s)
    folder, screen = StageFolder(f"memory://{uuid.uuid4().hex}"), Screen()
    view = jobs._MetricsView(folder, 9, screen)
    seen = []
    for now_s in (1000.0, 1005.0, 1009.9, 1010.5, 1020.0, 1021.0):
        folder.note(f"at {now_s:g}")
        view.update()
        seen.append(len(screen.take()))
    assert seen == [1, 0, 0, 3, 0, 2]


def test_the_summary_has_the_last_score(tmp_path):
    assert jobs.summary(str(tmp_path)) == {"val_bpb": None}
    metrics = RunFolder(str(tmp_path)).pretrain.metrics
    for line in ({"step": 0, "val_bpb": 3.0}, record(0), {"step": 1, "val_bpb": 2.75}, record(1)):
        storage.append_jsonl(metrics, line)
    assert jobs.summary(str(tmp_path)) == {"val_bpb": 2.75}


@pytest.fixture
def prepare(tiny_run, tmp_path, monkeypatch):
    """Prepares tiny_run's text in a folder of its own, in this process; returns what was shown."""
    monkeypatch.setattr(jobs, "ray_context", lambda progress: RunContext(progress=progress))
    monkeypatch.setattr("nanochat.data.tokenizer.REFERENCE_ENCODINGS", ())  # they would be downloaded

    def run():
        screen = Screen()
        packed = jobs.prepare_data(
            str(tmp_path / "run"), CorpusConfig(corpus=f"{tiny_run.parent}/text_*.jsonl"),
            TokenizerConfig(vocab_size=300), ShardsConfig(sequence_len=64), None, screen,
        )  # fmt: skip
        return packed, [line for how, line in screen.shown if how == "line"]

    return run


def times_of(folder) -> dict[str, int]:
    """When each file below a folder was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_data_are_prepared_once(prepare, tmp_path):
    packed, said = prepare()
    tokenizer = Tokenizer.load(str(tmp_path / "run" / "tokenizer"))
    assert tokenizer.vocab_size == 300
    assert said[0].split()[0] == "corpus"
    assert said[0].endswith(": 2 training shards"), "the last of three files is held out"
    assert said[1] == f"tokenizer  300 tokens, {tokenizer.hash[:12]}"
    rows = packed.rows("train"), packed.rows("validation")
    assert min(rows) > 100
    assert said[2] == f"shards     {rows[0]} training and {rows[1]} validation rows of 64 tokens"
    report = json.loads((tmp_path / "run" / "tokenizer" / "report.json").read_text())
    assert report["tokenizer_hash"] == tokenizer.hash
    before = times_of(tmp_path / "run" / "tokenizer") | times_of(tmp_path / "run" / "shards" / "train")
    again, said_again = prepare()
    assert said_again == said
    assert again.manifest_hash == packed.manifest_hash
    assert before == times_of(tmp_path / "run" / "tokenizer") | times_of(tmp_path / "run" / "shards" / "train")


def test_a_short_run_in_an_object_store_ends_with_its_score(tiny_run, monkeypatch):
    """The last look does not wait for ten seconds to pass."""
    run_dir = f"memory://{uuid.uuid4().hex}"
    for name in ("shards", "tokenizer"):
        storage.filesystem(run_dir)[0].put(str(tiny_run / name), f"{run_dir}/{name}", recursive=True)

    def trained(config, plan, cluster, shards, tokenizer_folder, folder, watch, *more):
        folder.note("a worker group starts at step 0")
        watch()
        storage.append_jsonl(folder.metrics, {"step": 2, "val_bpb": 2.5})
        return Checkpoint(f"{folder.root}/checkpoints/step_000002")

    monkeypatch.setattr(jobs, "train_on_ray", trained)
    screen = Screen()
    config = PretrainConfig(depth=1, head_dim=16, num_steps=2, global_batch_tokens=64)
    jobs.pretrain_base(run_dir, config, ClusterConfig(num_workers=1), screen)
    assert screen.shown[-1][1].endswith("step_000002, validation 2.5000 bits per byte")
