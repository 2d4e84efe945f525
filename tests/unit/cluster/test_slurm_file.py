"""deploy/slurm.sbatch as far as no Slurm is needed; tests/chaos/test_slurm.py runs it."""

import re
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
