"""A run directory to a folder of Hugging Face by its job, and back into another run; nothing that is there is lost."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from tiny_chat_run import write_tiny_chat_run

import nanochat
from nanochat import storage
from nanochat.cluster.terminal import Terminal
from nanochat.config.exchange import ExportConfig, ImportConfig
from nanochat.exchange import hf_folder
from nanochat.exchange.hf_folder import UNFINISHED, export_checkpoint
from nanochat.exchange.hf_model import is_vocabulary
from nanochat.exchange.import_run import read_source, write_run
from nanochat.training.checkpoint import named_checkpoint

WRITTEN = {
    "README.md", "SHA256SUMS", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
    "modeling_nanochat.py", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
JOB = Path(nanochat.__file__).parent.parent / "ray_jobs" / "export.py"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_tiny_chat_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def run_dir(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def config_for(run_dir: Path, folder: Path, **changes: str) -> ExportConfig:
    return ExportConfig(run_dir=str(run_dir), output=str(folder), **changes)


def exported_by_the_job(config: ExportConfig, monkeypatch) -> tuple[int, list[str]]:
    """Return the job's exit status and the lines that it said."""
    lines: list[str] = []
    monkeypatch.setattr(Terminal, "line", lambda self, line: lines.append(line))
    spec = importlib.util.spec_from_file_location("export_job", JOB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.export(config), lines


def test_the_job_writes_a_folder_that_comes_back_bit_for_bit(run_dir, tmp_path, monkeypatch):
    folder = tmp_path / "deep" / "hf"
    code, lines = exported_by_the_job(config_for(run_dir, folder), monkeypatch)
    assert (code, lines) == (0, [f"exported   {folder}; its README.md is the model card, and says how others load it"])
    assert set(storage.list_names(str(folder))) == WRITTEN
    source = ImportConfig(source=str(folder), run_dir=str(tmp_path / "back"))
    back = write_run(read_source(source), source, lambda line: None)
    was = named_checkpoint(str(run_dir), "sft", pytest.fail)
    assert back.is_chat
    assert back.state["model"] == was.state["model"]
    tensors, vocabulary = back.model_tensors(), was.state["model"]["vocab_size"]
    for name, expected in was.model_tensors().items():
        rows = vocabulary if is_vocabulary(name) else len(expected)
        assert torch.equal(tensors[name][:rows], expected[:rows]), name
        assert not tensors[name][rows:].any(), "rows that pad the vocabulary stay here"


def test_an_export_that_was_ended_is_done_again(run_dir, tmp_path, monkeypatch):
    folder = tmp_path / "hf"

    def ended(*_):
        (folder / "model.safetensors.0a1b2c3d.partial").write_bytes(b"cut sho")  # as kill -9 leaves it
        assert (folder / "chat_template.jinja").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hf_folder, "write_model", ended)
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(config_for(run_dir, folder), pytest.fail)
    assert not (folder / "config.json").exists()
    assert (folder / UNFINISHED).exists()
    export_checkpoint(config_for(run_dir, folder), pytest.fail)
    assert set(storage.list_names(str(folder))) == WRITTEN
    again, fresh = (ImportConfig(source=str(one), run_dir="unused") for one in (folder, tmp_path / "fresh"))
    export_checkpoint(config_for(run_dir, tmp_path / "fresh"), pytest.fail)
    assert read_source(again).weights_sha256 == read_source(fresh).weights_sha256


def test_nothing_of_an_export_that_was_ended_is_left_beside_another_model(run_dir, tmp_path, monkeypatch):
    folder = tmp_path / "hf"
    for name in WRITTEN | {"notes.txt"}:
        storage.write_json(str(folder / name), {"of": "another"})
    storage.write_json(str(folder / f"{UNFINISHED}.0a1b2c3d.partial"), {})  # as kill -9 leaves it at its first moment

    def stops(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_folder, "write_folder", stops)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(config_for(run_dir, folder), pytest.fail)
    assert set(storage.list_names(str(folder))) == {UNFINISHED, "notes.txt"}


@pytest.mark.parametrize("there", ["config.json", "thesis.txt", "README.md", "model.safetensors", "x.partial"])
def test_a_folder_that_holds_something_else_is_refused_and_keeps_it(run_dir, tmp_path, there, monkeypatch, capsys):
    folder = tmp_path / "hf"
    storage.write_json(str(folder / there), {"dear": "to me"})
    assert exported_by_the_job(config_for(run_dir, folder), monkeypatch) == (2, [])
    assert f"ConfigError: output={folder}: holds {there} already. Name another" in capsys.readouterr().err
    assert storage.list_names(str(folder)) == [there]
    assert storage.read_json(str(folder / there)) == {"dear": "to me"}


def test_what_cannot_be_exported_is_refused_before_anything_is_written(run_dir, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "hf"
    assert exported_by_the_job(config_for(run_dir, folder, model="rl"), monkeypatch)[0] == 2
    assert "CheckpointError: " in capsys.readouterr().err
    monkeypatch.setattr(hf_folder, "config_of", lambda *_: hf_folder.ModelConfig(smear=True))
    assert exported_by_the_job(config_for(run_dir, folder), monkeypatch)[0] == 2
    assert "ConfigError: smear=True: " in capsys.readouterr().err
    assert not folder.exists()


def test_a_disk_that_is_full_ends_in_one_line(run_dir, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_folder, "write_model", full)
    assert exported_by_the_job(config_for(run_dir, tmp_path / "hf"), monkeypatch) == (2, [])
    assert "hf: cannot be written ([Errno 28] No space left on device). Make room there and" in capsys.readouterr().err
