"""Python code that a model wrote to its output and how it ended, without harm to the machine that runs it.

The code runs in a process of its own that has given up its rights (sandbox_child.py): it can read Python's standard
library and the system's, compute, print, and write to a temporary directory, and do nothing else. There are no child
processes and no threads, so killing that one process ends all of a run. Nothing here needs root or a container,
signals or the main thread: it may be called from many threads at once.

Covered, on Linux:
- processes and threads (cannot be started), other programs (cannot be run), signals to other processes;
- memory, processor time, wall-clock time, open files, sizes of files and of the directory, output: bounded;
- environment, open files, standard input of the caller: not passed on. As root, a user of its own runs the code;
- network and local sockets, so event loops of asyncio, too: none (seccomp, x86_64 and aarch64; `network_is_isolated`);
- files outside the directory: not opened, made or deleted (Landlock, Linux 5.13 and later), but for reading libraries.
What a kernel does not offer is logged once. Without Landlock the code has the file rights of its user (as root: of
that user of its own, who can read what all can read, and write to /tmp); without seccomp it has the network, and an
ordinary user's code can signal that user's processes. Where root cannot become another user: SandboxError.

Not covered: faults of the kernel and of processors (side channels); names, sizes and dates of files elsewhere; the
dates and extended attributes of an ordinary user's own files, the priority of that user's processes, and (before Linux
6.12) signals to them by fcntl; directories in /tmp that are left when the caller is killed with SIGKILL (the run ends
with it); files that are deleted while they are open (sandbox_child.MAX_FILES of a quarter of disk_bytes each, so at
most four times disk_bytes, while the run lasts); how many runs a machine's memory bears; other systems than Linux
(SandboxError). Code that ends with exit code
0 need not have come to its last line: a grader makes it print a random word at its end (code that looks for that word
in main.py can still cheat).

Source: the task is OpenAI's human-eval (Chen et al. 2021, arXiv 2107.03374, section 2.3); the honest statement of its
scope follows nanochat's execution.py (karpathy/nanochat), which guards against accidents only.
"""

import contextlib
import logging
import math
import os
import selectors
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from nanochat.errors import SandboxError, excerpt
from nanochat.inference import sandbox_child

logger = logging.getLogger(__name__)

Status = Literal["ok", "error", "killed", "timeout", "output_limit", "disk_limit"]

TICK_S = 0.05
"""How often the directory is measured."""
ENTRY_BYTES = 16 * 2**10
"""What an entry counts beside its content: deleting a directory can take milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one run may use."""

    timeout_s: float = 5.0
    """From the start of the interpreter; processor time has the same bound, rounded up."""
    memory_bytes: int = 512 * 2**20
    """Address space; the interpreter itself takes about 30 MB."""
    output_bytes: int = 64 * 2**10
    """Of stdout and stderr together (the report of sandbox_child.py counts); a run that has written so many ends."""
    disk_bytes: int = 16 * 2**20
    """Of the temporary directory, each entry counted as 16 KiB more than it holds; a file may have a quarter of it."""


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: Status
    """ok: exit code 0. error: another one. killed: died by a signal. Others: killed here, at that limit."""
    exit_code: int
    """Negative: the signal."""
    stdout: str
    stderr: str
    seconds: float


