"""A training state to files and back: written in the background, verified, loadable on any number of workers.

`checkpoints/step_000123/` holds model.safetensors and state.json (worker 0), optimizer_RR_of_WW.safetensors (every
worker its own pieces), and checksums_RR_of_WW.json, which each worker writes after its files. The checkpoint exists if
and only if the checksum files of all workers are there, verify, and name the same attempt (start of a worker group) as
state.json: this is the only source of truth, so a kill at any moment leaves either a whole checkpoint of one attempt
or one that is passed over. Saving copies the tensors and returns; a thread writes.

Not covered: sharded model weights (every worker has them all).
"""

import errno
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from nanochat import storage
from nanochat.config.model import ModelConfig
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import CheckpointError, TokenizerMismatchError
from nanochat.storage import RunFolder, StageFolder

FORMAT_VERSION = 1
STAGES = ("pretrain", "sft", "rl")
"""What a model can be named by: the folders of a run directory that hold checkpoints."""
_STEP_FOLDER = re.compile(r"step_(\d{6,})$")


def step_folder(checkpoints: str, step: int) -> str:
    """Return the folder of a step's checkpoint."""
    return storage.join(checkpoints, f"step_{step:06d}")


def steps_found(checkpoints: str) -> list[int]:
    """Return the steps that have a folder, complete or not, oldest first."""
    matches = (_STEP_FOLDER.search(name) for name in storage.list_names(checkpoints))
    return sorted(int(match.group(1)) for match in matches if match)


def problem_with(folder: str, verify: bool = True) -> str | None:
    """Return why a folder is no complete checkpoint, or None; `verify` reads every byte, else only names count."""
    names = set(storage.list_names(folder))
    if "state.json" not in names:
        return "state.json is missing"
    try:
        state = storage.read_json(storage.join(folder, "state.json"))
        world_size = int(state["world_size"])
        if world_size < 1:
            return f"state.json is damaged: world_size is {world_size}"
        for rank in range(world_size):
            checksums = f"checksums_{rank:02d}_of_{world_size:02d}.json"
            if checksums not in names:
                return f"{checksums} is missing"
            written = storage.read_json(storage.join(folder, checksums))
            if written["attempt"] != state["attempt"]:
                return f"{checksums} is of another attempt than state.json"
            for name in _files_of(rank, world_size):
                sha256 = written["sha256"][name]
                if name not in names:
                    return f"{name} is missing"
                if verify and storage.sha256_file(storage.join(folder, name)) != sha256:
                    return f"{name} is damaged: its checksum differs"
    except FileNotFoundError as err:
        return f"it is being deleted ({err})"
    except OSError as err:
        return f"it cannot be read ({err})"
    except (ValueError, KeyError, TypeError) as err:
        return f"its JSON is damaged ({err!r})"
    return None


def _files_of(rank: int, world_size: int) -> list[str]:
    """Return the files that a worker writes before its checksums."""
    files = [f"optimizer_{rank:02d}_of_{world_size:02d}.safetensors"]
    return [*files, "model.safetensors", "state.json"] if rank == 0 else files


