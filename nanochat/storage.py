"""Where everything lies: run directories, atomic writes, checksums; local paths and URIs through fsspec.

A reader never sees half a file: local files are written beside their place, flushed to disk and renamed; for object
stores they are uploaded when whole, and those publish an object only when its upload is complete. Every path of the
project is built here.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import fsspec
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem

from nanochat.errors import ConfigError, DamagedFileError, excerpt, refuse_credentials

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"})


def join(root: str, *parts: str) -> str:
    """Join path parts below a local path or a URI."""
    return "/".join([root.rstrip("/"), *parts])


def name_of(path: str) -> str:
    """Return the last part of a path or URI."""
    return PurePosixPath(path).name


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the filesystem of a path or URI and the path within it.

    Raises: ConfigError if the URI's scheme needs a package that is not installed, or if a password stands in the URI.
    """
    refuse_credentials(path=path)
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as err:
        remedy = "For s3://: pip install -c constraints.txt -e '.[cloud]'"
        raise ConfigError(f"path={path}: its scheme has no reader here ({err}). {remedy}") from err


def is_local(path: str) -> bool:
    """Tell whether a path lies on this machine's filesystem."""
    return isinstance(filesystem(path)[0], LocalFileSystem)


def absolute(path: str) -> str:
    """Return the one name of a path or URI, which means the same in every process of this machine."""
    name = filesystem(path)[1] if is_local(path) else path.replace("s3a://", "s3://").replace("gcs://", "gs://")
    return re.sub(r"(?<=[^:/])/+(?=/|$)", "", name)  # what ends a part twice, or the last one


def own_folder() -> str:
    """Return a folder of this user on this machine, closed to others, who could have put files into one in /tmp."""
    folder = os.path.expanduser("~/.cache/nanochat")
    try:
        os.makedirs(folder, exist_ok=True)
        os.chmod(folder, 0o700)
    except OSError as err:
        raise ConfigError(f"HOME: must have room for {folder} ({excerpt(err)}). Set another HOME.") from err
    return folder


def exists(path: str) -> bool:
    """Tell whether a file or folder exists."""
    fs, inner = filesystem(path)
    fs.invalidate_cache(inner)
    return bool(fs.exists(inner))


def size_bytes(path: str) -> int:
    """Return a file's size."""
    fs, inner = filesystem(path)
    return int(fs.size(inner))


def list_names(folder: str) -> list[str]:
    """Return the sorted names in a folder; none if it does not exist."""
    fs, inner = filesystem(folder)
    fs.invalidate_cache(inner)
    try:
        return sorted(name_of(str(path)) for path in fs.ls(inner, detail=False))
    except FileNotFoundError:
        return []


def list_files(path: str) -> list[str]:
    """Return the sorted paths of all files below a folder, or of a file itself; none if it does not exist."""
    fs, inner = filesystem(path)
    return sorted(fs.find(inner) if is_local(path) else map(fs.unstrip_protocol, fs.find(inner)))


def make_folder(folder: str) -> None:
    """Create a folder and its parents; an object store has none, and would create a bucket whose name is mistyped."""
    fs, inner = filesystem(folder)
    if OBJECT_STORES.isdisjoint([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
        fs.makedirs(inner, exist_ok=True)


def remove(path: str) -> None:
    """Delete a file or folder tree if it is there."""
    fs, inner = filesystem(path)
    if fs.exists(inner):
        fs.rm(inner, recursive=True)


@contextlib.contextmanager
def open_read(path: str) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes."""
    fs, inner = filesystem(path)
    with fs.open(inner, "rb") as file:
        yield file


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[IO[bytes]]:
    """Open a file for writing bytes that appears under its name only when complete.

    On an exception nothing appears and what was there before stays.
    """
    fs, inner = filesystem(path)
    make_folder(os.path.dirname(path))
    if not isinstance(fs, LocalFileSystem):
        with tempfile.NamedTemporaryFile() as whole:
            yield cast(IO[bytes], whole)
            whole.flush()
            fs.put_file(whole.name, inner)
        return
    partial = f"{inner}.{uuid.uuid4().hex[:8]}.partial"
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, inner)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


def write_json(path: str, value: Any) -> None:
    """Write a value as indented JSON, atomically; NaN and infinity are refused."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "replace") + b"\n")  # a text may hold half of a surrogate pair


def read_json(path: str) -> Any:
    """Read a JSON file. Raises: DataError, also a ValueError, if it is damaged."""
    try:
        with open_read(path) as file:
            return json.load(file)
    except ValueError as err:
        raise DamagedFileError(f"file={path}: is no whole JSON ({excerpt(err)}). Delete it, or put it back.") from err


def append_jsonl(path: str, record: dict[str, Any]) -> None:
    """Append one line to a JSONL file (object stores: rewritten whole, so keep such files small)."""
    fs, inner = filesystem(path)
    make_folder(os.path.dirname(path))
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    if isinstance(fs, LocalFileSystem):
        with open(inner, "a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a crash or a full disk cut the last line: it goes
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line)
        return
    before = bytes(fs.cat_file(inner)) if fs.exists(inner) else b""
    with atomic_write(path) as remote:
        remote.write(before + line)


def read_jsonl(path: str) -> list[dict[str, Any]]:
    """Read a JSONL file; none if it does not exist. A last line cut by a crash is passed over."""
    if not exists(path):
        return []
    with open_read(path) as file:
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines):
        try:
            if line:
                records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines) - 2:
                raise DamagedFileError(f"file={path}: line {number + 1} is no JSON. Delete the line.") from None
    return records


