"""config.json: what made an artifact, and the refusal to go on with other numbers."""

import subprocess
import uuid
from dataclasses import dataclass, fields, replace

import pytest

from nanochat import __version__, provenance, storage
from nanochat.config.corpus import CorpusConfig
from nanochat.config.identity import Identity, identity_fields, refuse_other_identity
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.shards import ShardsConfig
from nanochat.config.tokenizer import TokenizerConfig
from nanochat.errors import ConfigError
from nanochat.provenance import begin_stage, check_stage


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path) -> str:
    return str(tmp_path / "pretrain") if request.param == "local" else f"memory://{uuid.uuid4().hex}/pretrain"


CONFIG = PretrainConfig(depth=4, matrix_lr=0.02)


def test_the_record_holds_config_plan_versions_and_commit(folder):
    begin_stage(folder, {"pretrain": CONFIG}, {"num_steps": 7})
    record = storage.read_json(storage.join(folder, "config.json"))
    assert record["config"]["pretrain"]["depth"] == 4
    assert record["config"]["pretrain"]["log_every"] == 10
    assert record["resolved"] == {"num_steps": 7}
    assert record["versions"]["nanochat"] == __version__
    assert set(provenance.PACKAGES) < set(record["versions"])
    assert record["identity"]["pretrain.depth"] == 4
    assert "pretrain.log_every" not in record["identity"]
    assert record["commit"] == provenance.commit()


def test_the_same_identity_goes_on_whatever_else_changes(folder):
    begin_stage(folder, {"pretrain": CONFIG})
    begin_stage(folder, {"pretrain": replace(CONFIG, log_every=1, compile="off", micro_batch_rows=3)})
    assert storage.read_json(storage.join(folder, "config.json"))["config"]["pretrain"]["micro_batch_rows"] == 3


def test_another_identity_is_refused_with_the_difference_and_nothing_is_written(folder):
    begin_stage(folder, {"pretrain": CONFIG})
    before = storage.read_json(storage.join(folder, "config.json"))
    with pytest.raises(ConfigError) as raised:
        begin_stage(folder, {"pretrain": replace(CONFIG, depth=6, matrix_lr=0.03, log_every=1)})
    assert str(raised.value) == (
        f"pretrain.depth=6 (was 4), pretrain.matrix_lr=0.03 (was 0.02): {folder} holds a run with other values. "
        "Use the old values to resume it. To start anew delete that folder, or use another --run-dir "
        "(make: RUN_DIR=...)."
    )
    assert storage.read_json(storage.join(folder, "config.json")) == before


def test_a_field_that_came_or_went_is_a_difference():
    with pytest.raises(ConfigError, match=r"a=1 \(was None\), b=None \(was 2\): X holds"):
        refuse_other_identity({"b": 2}, {"a": 1}, "X")
    refuse_other_identity({"a": 1}, {"a": 1}, "X")


def test_identity_is_what_is_marked():
    @dataclass(frozen=True)
    class Small:
        one: Identity[int] = 1
        two: int = 2
        three: Identity[str | None] = None

    Small.__annotations__ = {"one": Identity[int], "two": int, "three": Identity[str | None]}
    assert identity_fields(Small()) == {"one": 1, "three": None}


CADENCE = {
    "compile", "micro_batch_rows", "recompute", "evaluate_every", "sample_every", "sample_tokens", "checkpoint_every",
    "node_failure_s", "keep_checkpoints", "log_every", "log_row_ids", "wandb",
}  # fmt: skip


def test_all_that_changes_the_numbers_of_pretraining_is_identity():
    assert {field.name for field in fields(PretrainConfig)} - set(identity_fields(CONFIG)) == CADENCE


@pytest.mark.parametrize(
    ("config", "cadence"),
    [(CorpusConfig(), {"max_bytes", "mirror"}), (TokenizerConfig(), set()), (ShardsConfig(), set())],
    ids=lambda value: type(value).__name__,
)
def test_all_that_changes_the_rows_is_identity(config, cadence):
    assert {field.name for field in fields(config)} - set(identity_fields(config)) == cadence


def test_checking_a_stage_writes_nothing(folder):
    identity = check_stage(folder, {"pretrain": CONFIG})
    assert identity["pretrain.depth"] == 4
    assert not storage.exists(storage.join(folder, "config.json"))
    begin_stage(folder, {"pretrain": CONFIG})
    with pytest.raises(ConfigError, match="depth"):
        check_stage(folder, {"pretrain": replace(CONFIG, depth=6)})


def test_a_stage_is_not_resumed_with_other_files(folder, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("a")
    begin_stage(folder, {"pretrain": CONFIG}, files=[str(file)])
    check_stage(folder, {"pretrain": CONFIG}, [str(file)])
    file.write_text("b")
    with pytest.raises(ConfigError, match=r"sha256 of .*chats\.jsonl='.*' \(was '"):
        check_stage(folder, {"pretrain": CONFIG}, [str(file)])


def test_the_commit_says_whether_the_tree_was_changed(tmp_path, monkeypatch):
    package = tmp_path / "nanochat"
    package.mkdir()
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.commit() is None

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    (tmp_path / "file").write_text("1")
    git("init")
    git("add", "file")
    git("commit", "-m", "first")
    clean = provenance.commit()
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "other").write_text("untracked files do not count")
    assert provenance.commit() == clean
    (tmp_path / "file").write_text("2")
    assert provenance.commit() == clean + "+"


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() is None


@pytest.mark.parametrize("field", ["corpus", "mirror"])
def test_a_password_in_an_address_comes_into_no_record(folder, field):
    config = CorpusConfig(**{field: "https://me:Secret@example.org/x"})
    for start in (check_stage, begin_stage):
        with pytest.raises(ConfigError, match=rf"^{field}=https://\*\*\*@example\.org/x: an address must not hold"):
            start(folder, {"shards": ShardsConfig(), "corpus": config})
    assert storage.list_names(folder) == []