def newest_checkpoint(checkpoints: str, passed_over: Callable[[str], None]) -> int | None:
    """Return the step of the newest checkpoint that verifies; `passed_over` is told each newer one and why."""
    for step in reversed(steps_found(checkpoints)):
        folder = step_folder(checkpoints, step)
        problem = problem_with(folder)
        if problem is None:
            return step
        passed_over(f"checkpoint {folder} is passed over: {problem}")
    return None


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on storage."""

    folder: str

    @property
    def state(self) -> dict[str, Any]:
        """What state.json holds: step, position, hashes, model config, loop state.

        Raises: CheckpointError if there is none or its format is another.
        """
        path = storage.join(self.folder, "state.json")
        if not storage.exists(path):
            raise CheckpointError(f"checkpoint={self.folder}: has no state.json. Name a complete step_ folder.")
        state = storage.read_json(path)
        if state.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint={self.folder}: has format {state.get('format_version')}, not {FORMAT_VERSION}. "
                "Use the version of the code that wrote it."
            )
        return state

    @property
    def weights_sha256(self) -> str:
        """The hash of the model's weights, as the first worker's checksums have it."""
        path = storage.join(self.folder, f"checksums_00_of_{self.state['world_size']:02d}.json")
        return storage.read_json(path)["sha256"]["model.safetensors"]

    @property
    def is_chat(self) -> bool:
        """Whether the model was fine-tuned on conversations."""
        return "base_sha256" in self.state["stage"]

    @property
    def generation(self) -> dict[str, float]:
        """Sampling parameters where a request names none."""
        return self.state.get("generation", {})

    def model_tensors(self) -> dict[str, Tensor]:
        """Return the parameters by name, on CPU."""
        return _load_file(storage.join(self.folder, "model.safetensors"))

    def optimizer_tensors(self, wanted: dict[str, Tensor]) -> None:
        """Fill optimiser state `PARAMETER/KIND/LO/HI` in place from the pieces of all workers that wrote it."""
        world_size = int(self.state["world_size"])
        filled = dict.fromkeys(wanted, 0)
        for rank in range(world_size):
            pieces = _load_file(storage.join(self.folder, f"optimizer_{rank:02d}_of_{world_size:02d}.safetensors"))
            for key, piece in pieces.items():
                name, kind, lo, hi = _parse(key)
                for target, tensor in wanted.items():
                    target_name, target_kind, target_lo, target_hi = _parse(target)
                    first, last = max(lo, target_lo), min(hi, target_hi)
                    if (name, kind) == (target_name, target_kind) and first < last:
                        tensor[first - target_lo : last - target_lo].copy_(piece[first - lo : last - lo])
                        filled[target] += last - first
        for target, rows in filled.items():
            if rows != wanted[target].shape[0]:
                raise CheckpointError(
                    f"checkpoint={self.folder}: lacks optimiser state {target}. Use another checkpoint."
                )


def newest_of(stage: StageFolder, note: Callable[[str], None]) -> Checkpoint:
    """Return a stage's newest complete checkpoint. Raises: CheckpointError if there is none."""
    step = newest_checkpoint(stage.checkpoints, passed_over=note)
    if step is None:
        raise CheckpointError(
            f"run_dir: {stage.root} has no complete checkpoint. Train that stage first, name another --run-dir, or "
            "where the command takes one the step_ folder of a checkpoint."
        )
    return Checkpoint(step_folder(stage.checkpoints, step))


def named_checkpoint(run_dir: str, name: str, note: Callable[[str], None]) -> Checkpoint:
    """Return the newest checkpoint of a stage, or the one in the folder of that path; `note` hears of damaged ones.

    Raises: CheckpointError if there is none, or it is not complete.
    """
    if name in STAGES:
        return newest_of(getattr(RunFolder(run_dir), name), note)
    path = storage.absolute(name).rstrip("/")
    if (problem := problem_with(path)) is not None:
        raise CheckpointError(f"checkpoint={name}: {problem}. Name {', '.join(STAGES)}, or a complete step_ folder.")
    return Checkpoint(path)


def config_of(checkpoint: Checkpoint, tokenizer: Tokenizer) -> ModelConfig:
    """Return a checkpoint's model config. Raises: TokenizerMismatchError if it was trained with another tokenizer."""
    state = checkpoint.state
    if state["tokenizer_hash"] != tokenizer.hash:
        raise TokenizerMismatchError(
            f"checkpoint={checkpoint.folder}: was trained with another tokenizer. Use it in its own run directory."
        )
    return ModelConfig(**state["model"])


def tokenizer_of(run_dir: str, checkpoint: str) -> str:
    """Return the run directory's tokenizer folder, or if it has none that of the checkpoint's run directory."""
    own, beside = RunFolder(run_dir).tokenizer, storage.join(checkpoint.rsplit("/", 3)[0], "tokenizer")
    has_none = not storage.exists(storage.join(own, "tokenizer.json"))
    return beside if has_none and storage.exists(storage.join(beside, "tokenizer.json")) else own


