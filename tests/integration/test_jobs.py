"""The stages as jobs, without a Ray: what a person sees of them, what a second command keeps, the summary."""

import json
import os
import signal
import uuid

import pytest
import torch

from nanochat import storage
from nanochat.cluster import jobs
from nanochat.config.cluster import ClusterConfig
from nanochat.config.corpus import CorpusConfig
from nanochat.config.evaluation import EvaluationConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.shards import ShardsConfig
from nanochat.config.tokenizer import TokenizerConfig
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import CheckpointError, ConfigError
from nanochat.provenance import file_identity
from nanochat.run_context import RunContext
from nanochat.storage import RunFolder, StageFolder
from nanochat.training.checkpoint import Checkpoint, CheckpointWriter
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
    view = jobs._MetricsView(folder, 9, screen, "val_bpb", progress_line)
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
    assert screen.take() == [("live", progress_line(record(1), 9, {"val_bpb": 3.25}))]
    view.update()
    assert screen.take() == [], "nothing is new"
    storage.append_jsonl(folder.metrics, {"step": 2, "val_bpb": 2.5})
    folder.note("a worker group starts at step 2")
    view.update()
    assert screen.take() == [
        ("line", "           a worker group starts at step 2"),
        ("live", progress_line(record(1), 9, {"val_bpb": 2.5})),
    ]
    assert view.scored["val_bpb"] == 2.5


def test_the_view_follows_a_restart_that_drops_records(tmp_path):
    folder, screen = StageFolder(str(tmp_path)), Screen()
    view = jobs._MetricsView(folder, 9, screen, "val_bpb", progress_line)
    for step in range(3):
        storage.append_jsonl(folder.metrics, record(step))
    storage.append_jsonl(folder.metrics, {"step": 3, "val_bpb": 2.5})
    view.update()
    screen.take()
    storage.remove(folder.metrics)
    storage.append_jsonl(folder.metrics, record(0))
    view.update()
    assert screen.take() == [("live", progress_line(record(0), 9, {}))]
    assert not view.scored


def test_the_view_looks_at_an_object_store_every_ten_seconds(monkeypatch):
    now_s = 1000.0
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now_s)
    folder, screen = StageFolder(f"memory://{uuid.uuid4().hex}"), Screen()
    view = jobs._MetricsView(folder, 9, screen, "val_bpb", progress_line)
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
    monkeypatch.setattr(jobs, "ray_context", lambda progress, cluster: RunContext(progress=progress))
    monkeypatch.setattr("nanochat.data.tokenizer.REFERENCE_ENCODINGS", ())  # they would be downloaded

    def run():
        screen = Screen()
        packed = jobs.prepare_data(
            str(tmp_path / "run"), CorpusConfig(corpus=f"{tiny_run.parent}/text_*.jsonl"),
            TokenizerConfig(vocab_size=300), ShardsConfig(sequence_len=64), None, ClusterConfig(), screen,
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


@pytest.mark.parametrize(
    ("sft", "character"),
    [
        ({"mixture": ["arithmetic", "identity"], "identity": "me.toml"}, "me.toml"),
        ({"mixture": ["identity=you.toml*3"], "identity": None}, "you.toml"),
        ({"mixture": ["identity*3"], "identity": None}, None),
        ({"mixture": ["arithmetic=x"], "identity": "me.toml"}, None),
        (None, None),
    ],
)
def test_the_character_that_was_trained_is_found(tmp_path, monkeypatch, sft, character):
    monkeypatch.chdir(tmp_path)
    identity = {}
    if character is not None:
        (tmp_path / character).write_text('name = "Ada"')
        identity = file_identity([character])
    if sft is not None:
        storage.write_json(f"{tmp_path}/sft/config.json", {"config": {"sft": sft}, "identity": identity})
    assert jobs.trained_character(str(tmp_path)) == character
    if character is not None:
        (tmp_path / character).write_text('name = "Bob"')
        with pytest.raises(ConfigError, match=f"identity={character}: is not what was trained any more"):
            jobs.trained_character(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "hf", "asked"),
    [
        ((), None, ["sft"]),
        (("pretrain",), None, ["pretrain"]),
        ((), "models/gpt2", []),
        (("sft",), "models/gpt2", ["sft"]),
    ],
)
def test_which_models_are_scored_and_as_whom(tmp_path, monkeypatch, names, hf, asked):
    monkeypatch.setattr(jobs, "trained_character", lambda run_dir: "me.toml")
    seen = []
    monkeypatch.setattr(jobs, "start_ray", lambda: None)
    monkeypatch.setattr(jobs, "training_gpus", lambda cluster: (0, False))
    monkeypatch.setattr(jobs, "named_model", lambda run_dir, name, note: jobs.Model(name, name))
    monkeypatch.setattr(jobs, "evaluate", lambda evaluator, run: seen.append(evaluator) or {})
    config = EvaluationConfig(models=names, hf=hf, core="bundle" if hf else None)
    jobs.evaluate_models(str(tmp_path), config, ClusterConfig(), Screen())
    assert list(seen[0].models) == [*asked, *(["hf_gpt2"] if hf else [])]
    assert seen[0].config.identity == ("me.toml" if "sft" in asked else None)