def sha256_file(path: str) -> str:
    """Return the SHA-256 of a file's bytes, hex."""
    with open_read(path) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON, hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def free_bytes(path: str) -> int | None:
    """Return the free disk space where a local path lies or will lie; None for a URI."""
    if not is_local(path):
        return None
    place = Path(absolute(path))
    return shutil.disk_usage(next(folder for folder in (place, *place.parents) if os.path.exists(folder))).free


@contextlib.contextmanager
def claimed(run_dir: str) -> Iterator[None]:
    """Keep a local run directory to this process for the time of the block; the system ends the claim of a killed one.

    Raises: ConfigError if another process has it, or if it cannot be written. A URI can only be tried.
    """
    local = is_local(run_dir)
    with contextlib.ExitStack() as claim:
        try:
            if local:
                make_folder(run_dir)
                claim.enter_context(FileLock(join(absolute(run_dir), "lock"), timeout=0))
            else:
                write_json(join(run_dir, "last_use.json"), {"host": platform.node(), "pid": os.getpid()})
        except Timeout as err:
            raise ConfigError(
                f"run_dir={run_dir}: another command is at work in it. Wait for its end, or use another --run-dir."
            ) from err
        except Exception as err:  # every storage has errors of its own
            raise ConfigError(f"run_dir={run_dir}: cannot be written ({excerpt(err)}). Use another --run-dir.") from err
        yield


@dataclass(frozen=True)
class StageFolder:
    """One stage's folder in a run directory."""

    root: str

    @property
    def config(self) -> str:
        """The resolved config with versions and commit."""
        return join(self.root, "config.json")

    @property
    def metrics(self) -> str:
        """One JSON line per logged step."""
        return join(self.root, "metrics.jsonl")

    @property
    def samples(self) -> str:
        """One JSON line per set of samples."""
        return join(self.root, "samples.jsonl")

    @property
    def groups(self) -> str:
        """One JSON line per update of RL: which groups it was made of."""
        return join(self.root, "groups.jsonl")

    @property
    def notes(self) -> str:
        """One JSON line per thing that a person should know: starts, restarts, checkpoints passed over, fallbacks."""
        return join(self.root, "notes.jsonl")

    def note(self, line: str) -> None:
        """Add a note; the terminal shows it, too."""
        append_jsonl(self.notes, {"note": line})

    @property
    def machine(self) -> str:
        """The machine of the first worker."""
        return join(self.root, "machine.json")

    @property
    def checkpoints(self) -> str:
        """The folder of step_000123 folders."""
        return join(self.root, "checkpoints")

    @property
    def stop(self) -> str:
        """A file that asks the run to checkpoint and leave."""
        return join(self.root, "stop")

    @property
    def stop_check_s(self) -> float:
        """Seconds between looks at the stop file: often where a look is cheap."""
        return 0.5 if is_local(self.root) else 10.0

    @property
    def memory_limit(self) -> str:
        """The micro-batch that a run out of memory left to its next start."""
        return join(self.root, "memory_limit.json")

    @property
    def errors(self) -> str:
        """A folder with one file per exception of a worker: its whole traceback."""
        return join(self.root, "errors")


@dataclass(frozen=True)
class RunFolder:
    """A run directory `runs/NAME`: one folder per stage, and the pages for the whole line."""

    root: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", absolute(self.root))  # workers have working directories of their own

    @property
    def text(self) -> str:
        """Text shards that this run wrote or downloaded."""
        return join(self.root, "text")

    @property
    def tokenizer(self) -> str:
        """tokenizer.json and its report."""
        return join(self.root, "tokenizer")

    @property
    def shards(self) -> str:
        """Token shards and their manifest."""
        return join(self.root, "shards")

    @property
    def pretrain(self) -> StageFolder:
        """The base model's stage."""
        return StageFolder(join(self.root, "pretrain"))

    @property
    def sft(self) -> StageFolder:
        """The stage of supervised fine-tuning."""
        return StageFolder(join(self.root, "sft"))

    @property
    def sft_shards(self) -> str:
        """The packed conversations of fine-tuning."""
        return join(self.root, "sft", "shards")

    @property
    def rl(self) -> StageFolder:
        """The stage of reinforcement learning."""
        return StageFolder(join(self.root, "rl"))

    @property
    def tasks(self) -> str:
        """Files of tasks that were downloaded: of a run directory behind a URI they lie on each machine itself."""
        return join(self.root if is_local(self.root) else own_folder(), "tasks")

    @property
    def evaluation(self) -> StageFolder:
        """The stage of scores: one JSON file for each model and set of tasks."""
        return StageFolder(join(self.root, "evaluation"))

    @property
    def ray_log(self) -> str:
        """What Ray says to the driver: always a local file."""
        return join(self.root, "ray.log") if is_local(self.root) else join(own_folder(), f"{os.getpid()}_ray.log")

    @property
    def usage(self) -> str:
        """One JSON line per minute of a line's stages: nodes at work, idle, waited for, and their cost."""
        return join(self.root, "usage.jsonl")

    @property
    def report(self) -> str:
        """The page with curves, samples and machine."""
        return join(self.root, "report.html")

    @property
    def table(self) -> str:
        """The runs of a sweep."""
        return join(self.root, "sweep.csv")

    @property
    def outcome(self) -> str:
        """How a run of a sweep ended; there if and only if it did."""
        return join(self.root, "outcome.json")

    @property
    def walk(self) -> str:
        """The page that follows one document."""
        return join(self.root, "walk.html")

    @property
    def summary(self) -> str:
        """Scores for programs to read."""
        return join(self.root, "summary.json")