def run_python(code: str, *, limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Run code as `__main__` of a fresh interpreter that can do no harm; the module says what that covers.

    Raises: SandboxError if code cannot be confined on this machine.
    """
    return _run(code, limits)[0]


@cache
def network_is_isolated() -> bool:
    """Tell whether code is kept from the network here (found by one run of nothing). Raises: as run_python."""
    return "network" not in _run("", DEFAULT_LIMITS)[1]


@cache
def _warn(missing: str) -> None:
    logger.warning("untrusted code is not kept from everything here: %s", missing)


def _run(code: str, limits: Limits) -> tuple[Outcome, str]:
    """Return what run_python does, and what this kernel does not restrict."""
    if sys.platform != "linux":
        raise SandboxError(f"platform={sys.platform}: untrusted code is confined on Linux only. Run it there.")
    started = time.monotonic()
    output = bytearray(), bytearray()
    directory = tempfile.mkdtemp(prefix="nanochat-sandbox-")
    try:
        # Lone surrogates become bytes that Python refuses as source, in the run.
        Path(directory, "main.py").write_bytes(code.encode("utf-8", "surrogatepass"))
        with _start(directory, limits) as process:
            try:
                limit = _watch(process, directory, limits, started + limits.timeout_s, output)
            finally:
                process.kill()  # nothing, where it has ended
                exit_code = process.wait()
        seconds = time.monotonic() - started
    finally:
        _delete(directory)
    stdout, stderr = (part.decode("utf-8", "replace") for part in output)
    report, _, rest = stderr.partition("\n")
    confined, _, missing = report.partition(" ")
    if confined != sandbox_child.CONFINED and limit is None:
        raise SandboxError(f"user={os.geteuid()}: untrusted code cannot be confined here: {excerpt(stderr)}.")
    if missing:
        _warn(missing)
    status = limit or ("ok" if exit_code == 0 else "error" if exit_code > 0 else "killed")
    return Outcome(status, exit_code, stdout, rest, seconds), missing


def _start(directory: str, limits: Limits) -> subprocess.Popen[bytes]:
    # A user without rights may not be able to come to the library by its path (below /root), but by this descriptor.
    prefix = os.open(sys.base_prefix, os.O_PATH)
    try:
        python = f"/proc/self/fd/{prefix}/{os.path.relpath(os.path.realpath(sys.executable), sys.base_prefix)}"
        values = os.getpid(), limits.memory_bytes, limits.disk_bytes, math.ceil(limits.timeout_s)
        return subprocess.Popen(
            [python, "-sSPB", "-X", "utf8", sandbox_child.__file__, *map(str, values)],
            cwd=directory, env={"PYTHONHASHSEED": "0"}, pass_fds=[prefix], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
        )  # fmt: skip
    finally:
        os.close(prefix)


def _watch(
    process: subprocess.Popen[bytes], directory: str, limits: Limits, deadline: float, output: tuple[bytearray, ...]
) -> Status | None:
    """Append to output (stdout, stderr) until the process ends by itself (None) or passes a limit (its status)."""
    measure_at = 0.0
    with selectors.DefaultSelector() as pipes:
        for pipe, part in zip((process.stdout, process.stderr), output, strict=True):
            assert pipe is not None
            pipes.register(pipe, selectors.EVENT_READ, part)
        while (now := time.monotonic()) < deadline:
            if now >= measure_at:
                if _size(directory, limits.disk_bytes) > limits.disk_bytes:
                    return "disk_limit"
                measure_at = now + TICK_S
            if not pipes.get_map():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(TICK_S, deadline - now))
                    return None
            for key, _ in pipes.select(min(TICK_S, deadline - now)) if pipes.get_map() else ():
                chunk = os.read(key.fd, limits.output_bytes - sum(map(len, output)))
                key.data.extend(chunk)
                if not chunk:
                    pipes.unregister(key.fileobj)
                elif sum(map(len, output)) >= limits.output_bytes:
                    return "output_limit"
    return "timeout"


def _size(directory: str, enough: int) -> int:
    """Return the bytes below a directory that code is changing, or what was counted when they were more than enough."""
    total, folders = 0, [directory]
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    total += ENTRY_BYTES + 512 * entry.stat(follow_symlinks=False).st_blocks
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    if total > enough:
                        return total
        except FileNotFoundError:
            continue
        except OSError:  # a path too long, a folder closed to us: nothing that an honest program makes
            return enough + 1
    return total


def _delete(directory: str) -> None:
    """Delete a directory of any depth and with any permissions; links in it are not followed."""
    # shutil.rmtree recurses: a deep tree would stop it.
    script = 'rm -rf -- "$0" || { chmod -R u+rwx -- "$0"; rm -rf -- "$0"; }'
    subprocess.run(["sh", "-c", script, directory], stderr=subprocess.DEVNULL, check=False)
