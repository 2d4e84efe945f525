"""deploy/slurm.sbatch as far as no Slurm is needed; tests/chaos/test_slurm.py runs it."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[3]
FILE = (PROJECT / "deploy" / "slurm.sbatch").read_text()
GPUS = yaml.safe_load((PROJECT / "cluster.yaml").read_text())["available_node_types"]["train"]["resources"]["GPU"]
OPTIONS = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "exclusive", "mem", "time", "signal", "requeue",
           "open-mode", "output"}  # fmt: skip
"""What the file may ask for. Source: sbatch(1); Slurm 22.05's own sbatch has read these lines, 2026-11-27."""


def problems(file: str) -> list[str]:
    """Return what is wrong with a batch script."""
    header = re.split(r"^(?!#|$)", file, maxsplit=1, flags=re.M)[0]  # sbatch reads no further than the first command
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", header, flags=re.M)
    asked = dict(lines)
    signal = re.fullmatch(r"B:TERM@(\d+)", asked.get("signal", ""))
    checks = {
        "is not for bash": not file.startswith("#!/bin/bash\n"),
        "a line that sbatch does not read": len(lines) != file.count("#SBATCH"),
        "no such option": not set(asked) <= OPTIONS,
        "more than one Ray on a node": asked.get("ntasks-per-node") != "1" or "exclusive" not in asked,
        "not all of a node": asked.get("mem") != "0" or asked.get("gpus-per-node") != str(GPUS),
        "Ray gets the signal with the command, or too late": signal is None or int(signal[1]) < 120,
        "is lost when its time is up": "requeue" not in asked,
        "a second try writes over the first one's log": asked.get("open-mode") != "append",
        "two jobs write one log": "%j" not in asked.get("output", ""),
        "no time limit": not re.fullmatch(r"(\d+-)?\d+:\d\d:\d\d", asked.get("time", "")),
        "starts without a token": "export RAY_AUTH_MODE=token" not in file,
        "others can read or see the token": "(umask 077 && ray get-auth-token --generate >/dev/null)" not in file,
        "is no bash": subprocess.run(["bash", "-n"], input=file, text=True, capture_output=True).returncode != 0,
    }
    return [problem for problem, is_so in checks.items() if is_so]


def test_the_batch_script_is_sound():
    assert problems(FILE) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("#!/bin/bash", "#!/bin/sh", "not for bash"),
        ("#SBATCH --requeue", "#SBATCH requeue", "does not read"),
        ("#SBATCH --job-name", "set -e\n#SBATCH --job-name", "does not read"),
        ("--gpus-per-node", "--gpus-per-nodes", "no such option"),
        ("--ntasks-per-node=1", "--ntasks-per-node=8", "more than one Ray"),
        ("#SBATCH --exclusive\n", "", "more than one Ray"),
        ("--gpus-per-node=8", "--gpus-per-node=4", "not all of a node"),
        ("B:TERM@300", "TERM@300", "gets the signal"),
        ("B:TERM@300", "B:TERM@30", "gets the signal"),
        ("#SBATCH --requeue\n", "", "is lost"),
        ("--open-mode=append", "--open-mode=truncate", "writes over"),
        ("nanochat-%j.log", "nanochat.log", "write one log"),
        ("--time=24:00:00", "--time=1day", "no time limit"),
        ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "without a token"),
        ("umask 077", "umask 022", "can read or see"),
        (" >/dev/null)", ")", "can read or see"),
        ("\nfi\n", "\n", "no bash"),
    ],
)
def test_what_is_wrong_with_it_is_found(old, new, message):
    assert old in FILE
    assert any(message in problem for problem in problems(FILE.replace(old, new, 1)))


def test_without_a_command_it_says_how_it_is_used():
    done = subprocess.run(["bash", "-s"], input=FILE, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (2, "usage: sbatch [--nodes=N] slurm.sbatch COMMAND ...\n")


LONGEST_SOCKET = "ray/session_2026-11-27_17-51-40_123456_1234567/sockets/dash_TaskEventsHead"
"""Below RAY_TMPDIR, with room; a socket's whole path has at most 107 bytes. Source: unix(7), Ray 2.60's sockets."""
COMMANDS = {
    "hostname": "echo 10.0.0.1",
    "scontrol": 'echo "scontrol $*" >>"$CALLS"',
    "ray": '[ "$1" = symmetric-run ] || exit 0; while [ "$1" != -- ]; do shift; done; shift; "$@"',
    "srun": """while [ "${1#--}" != "$1" ]; do shift; done
        if [ "$1" = rm ]; then echo "$*" >>"$CALLS"; exit 1; fi
        echo "in $RAY_TMPDIR" >>"$CALLS"; SLURM_NODEID=0 "$@" """,
}
"""In the place of a cluster's, for one node; `srun rm` fails, as where a node is gone."""


def batch(tmp_path: Path, command: str, local: Path) -> tuple[int, list[str]]:
    """Run the batch script, whose process is $BATCH, on one node; returns its exit code and what was called."""
    (tmp_path / "bin").mkdir()
    for name, text in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    local.mkdir(parents=True, exist_ok=True)
    job = {"SLURM_CPUS_ON_NODE": "2", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "CALLS": f"{tmp_path}/calls"}
    place = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TMPDIR": str(local), "HOME": str(tmp_path)}
    run = f"export BATCH=$$; set -- bash -c {shlex.quote(command)}\n{FILE}"
    done = subprocess.run(["bash", "-c", run], env=place | job, cwd=tmp_path, capture_output=True, timeout=60)
    return done.returncode, (tmp_path / "calls").read_text().splitlines()


def test_what_ray_wrote_is_removed_from_every_node(tmp_path):
    code, calls = batch(tmp_path, "mkdir $RAY_TMPDIR/ray; exit 3", tmp_path / ("x" * 40))
    folder = calls[0].removeprefix("in ")
    assert (code, calls[1:]) == (3, [f"rm -rf {folder}"])
    assert not os.path.exists(folder)
    assert len(f"{folder}/{LONGEST_SOCKET}") <= 107, folder


def test_a_short_local_disk_is_used(tmp_path):
    local = Path("/tmp") / f"nc{os.getpid()}"
    try:
        _, calls = batch(tmp_path, "true", local)
    finally:
        local.rmdir()
    assert calls[0].startswith(f"in {local}/ray-")


def test_it_is_removed_before_the_job_is_queued_again(tmp_path):
    ready = "until [ -s $RAY_TMPDIR/driver ]; do sleep 0.05; done"
    command = f"trap 'exit 130' TERM; {ready}; kill -TERM $BATCH; for _ in {{1..200}}; do sleep 0.1; done"
    code, calls = batch(tmp_path, command, tmp_path)
    assert code == 130
    assert calls[1].startswith("rm -rf ")
    assert calls[2:] == ["scontrol requeue 7"]
