"""Run directories on disk and behind URIs: nothing half written is ever seen, and what was there before stays."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import uuid

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from nanochat import storage
from nanochat.errors import ConfigError, DataError
from nanochat.storage import RunFolder, StageFolder


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def put(path: str, content: bytes) -> None:
    with storage.atomic_write(path) as file:
        file.write(content)


def get(path: str) -> bytes:
    with storage.open_read(path) as file:
        return file.read()


def test_a_file_appears_when_whole_and_replaces_what_was_there(root):
    path = storage.join(root, "a", "b.bin")
    for content in (b"first", b"second, longer"):
        put(path, content)
        assert get(path) == content
        assert storage.size_bytes(path) == len(content)
    assert storage.list_names(storage.join(root, "a")) == ["b.bin"]


def test_while_it_is_written_a_file_is_not_seen(root):
    path = storage.join(root, "b.bin")
    with storage.atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        assert not storage.exists(path)
    assert storage.exists(path)


def fail_half_way(path: str, error: type[BaseException]) -> None:
    with storage.atomic_write(path) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, b"what was there"])
def test_a_failed_write_changes_nothing(root, before, error):
    path = storage.join(root, "b.bin")
    if before is not None:
        put(path, before)
    with pytest.raises(error):
        fail_half_way(path, error)
    assert storage.list_names(root) == ([] if before is None else ["b.bin"])
    assert before is None or get(path) == before


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_neither_the_file_nor_its_beginning(tmp_path, monkeypatch, step):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left") as raised:
        put(str(tmp_path / "b.bin"), b"content")
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_json_comes_back_and_nan_is_refused(root):
    path = storage.join(root, "x.json")
    value = {"a": [1, 2.5, None, True], "text": "caf\u00e9"}
    storage.write_json(path, value)
    assert storage.read_json(path) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(path, {"loss": float("nan")})
    assert storage.read_json(path) == value


def test_records_are_appended_in_order(root):
    path = storage.join(root, "new", "metrics.jsonl")
    assert storage.read_jsonl(path) == []
    records = [{"step": step, "text": "a\nb \u2028 \u00e9"} for step in range(3)]
    for record in records:
        storage.append_jsonl(path, record)
    assert storage.read_jsonl(path) == records
    assert get(path).count(b"\n") == 3


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_last_line_that_a_crash_cut_is_passed_over(tmp_path, cut):
    path = str(tmp_path / "metrics.jsonl")
    line = json.dumps({"step": 1, "x": "\u00e9" * 3}, ensure_ascii=False).encode()
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + line[:-cut])
    assert storage.read_jsonl(path) == [{"step": 0}]


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_cut_line_is_not_grown_into(tmp_path, cut):
    """What is appended after a crash stands on a line of its own, and the cut line is gone."""
    path = str(tmp_path / "metrics.jsonl")
    for before in (b'{"step": 0}\n', b""):
        (tmp_path / "metrics.jsonl").write_bytes(before + b'{"step": 1}\n'[:-cut])
        for step in (2, 3):
            storage.append_jsonl(path, {"step": step})
        assert get(path) == before + b'{"step": 2}\n{"step": 3}\n'


def test_a_damaged_line_in_the_middle_is_not_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl: line 2 is no JSON. Delete the line"):
        storage.read_jsonl(str(tmp_path / "metrics.jsonl"))


def test_folders_are_listed_and_removed(root):
    folder = storage.join(root, "tree")
    assert storage.list_names(folder) == []
    assert not storage.exists(folder)
    for name in ("b/x", "a", "c"):
        put(storage.join(folder, name), b"1")
    assert storage.list_names(folder) == ["a", "b", "c"]
    assert storage.exists(storage.join(folder, "b"))
    storage.remove(storage.join(folder, "b"))
    assert storage.list_names(folder) == ["a", "c"]
    storage.remove(folder)
    storage.remove(folder)  # nothing there: nothing to do
    assert not storage.exists(storage.join(folder, "a"))
    storage.make_folder(folder)
    storage.make_folder(folder)
    assert storage.exists(folder)


def test_checksums_are_sha256_of_bytes_and_of_canonical_json(root):
    content = bytes(range(256)) * 10_000  # more than are read at once
    path = storage.join(root, "x.bin")
    put(path, content)
    assert storage.sha256_file(path) == hashlib.sha256(content).hexdigest()
    assert storage.sha256_json({"b": 1, "a": [2]}) == hashlib.sha256(b'{"a":[2],"b":1}').hexdigest()
    assert storage.sha256_json({"a": [2], "b": 1}) == storage.sha256_json({"b": 1, "a": [2]})


def test_local_and_remote_are_told_apart(tmp_path):
    assert storage.is_local(str(tmp_path))
    assert storage.is_local(f"file://{tmp_path}")
    assert not storage.is_local("memory://x")
    assert storage.free_bytes("memory://x") is None
    free = storage.free_bytes(str(tmp_path / "not" / "there" / "yet"))
    assert free is not None
    assert free > 0


def test_a_scheme_without_a_reader_says_what_to_do():
    with pytest.raises(ConfigError, match=r"path=nosuch://x: its scheme has no reader here .* For s3://: pip install"):
        storage.exists("nosuch://x")


def test_a_password_in_an_address_is_refused_before_anybody_is_asked():
    for use in (storage.exists, storage.list_names, RunFolder):
        with pytest.raises(ConfigError, match=r"^path=s3://\*\*\*@bucket/runs: an address must not hold a user"):
            use("s3://KEY:Secret@bucket/runs")


def test_a_local_run_folder_means_the_same_in_every_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunFolder("runs/x").pretrain.root == f"{tmp_path}/runs/x/pretrain"
    assert RunFolder("runs/x").ray_log == f"{tmp_path}/runs/x/ray.log"
    assert RunFolder("memory://runs/x").root == "memory://runs/x"


def test_local_files_of_a_remote_run_lie_in_a_folder_of_this_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    own = tmp_path / ".cache" / "nanochat"
    own.mkdir(parents=True, mode=0o755)
    assert RunFolder("runs/x").tasks.endswith("/runs/x/tasks")
    assert own.stat().st_mode & 0o777 == 0o755
    assert RunFolder("memory://runs/x").tasks == f"{own}/tasks"
    assert RunFolder("memory://runs/x").ray_log == f"{own}/{os.getpid()}_ray.log"
    assert own.stat().st_mode & 0o777 == 0o700


def test_a_home_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("no folder")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(ConfigError, match=rf"^HOME: must have room for {tmp_path}/home/\.cache/nanochat \(.*"):
        _ = RunFolder("memory://runs/x").ray_log


@pytest.mark.parametrize(
    ("name", "one"),
    [
        ("s3://b/runs/x/", "s3://b/runs/x"), ("s3://b//r///x//", "s3://b/r/x"), ("s3a://b/runs/x", "s3://b/runs/x"),
        ("gcs://b/x/", "gs://b/x"), ("memory://runs//x/", "memory://runs/x"), ("hdfs:///runs/x", "hdfs:///runs/x"),
        ("simplecache::s3a://b/x/", "simplecache::s3://b/x"), ("s3://b", "s3://b"), ("/r//x/", "/r/x"), ("/", "/"),
    ],
)  # fmt: skip
def test_a_run_directory_has_one_name(name, one, monkeypatch):
    if "://" in name:
        monkeypatch.setattr(storage, "filesystem", lambda path: (MemoryFileSystem(), path))  # whatever is installed
    assert storage.absolute(name) == storage.absolute(one) == RunFolder(name).root == one


def test_a_run_directory_has_one_user_at_a_time(tmp_path):
    other = textwrap.dedent("""
        import sys
        from nanochat import errors, storage
        try:
            with storage.claimed(sys.argv[1]):
                print("claimed")
        except errors.ConfigError as err:
            print(err)
    """)

    def told() -> str:
        return subprocess.run(
            [sys.executable, "-c", other, str(tmp_path / "run")], capture_output=True, text=True, check=True
        ).stdout

    with storage.claimed(str(tmp_path / "run")):
        assert told().startswith(f"run_dir={tmp_path}/run: another command is at work in it. Wait for its end, or")
    assert told() == "claimed\n"


def test_every_path_of_a_run_lies_in_its_folder():
    run = RunFolder("memory://runs/one")
    assert run.pretrain == StageFolder("memory://runs/one/pretrain")
    assert run.pretrain.checkpoints == "memory://runs/one/pretrain/checkpoints"
    stage = run.pretrain
    paths = [run.text, run.tokenizer, run.shards, run.report, run.walk, run.summary]
    paths += [
        stage.config,
        stage.metrics,
        stage.samples,
        stage.checkpoints,
        stage.stop,
        stage.errors,
        stage.memory_limit,
    ]
    assert len(set(paths)) == len(paths)
    assert all(path.startswith("memory://runs/one/") for path in paths)
    assert storage.name_of(run.report) == "report.html"


def test_the_stop_file_is_looked_for_more_often_where_that_is_cheap(tmp_path):
    assert StageFolder(str(tmp_path)).stop_check_s < StageFolder("memory://x").stop_check_s
