"""A fresh interpreter to one that can only read its library, compute and print: the trusted beginning of a run.

sandbox.py starts this file in a directory that holds main.py. It gives up every right that it can, for good, says
so in the first line of stderr, and then runs main.py in the same process. In this order: the user (where that is
root), resources, what a new program could gain, files (Landlock), system calls (seccomp).

Source: setrlimit(2), prctl(2), landlock(7), seccomp(2). Not covered: what sandbox.py says.
"""

import contextlib
import ctypes
import errno
import os
import resource
import struct
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType

CONFINED = "confined"
"""Begins the report; what the kernel does not restrict follows. Any other beginning: why nothing ran."""

MAX_FILES = 16
RUN_UIDS = 0x7000_0000
"""Plus the process id: a user of this run alone, in a range that nothing else is known to use."""
NOBODY = 65534
"""Where a container has few users."""

READABLE = (
    "/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache",
    "/etc/localtime", "/dev/zero", "/dev/random", "/dev/urandom",
)  # fmt: skip
"""Beside Python's own library: what that loads."""

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of DENIED, and the architecture's number in linux/audit.h."""
DENIED = {
    "socket": (41, 198), "socketpair": (53, 199), "clone": (56, 220), "fork": (57, None), "vfork": (58, None),
    "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "ptrace": (101, 117), "prctl": (157, 167),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "prlimit64": (302, 261), "unshare": (272, 97),
    # what reaches beyond the process: the caller's keys, the kernel's programs and counters, its own place in the queue
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "setpriority": (141, 140),
    # memory that no limit counts, and what would outlive the process
    "memfd_create": (319, 279), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    # what Landlock leaves open
    "truncate": (76, 45), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
}  # fmt: skip
"""System calls that fail in a run, with their numbers on x86_64 and aarch64 (None: not there)."""
FIRST_NEW = 424
"""From here on numbers are the same everywhere; these calls (clone3, io_uring, pidfd, mounts) do not exist in a run."""


def main() -> None:
    """Confine this process as `parent_pid memory_bytes disk_bytes cpu_s` say, report, and run main.py."""
    parent, memory_bytes, disk_bytes, cpu_s = map(int, sys.argv[1:])
    try:
        if 0 in os.getresuid():
            _drop_root()
        _restrict_resources(memory_bytes, disk_bytes, cpu_s)
        missing = _restrict_rights(parent)
    except OSError as error:
        sys.exit(str(error))
    os.write(2, f"{CONFINED} {'; '.join(missing)}\n".encode())
    os.environ.clear()
    sys.argv[:] = ["main.py"]
    sys.excepthook = _show
    sys.modules["__main__"] = module = ModuleType("__main__")
    module.__file__ = "main.py"
    # By this relative name: the user of a run need not be able to come to its directory by a path.
    SourceFileLoader("__main__", "main.py").exec_module(module)


def _drop_root() -> None:
    """Give this directory to a user without rights, and become that user."""
    for uid in (RUN_UIDS + os.getpid(), NOBODY):
        with contextlib.suppress(OSError):
            os.chown(".", uid, uid)
            os.chown("main.py", uid, uid)
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            return
    raise OSError("root cannot become another user")


def _restrict_resources(memory_bytes: int, disk_bytes: int, cpu_s: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: disk_bytes // 4,  # an error in the code, before its directory is too large
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_NOFILE: MAX_FILES,
        resource.RLIMIT_NPROC: 0,  # neither a process nor a thread can be started: what is killed is all there is
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for kind, limit in limits.items():
        limit = min(limit, resource.getrlimit(kind)[1] % 2**64)  # no limit is -1
        resource.setrlimit(kind, (limit, limit))


def _restrict_rights(parent: int) -> list[str]:
    """Apply what the kernel offers to everyone, and return what it does not. Raises: OSError without the least."""
    libc = ctypes.CDLL(None, use_errno=True)
    set_pdeathsig, set_no_new_privs, sigkill = 1, 38, 9
    _check(libc.prctl(set_no_new_privs, 1, 0, 0, 0))
    _check(libc.prctl(set_pdeathsig, sigkill, 0, 0, 0))
    if os.getppid() != parent:
        raise OSError("the caller has ended")
    missing = []
    for name, restrict in (("files", _restrict_files), ("network", _restrict_calls)):
        try:
            restrict(libc)
        except OSError as error:
            missing.append(f"{name}: {error.strerror}")
    return missing


def _restrict_files(libc: ctypes.CDLL) -> None:
    """Let this process read its library, write its directory, and reach no process outside (Landlock)."""
    create_ruleset, add_rule, restrict_self = 444, 445, 446
    execute, write_file, read_file, read_dir = 1, 2, 4, 8
    abi = _check(libc.syscall(create_ruleset, None, 0, 1))
    files = (0x1FFF, 0x3FFF, 0x7FFF, 0x7FFF, 0xFFFF)[min(abi, 5) - 1]
    # Files, then TCP (bind, connect), then scopes (abstract sockets, signals): older kernels know the first ones.
    handled = struct.pack("QQQ", files, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    rules = _check(libc.syscall(create_ruleset, handled, len(handled), 0))
    allowed = {path: read_file | read_dir for path in (os.path.join(sys.base_prefix, "lib"), *READABLE)}
    allowed |= {os.devnull: read_file | write_file, ".": files & ~execute}
    for path, rights in allowed.items():
        if os.path.exists(path):
            rights &= files if os.path.isdir(path) else ~read_dir
            place = os.open(path, os.O_PATH)
            _check(libc.syscall(add_rule, rules, 1, struct.pack("=Qi", rights, place), 0))
            os.close(place)
    _check(libc.syscall(restrict_self, rules, 0))
    os.close(rules)


def _restrict_calls(libc: ctypes.CDLL) -> None:
    """Refuse DENIED and every new system call to this process (seccomp): a program for the kernel's packet filter."""
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"no list of system calls for {machine}")
    column, architecture = MACHINES[machine]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse, unknown = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    # (operation, steps to skip if true, if false, operand); a call's architecture lies at 4, its number at 0
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, refuse), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, FIRST_NEW), (give, 0, 0, unknown)]
    for number in [numbers[column] for numbers in DENIED.values()]:
        program += [] if number is None else [(equal, 0, 1, number), (give, 0, 0, refuse)]
    program += [(give, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    set_seccomp, filter_mode = 22, 2
    _check(libc.prctl(set_seccomp, filter_mode, struct.pack("HP", len(program), ctypes.addressof(code)), 0, 0))


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show an uncaught error as `python main.py` does: without the frames that ran it."""
    import traceback  # slow to load, and most runs end well

    while trace and trace.tb_frame.f_code.co_filename != "main.py":
        trace = trace.tb_next
    traceback.print_exception(kind, error, trace)


if __name__ == "__main__":
    main()