class CheckpointWriter:
    """Writes one worker's part of checkpoints in the background, one at a time.

    `attempt` names this start of the worker group, the same on all its workers.
    """

    def __init__(self, checkpoints: str, *, rank: int, world_size: int, keep: int, attempt: str) -> None:
        self.checkpoints, self.rank, self.world_size, self.keep = checkpoints, rank, world_size, keep
        self.attempt = attempt
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Copy this worker's tensors and write them in a thread; waits for the previous write first.

        Raises: whatever the previous write failed with.
        """
        self.wait()
        model_copy = _copy(model) if self.rank == 0 else {}
        arguments = (step, model_copy, _copy(optimizer), state)
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises: what the write failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]) -> None:
        try:
            self._write(step, model, optimizer, state)
            if self.rank == 0:
                self._prune(step)
        except BaseException as err:  # handed to the training thread by wait()
            self._error = self._explained(err)

    def _explained(self, err: BaseException) -> BaseException:
        """Return what another try would not mend as an error that says so."""
        if not isinstance(err, OSError) or err.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            return err
        free = storage.free_bytes(self.checkpoints)
        explained = CheckpointError(
            f"checkpoints={self.checkpoints}: cannot be written ({err.strerror}; {free} bytes are free there). "
            "Make room and run the same command again."
        )
        explained.__cause__ = err
        return explained

    def _write(self, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]) -> None:
        folder = step_folder(self.checkpoints, step)
        part = f"{self.rank:02d}_of_{self.world_size:02d}"
        _save_file(storage.join(folder, f"optimizer_{part}.safetensors"), optimizer)
        if self.rank == 0:
            _save_file(storage.join(folder, "model.safetensors"), model)
            stamp = {"format_version": FORMAT_VERSION, "world_size": self.world_size, "attempt": self.attempt}
            storage.write_json(storage.join(folder, "state.json"), stamp | {"step": step} | state)
        sha256 = {
            name: storage.sha256_file(storage.join(folder, name)) for name in _files_of(self.rank, self.world_size)
        }
        storage.write_json(storage.join(folder, f"checksums_{part}.json"), {"attempt": self.attempt, "sha256": sha256})

    def _prune(self, newest: int) -> None:
        """Delete what is older than the newest `keep` complete checkpoints before `newest`, whole or not.

        What is incomplete but newer than those stays for now: another worker may still be writing it.
        """
        older = [step for step in steps_found(self.checkpoints) if step < newest]
        complete = [step for step in older if problem_with(step_folder(self.checkpoints, step), verify=False) is None]
        for step in [step for step in older if step < min(complete[-self.keep :], default=0)]:
            folder = step_folder(self.checkpoints, step)
            for name in storage.list_names(folder):
                if name.startswith("checksums_"):
                    storage.remove(storage.join(folder, name))
            storage.remove(folder)


def _parse(key: str) -> tuple[str, str, int, int]:
    name, kind, lo, hi = key.rsplit("/", 3)
    return name, kind, int(lo), int(hi)


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _save_file(path: str, tensors: dict[str, Tensor]) -> None:
    with storage.atomic_write(path) as file:
        file.write(save(tensors))


def _load_file(path: str) -> dict[str, Tensor]:
    try:
        if storage.is_local(path):
            with safe_open(storage.filesystem(path)[1], framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        with storage.open_read(path) as remote:
            return load(remote.read())
    except (SafetensorError, FileNotFoundError) as err:
        raise CheckpointError(f"checkpoint={path}: cannot be read ({err}). Use another checkpoint.") from err


def load_parameters(model: torch.nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy parameters into a model. Raises: CheckpointError naming what is missing, unexpected or of another shape."""
    parameters = dict(model.named_parameters())
    wrong = sorted(
        name
        for name in parameters.keys() | tensors.keys()
        if name not in parameters or name not in tensors or parameters[name].shape != tensors[name].shape
    )
    if wrong:
        raise CheckpointError(
            f"checkpoint={source}: does not fit the model in {', '.join(wrong[:5])}. Check its config."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
