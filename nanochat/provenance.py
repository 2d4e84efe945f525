"""What made an artifact: config.json of a stage, with every resolved value, versions and commit.

Running the same command again resumes; other values of an identity field are refused with the difference shown.
"""

import dataclasses
import importlib.metadata
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat import __version__, storage
from nanochat.config.identity import identity_fields, refuse_other_identity
from nanochat.errors import ConfigError, refuse_credentials

PACKAGES = ("torch", "ray", "numpy", "pyarrow", "tiktoken", "rustbpe", "safetensors")


def begin_stage(
    folder: str, configs: dict[str, Any], resolved: dict[str, Any] | None = None, files: Sequence[str] = ()
) -> None:
    """Write `folder`/config.json from named config dataclasses, or check that the folder's has the same identity.

    Raises: ConfigError as `check_stage`.
    """
    record = {
        "identity": check_stage(folder, configs, files),
        "config": {name: dataclasses.asdict(config) for name, config in configs.items()},
        "resolved": resolved or {},
        "versions": {"nanochat": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": commit(),
    }
    storage.write_json(_config_in(folder), record)


def check_stage(folder: str, configs: dict[str, Any], files: Sequence[str] = ()) -> dict[str, Any]:
    """Return the identity of named config dataclasses and of files' content, the folder's if it has one.

    Nothing is written. Raises: ConfigError naming each identity field and file that differs, or as refuse_credentials.
    """
    for config in configs.values():
        refuse_credentials(**vars(config))
    identity = {
        f"{name}.{field}": value for name, config in configs.items() for field, value in identity_fields(config).items()
    }
    identity |= file_identity(files)
    if storage.exists(path := _config_in(folder)):
        record = storage.read_json(path)
        if "import" in record.get("config", {}) and "import" not in configs:
            raise ConfigError(
                f"run_dir={folder}: its model was imported, so it cannot be trained on from here. Fine-tune it with "
                "ray_jobs/sft.py, or name another --run-dir."
            )
        refuse_other_identity(record["identity"], identity, folder)
    return identity


def file_identity(files: Sequence[str]) -> dict[str, str]:
    """Return what identifies the content of files."""
    return {f"sha256 of {path}": storage.sha256_file(path)[:16] for path in files}


def commit() -> str | None:
    """Return the git commit of this source tree, with `+` if it has changes; None outside git."""
    folder = Path(__file__).parent.parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _config_in(folder: str) -> str:
    return storage.join(folder, "config.json")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