@pytest.mark.parametrize(
    ("gpus", "cluster", "actors", "expected"),
    [
        ((0, False), {}, None, (1, 0.0)),
        ((8, True), {}, None, (8, 1.0)),
        ((8, True), {}, 3, (3, 1.0)),
        ((0, True), {"num_workers": 16}, None, (16, 1.0)),
        ((0, True), {}, None, (1, 1.0)),
    ],
)
def test_who_scores(tmp_path, monkeypatch, gpus, cluster, actors, expected):
    """On GPUs where they were asked for, also if none of them is there now."""
    seen = []
    monkeypatch.setattr(jobs, "start_ray", lambda: None)
    monkeypatch.setattr(jobs, "training_gpus", lambda cluster: gpus)
    monkeypatch.setattr(jobs, "named_model", lambda run_dir, name, note: jobs.Model(name, name))
    monkeypatch.setattr(jobs, "actor_map", lambda actors, num_gpus, cluster, note: seen.append((actors, num_gpus)))
    monkeypatch.setattr(jobs, "evaluate", lambda evaluator, run: seen.append((run.local_world_size, run.use_gpu)) or {})
    config = EvaluationConfig(models=("pretrain",), actors=actors)
    jobs.evaluate_models(str(tmp_path), config, ClusterConfig(**cluster), Screen())
    assert seen == [expected, (expected[0], expected[1] > 0)]


def test_without_a_name_every_chat_model_is_scored(tmp_path):
    assert jobs.chat_models(str(tmp_path)) == ("sft",)
    storage.write_json(f"{tmp_path}/rl/config.json", {"resolved": {"base": "elsewhere/sft/checkpoints/step_000002"}})
    for name, expected in (("rl", ("elsewhere/sft/checkpoints/step_000002", "rl")), ("sft", ("sft", "rl"))):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        assert jobs.chat_models(str(tmp_path)) == expected


def test_a_damaged_checkpoint_is_passed_over_aloud_and_a_named_one_refused(tmp_path):
    said = []
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        jobs.named_model(str(tmp_path), "sft", said.append)
    for step, is_whole in ((2, True), (4, False)):
        write_checkpoint(tmp_path / "sft" / "checkpoints" / f"step_{step:06d}", is_whole)
    found = jobs.named_model(str(tmp_path), "sft", said.append)
    assert (found.name, found.checkpoint) == ("sft", f"{tmp_path}/sft/checkpoints/step_000002")
    assert len(said) == 1
    assert "step_000004" in said[0]
    with pytest.raises(CheckpointError, match=r"checkpoint=.*step_000004: .*Name pretrain, sft, rl, or a complete"):
        jobs.named_model(str(tmp_path), f"{tmp_path}/sft/checkpoints/step_000004", said.append)


def write_checkpoint(folder, is_whole: bool, **state) -> None:
    """A checkpoint of one parameter, or one with a flipped bit."""
    writer = CheckpointWriter(str(folder.parent), rank=0, world_size=1, keep=9, attempt="a")
    writer.save(int(folder.name[5:]), {"w": torch.nn.Parameter(torch.ones(3))}, {}, state)
    writer.wait()
    if not is_whole:
        file = next(folder.glob("model*.safetensors"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)


@pytest.mark.parametrize(
    ("scored_step", "is_whole", "stage", "is_started"),
    [
        (4, True, {"base_sha256": "a"}, False),
        (2, True, {"base_sha256": "a"}, True),
        (4, False, {"base_sha256": "a"}, True),
        (4, True, {"base_sha256": "b"}, True),
    ],
)
def test_what_is_done_is_not_started_again(tmp_path, scored_step, is_whole, stage, is_started):
    folder, screen, started = StageFolder(str(tmp_path)), Screen(), []
    write_checkpoint(tmp_path / "checkpoints" / "step_000004", is_whole, stage=stage, tokenizer_hash="t", more=1)
    for line in (record(3), {"step": scored_step, "val_bpb": 2.5}):
        storage.append_jsonl(folder.metrics, line)
    made_from = {"tokenizer_hash": "t", "stage": {"base_sha256": "a"}}

    def train(watch):
        started.append(watch)
        return Checkpoint(f"{tmp_path}/checkpoints/step_000004")

    checkpoint, view = jobs.watched(folder, 4, screen, train, made_from)
    assert bool(started) is is_started
    assert checkpoint.folder.endswith("step_000004")
    assert view.scored["val_bpb"] == 2.5
    shown = [("live", progress_line(record(3), 4, {"val_bpb": 2.5}))]
    assert screen.shown == [("live", "starting workers")] * is_started + shown


def test_a_ctrl_c_that_comes_in_the_last_step_stops_what_would_come_next(tmp_path):
    """The stage is done then; the line's next one was not wanted."""
    folder, screen = StageFolder(str(tmp_path)), Screen()

    def train(watch):
        os.kill(os.getpid(), signal.SIGINT)
        return Checkpoint(f"{tmp_path}/checkpoints/step_000004")

    with pytest.raises(KeyboardInterrupt):
        jobs.watched(folder, 4, screen, train, {})
    assert screen.shown[1:] == [
        ("line", "stopping after this step, with a checkpoint; press Ctrl-C again to leave at once"),
        ("line", "stopped; run the same command to go on"),
    ]


def test_the_tokenizer_of_a_model_from_elsewhere_is_its_own_runs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "tokenizer").mkdir(parents=True)
    (tmp_path / "a" / "tokenizer" / "tokenizer.json").write_text("{}")
    checkpoint = f"{tmp_path}/a/pretrain/checkpoints/step_000002"
    assert jobs.tokenizer_of(f"{tmp_path}/b", checkpoint) == f"{tmp_path}/a/tokenizer"
    (tmp_path / "b" / "tokenizer" / "tokenizer.json").write_text("{}")
    assert jobs.tokenizer_of(f"{tmp_path}/b", checkpoint) == f"{tmp_path}/b/tokenizer"
    assert jobs.tokenizer_of(f"{tmp_path}/c", "elsewhere/x/y/step_000001") == f"{tmp_path}/c/tokenizer"


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
