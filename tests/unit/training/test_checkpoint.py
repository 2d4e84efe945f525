"""Checkpoints: written whole or not at all, found newest first, kept in number, loaded on other numbers of workers."""

import builtins
import errno
import threading
import uuid
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanochat import storage
from nanochat.errors import CheckpointError
from nanochat.training.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    load_parameters,
    newest_checkpoint,
    problem_with,
    step_folder,
    steps_found,
)


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path) -> str:
    return str(tmp_path / "checkpoints") if request.param == "local" else f"memory://{uuid.uuid4().hex}/checkpoints"


def tensors(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {"w": torch.randn(6, 4, generator=draw), "b": torch.randn(3, generator=draw).to(torch.bfloat16)}


def rows_of(full: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """Cut each tensor by rows as an optimiser of `world_size` workers would name its state."""
    pieces = {}
    for name, tensor in full.items():
        lo, hi = (len(tensor) * worker // world_size for worker in (rank, rank + 1))
        pieces[f"{name}/exp_avg/{lo}/{hi}"] = tensor[lo:hi]
    return pieces


def write(root: str, step: int, world_size: int = 1, keep: int = 2, attempt: str = "first") -> str:
    for rank in range(world_size):
        writer = CheckpointWriter(root, rank=rank, world_size=world_size, keep=keep, attempt=attempt)
        writer.save(step, tensors(step), rows_of(tensors(100 + step), rank, world_size), {"loop": {"x": step}})
        writer.wait()
    return step_folder(root, step)


def test_what_was_written_comes_back(root):
    checkpoint = Checkpoint(write(root, 7))
    assert problem_with(checkpoint.folder) is None
    assert checkpoint.state == {
        "format_version": 1, "world_size": 1, "attempt": "first", "step": 7, "loop": {"x": 7},
    }  # fmt: skip
    loaded = checkpoint.model_tensors()
    assert loaded.keys() == tensors(7).keys()
    for name, tensor in tensors(7).items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert checkpoint.folder.endswith("/step_000007")


def test_a_step_beyond_six_digits_sorts_by_number(root):
    for step in (999_999, 1_000_000, 2):
        write(root, step)
    assert steps_found(root) == [2, 999_999, 1_000_000]
    assert newest_checkpoint(root, pytest.fail) == 1_000_000


@pytest.mark.parametrize("wrote", [1, 2, 4])
@pytest.mark.parametrize("reads", [1, 2, 3])
def test_optimizer_state_loads_on_another_number_of_workers(root, wrote, reads):
    checkpoint = Checkpoint(write(root, 3, world_size=wrote))
    for rank in range(reads):
        expected = rows_of(tensors(103), rank, reads)
        wanted = {key: torch.full_like(tensor, float("nan")) for key, tensor in expected.items()}
        checkpoint.optimizer_tensors(wanted)
        for key, tensor in expected.items():
            assert torch.equal(wanted[key], tensor), key


def test_optimizer_state_that_is_not_there_is_an_error(root):
    checkpoint = Checkpoint(write(root, 3))
    with pytest.raises(CheckpointError, match=r"lacks optimiser state w/momentum/0/6. Use another checkpoint"):
        checkpoint.optimizer_tensors({"w/momentum/0/6": torch.zeros(6, 4)})
    with pytest.raises(CheckpointError, match="lacks optimiser state"):
        checkpoint.optimizer_tensors({"w/exp_avg/0/8": torch.zeros(8, 4)})


NAMES = [
    "checksums_00_of_02.json",
    "checksums_01_of_02.json",
    "model.safetensors",
    "optimizer_00_of_02.safetensors",
    "optimizer_01_of_02.safetensors",
    "state.json",
]


def test_the_files_of_a_checkpoint(root):
    assert storage.list_names(write(root, 3, world_size=2)) == NAMES


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "partial":  # killed before the rename
        path.rename(path.with_name(path.name + ".0123abcd.partial"))
    else:
        at = len(content) * int(how) // 8
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def test_parts_of_two_attempts_are_no_checkpoint(tmp_path):
    """Worker 1 finished, worker 0 died; in the next attempt worker 0 has finished and worker 1 has not."""
    folder = write(str(tmp_path), 6, world_size=2, attempt="first")
    again = CheckpointWriter(str(tmp_path), rank=0, world_size=2, keep=2, attempt="second")
    again._write(6, tensors(7), rows_of(tensors(107), 0, 2), {})
    assert problem_with(folder) == "checksums_01_of_02.json is of another attempt than state.json"
    assert problem_with(folder, verify=False) is not None
    other = CheckpointWriter(str(tmp_path), rank=1, world_size=2, keep=2, attempt="second")
    other._write(6, {}, rows_of(tensors(107), 1, 2), {})
    assert problem_with(folder) is None


def test_a_checksum_file_that_names_nothing_is_a_problem(tmp_path):
    folder = write(str(tmp_path), 3)
    for content in ("{}", "[]", '{"attempt": "first", "sha256": {}}', '{"attempt": "first", "sha256": []}'):
        Path(folder, "checksums_00_of_01.json").write_text(content)
        assert "damaged" in str(problem_with(folder)), content


@pytest.mark.parametrize("how", ["removed", "empty", "cut", "partial", "0", "3", "7"])
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_checkpoint_is_passed_over_and_the_previous_one_used(tmp_path, name, how):
    write(str(tmp_path), 3)
    folder = write(str(tmp_path), 6, world_size=2)
    damage(Path(folder) / name, how)
    notes: list[str] = []
    assert newest_checkpoint(str(tmp_path), notes.append) == 3
    assert len(notes) == 1
    assert notes[0].startswith(f"checkpoint {folder} is passed over: ")
    if how in ("removed", "partial"):
        assert notes[0].endswith(f"{name} is missing")
    elif name.endswith(".safetensors"):
        assert notes[0].endswith(f"{name} is damaged: its checksum differs")


def test_no_flipped_bit_of_the_small_files_goes_unseen(tmp_path):
    folder = Path(write(str(tmp_path), 3))
    for name, stride in (("state.json", 1), ("checksums_00_of_01.json", 13)):
        content = (folder / name).read_bytes()
        for position in range(0, len(content) * 8, stride):
            flipped = bytearray(content)
            flipped[position // 8] ^= 1 << position % 8
            (folder / name).write_bytes(flipped)
            if problem_with(str(folder)) is None:
                # Only white space may change without harm, and only in the file that holds the checksums.
                assert name.startswith("checksums"), position
                assert bytes(flipped).split() == content.split(), position
        (folder / name).write_bytes(content)
    assert problem_with(str(folder)) is None


@pytest.mark.parametrize("number", range(6))
def test_a_kill_between_two_files_leaves_the_previous_checkpoint(tmp_path, monkeypatch, number):
    """Every rename of a checkpoint of two workers may be the last thing that happens."""
    root = str(tmp_path)
    write(root, 3, world_size=2)
    replace, done = storage.os.replace, []

    def replace_or_die(source, target):
        if len(done) == number:
            raise KeyboardInterrupt  # no handler may make it good
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", replace_or_die)
    with pytest.raises(KeyboardInterrupt):
        write(root, 6, world_size=2)
    monkeypatch.undo()
    assert problem_with(step_folder(root, 6)) is not None
    assert newest_checkpoint(root, lambda note: None) == 3
    write(root, 6, world_size=2)
    assert newest_checkpoint(root, pytest.fail) == 6


def test_without_any_checkpoint_there_is_none(root):
    assert newest_checkpoint(root, pytest.fail) is None
    with pytest.raises(CheckpointError, match=r"has no state.json. Name a complete step_ folder"):
        _ = Checkpoint(step_folder(root, 1)).state


def test_another_format_is_refused(tmp_path):
    folder = write(str(tmp_path), 1)
    state = storage.read_json(f"{folder}/state.json")
    storage.write_json(f"{folder}/state.json", state | {"format_version": 99})
    with pytest.raises(CheckpointError, match=r"has format 99, not 1\. Use the version of the code"):
        _ = Checkpoint(folder).state


def test_files_that_vanish_or_are_cut_are_checkpoint_errors(root):
    checkpoint = Checkpoint(write(root, 1))
    path = storage.join(checkpoint.folder, "model.safetensors")
    with storage.open_read(path) as file:
        content = file.read()
    with storage.atomic_write(path) as file:
        file.write(content[:-8])
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read .* Use another checkpoint"):
        checkpoint.model_tensors()
    storage.remove(path)
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read"):
        checkpoint.model_tensors()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_whole_checkpoints_are_kept(root, keep):
    for step in range(1, 7):
        write(root, step, keep=keep)
    assert steps_found(root) == list(range(6 - keep, 7))


def test_damaged_leftovers_do_not_count_as_kept_and_go_when_they_are_old(tmp_path):
    root = str(tmp_path)
    for step in (1, 2, 3):
        write(root, step, keep=9)
    for step in (2, 3):
        (Path(step_folder(root, step)) / "checksums_00_of_01.json").unlink()
    write(root, 4, keep=1)
    assert steps_found(root) == [1, 2, 3, 4]
    write(root, 5, keep=1)
    assert steps_found(root) == [4, 5]


def test_a_checkpoint_that_another_worker_still_writes_is_not_deleted(tmp_path):
    """The first worker may be a checkpoint ahead of a slow one."""
    root = str(tmp_path)
    for step in (1, 2):
        write(root, step, world_size=2, keep=1)
    for step in (3, 4):
        CheckpointWriter(root, rank=0, world_size=2, keep=1, attempt="first")._run(step, tensors(step), {}, {})
    slow = CheckpointWriter(root, rank=1, world_size=2, keep=1, attempt="first")
    slow.save(3, {}, {}, {})
    slow.wait()
    assert newest_checkpoint(root, lambda note: None) == 3


def test_a_checkpoint_that_goes_while_it_is_looked_at_is_none(root, monkeypatch):
    folder = write(root, 3)
    read_json = storage.read_json

    def gone(path: str):
        storage.remove(folder)
        return read_json(path)

    monkeypatch.setattr(storage, "read_json", gone)
    assert str(problem_with(folder)).startswith("it is being deleted")


def test_deleting_begins_with_the_checksums(tmp_path, monkeypatch):
    """A kill in the middle of a deletion must not leave something that looks whole."""
    root = str(tmp_path)
    for step in (1, 2, 3):
        write(root, step, keep=9)
    removed: list[str] = []
    monkeypatch.setattr(storage, "remove", removed.append)
    write(root, 4, keep=2)
    assert [storage.name_of(path) for path in removed] == ["checksums_00_of_01.json", "step_000001"]


def test_saving_copies_at_once_and_writes_in_the_background(root, monkeypatch):
    may_write = threading.Event()
    write_tensors = CheckpointWriter._write

    def slowly(self, *arguments):
        assert may_write.wait(10)
        write_tensors(self, *arguments)

    monkeypatch.setattr(CheckpointWriter, "_write", slowly)
    weights, state = {"w": torch.ones(4)}, {"w/exp_avg/0/4": torch.ones(4)}
    writer = CheckpointWriter(root, rank=0, world_size=1, keep=2, attempt="first")
    writer.save(5, weights, state, {})
    assert not storage.exists(step_folder(root, 5))
    weights["w"].zero_()
    state["w/exp_avg/0/4"].zero_()
    may_write.set()
    writer.wait()
    checkpoint = Checkpoint(step_folder(root, 5))
    assert torch.equal(checkpoint.model_tensors()["w"], torch.ones(4))
    wanted = {"w/exp_avg/0/4": torch.zeros(4)}
    checkpoint.optimizer_tensors(wanted)
    assert torch.equal(wanted["w/exp_avg/0/4"], torch.ones(4))


class _FullDisk:
    """`open` as on a disk that has room for a number of bytes."""

    def __init__(self, room_bytes: int) -> None:
        self.room_bytes = room_bytes

    def __call__(self, path, mode="r", *arguments, **named):
        file = builtins.open(path, mode, *arguments, **named)
        if "w" in mode:
            write = file.write

            def write_if_room(content: bytes) -> int:
                self.room_bytes -= len(content)
                if self.room_bytes < 0:
                    write(content[: self.room_bytes])
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(content)

            return _Writer(file, write_if_room)
        return file


class _Writer:
    def __init__(self, file, write) -> None:
        self.file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room_bytes", [0, 200, 400, 600])
def test_a_full_disk_surfaces_and_leaves_the_previous_checkpoint(tmp_path, monkeypatch, room_bytes):
    root = str(tmp_path)
    write(root, 3)
    writer = CheckpointWriter(root, rank=0, world_size=1, keep=2, attempt="first")
    monkeypatch.setattr(storage, "open", _FullDisk(room_bytes), raising=False)
    writer.save(6, tensors(6), rows_of(tensors(106), 0, 1), {})
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device; \d+ bytes .* Make room"):
        writer.wait()
    monkeypatch.undo()
    assert newest_checkpoint(root, lambda note: None) == 3
    assert not any(name.endswith(".partial") for name in storage.list_names(step_folder(root, 6)))
    writer.wait()  # an error is raised once
    writer.save(6, tensors(6), rows_of(tensors(106), 0, 1), {})
    writer.wait()
    assert newest_checkpoint(root, pytest.fail) == 6


def test_the_next_save_raises_what_the_last_one_failed_with(root, monkeypatch):
    writer = CheckpointWriter(root, rank=0, world_size=1, keep=2, attempt="first")
    writer.save(1, {}, {}, {"loss": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.save(2, {}, {}, {})
    assert newest_checkpoint(root, lambda note: None) is None


def test_parameters_are_copied_and_what_does_not_fit_is_named():
    layer = torch.nn.Linear(3, 2)
    fits = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    load_parameters(layer, fits, "X")
    assert torch.equal(layer.weight, fits["weight"])
    for wrong, name in (
        ({"weight": fits["weight"]}, "bias"),
        (fits | {"more": torch.ones(1)}, "more"),
        (fits | {"weight": torch.ones(3, 2)}, "weight"),
    ):
        with pytest.raises(CheckpointError, match=f"checkpoint=X: does not fit the model in {name}. Check its config"):
            load_parameters(layer, wrong, "X")
    assert torch.equal(layer.weight, fits["weight"])
