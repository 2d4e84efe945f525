"""A sweep: lists and grids of overrides of pretraining flags to one config and one budget for each run.

What may be overridden is every field of PretrainConfig, and one budget: `tokens` or `flops`, from which horizon, batch
and steps follow, or `training_s`, which ends a run before its horizon. A run's name is its overrides, so a sweep can
grow and shrink in its folder.
"""

import itertools
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nanochat.config.cluster import ClusterConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.errors import ConfigError, excerpt

PRESETS = {
    "miniseries": ("depth=4,6,8,10,12,14,16",),
    "scaling_laws": ("flops=1e18,2.15e18,4.64e18,1e19", "depth=8,10,12,14,16,18,20"),
}
"""Source of the second: nanochat runs/scaling_laws.sh@92d63d4."""
BUDGETS = ("tokens", "flops", "training_s")
MAX_NAME_CHARS = 200
Overrides = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Which runs there are, and what each may use; pretraining's own flags are those of all runs."""

    run_dir: str = "runs/sweep"
    """Where table, page and a run directory for each run go, a local path or URI. The same command goes on."""
    data_run_dir: str = "runs/base"
    """Run directory whose tokenizer and token shards all runs share."""
    preset: Literal["miniseries", "scaling_laws"] | None = None
    """miniseries = depths at one ratio of tokens to parameters; scaling_laws = FLOP budgets x depths."""
    grid: tuple[str, ...] = ()
    """NAME=VALUE,VALUE of any pretraining flag or of a budget (tokens, flops, training_s): all combinations. Replaces
    the preset's values of that name."""
    runs: str | None = None
    """File of JSON lines, each an object of overrides; each is combined with the grid."""

    gpus_per_run: float | None = None
    """GPUs of a run, at most 1, which is one process; none = 1 if the cluster has any now."""
    cpus_per_run: float = 2.0
    """Logical CPUs of a run (Ray counts a small machine as 4)."""
    address: str | None = None
    """Ray cluster to join (`auto` = the running one); none = the job's own cluster, or a Ray on this machine."""
    by_label: bool = False
    """Only on nodes with the label work=train."""
    max_failures: int = 3
    """Restarts of a run after its process is lost, a RuntimeError or an OSError; other errors end it at once."""

    def __post_init__(self) -> None:
        if self.gpus_per_run is not None and not 0 <= self.gpus_per_run <= 1:
            raise ConfigError(
                f"gpus_per_run={self.gpus_per_run}: must lie in [0, 1], a run is one process. "
                "Train a larger model with pretrain.py."
            )
        if self.cpus_per_run <= 0:
            raise ConfigError(f"cpus_per_run={self.cpus_per_run}: must be positive. 2 is the default.")

    @property
    def cluster(self) -> ClusterConfig:
        """What the sweep asks of Ray."""
        return ClusterConfig(address=self.address, by_label=self.by_label, max_failures=self.max_failures)


def expand(config: SweepConfig) -> dict[str, Overrides]:
    """Return the overrides of each run by its name: every line of the file with every combination of the grid.

    Raises: ConfigError if there is none, one is there twice, or a name or a value's type is wrong.
    """
    own = [_axis(text) for text in config.grid]
    if len(names := {name for name, _ in own}) < len(own):
        raise ConfigError(f"grid={','.join(sorted(names))}: a name is there twice. Write all its values in one place.")
    axes = dict(_axis(text) for text in (PRESETS[config.preset] if config.preset else ())) | dict(own)
    lines = _read_lines(config.runs) if config.runs is not None else {0: {}} if axes else {}
    found: dict[str, Overrides] = {}
    names_of: dict[frozenset[tuple[str, Any]], str] = {}
    for number, line in lines.items():
        if not line and not axes:
            raise ConfigError(f"runs={config.runs}: line {number} overrides nothing. Leave it out, or give a --grid.")
        if both := sorted(line.keys() & axes.keys()):
            raise ConfigError(f"grid={both[0]}: is given in {config.runs}, too. Leave one of them out.")
        for values in itertools.product(*axes.values()):
            overrides = line | dict(zip(axes, values, strict=True))
            name = ",".join(f"{field}={exact(value)}" for field, value in overrides.items())
            _check(name, overrides)
            before = names_of.setdefault(frozenset(overrides.items()), name)
            if before != name or name in found:
                raise ConfigError(f"run={name}: is there twice, before as {before}. Leave one of them out.")
            found[name] = overrides
    if not found:
        raise ConfigError("grid=(): a sweep needs runs. Give --preset, --grid NAME=VALUE,VALUE or --runs FILE.")
    return found


def exact(value: object) -> str:
    """Return a value's text, of a float the shorter one of two that give it back."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def overridden(name: str, config: PretrainConfig, overrides: Mapping[str, Any]) -> PretrainConfig:
    """Return a run's config, its budget apart. Raises: ConfigError naming the run and the fields that break a rule."""
    try:
        given = replace(config, **{field: value for field, value in overrides.items() if field not in BUDGETS})
    except ConfigError as err:
        raise ConfigError(f"run={name}: {err}") from err
    if not overrides.keys().isdisjoint(("tokens", "flops")):
        for field in ("num_steps", "tokens_per_parameter"):
            if field in overrides or getattr(given, field) != getattr(PretrainConfig(), field):
                raise ConfigError(f"run={name}: {field} follows from the run's budget. Leave one of them out.")
    return given


def _axis(text: str) -> tuple[str, list[Any]]:
    name, _, values = text.partition("=")
    if not values:
        raise ConfigError(f"grid={text}: is not NAME=VALUE,VALUE. Write for example depth=2,4.")
    return name.replace("-", "_"), [_value(value) for value in values.split(",")]


def _value(text: str) -> Any:
    """Return the single value that JSON reads, else the text itself: L needs no quotes on a command line."""
    found = _read(text)
    return text if isinstance(found, list | dict) else found


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _read_lines(path: str) -> dict[int, Overrides]:
    """Return what the lines of a file override, by their numbers."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"runs={path}: cannot be read ({excerpt(err)}). Name a file of JSON lines.") from err
    found = {number: _read(line) for number, line in enumerate(lines, start=1) if line.strip()}
    for number, overrides in found.items():
        if not isinstance(overrides, dict) or any(isinstance(value, list | dict) for value in overrides.values()):
            raise ConfigError(
                f"runs={path}: line {number} is no JSON object of single values ({excerpt(lines[number - 1])}). "
                'Write {"depth": 4}.'
            )
    return found


def _check(name: str, overrides: Overrides) -> None:
    if len(name) > MAX_NAME_CHARS:
        raise ConfigError(
            f"run={excerpt(name)}: must have a name of at most {MAX_NAME_CHARS} characters, that of its folder. "
            "Give what all runs share as flags."
        )
    hints = typing.get_type_hints(PretrainConfig) | dict.fromkeys(BUDGETS, float)
    budgets = [field for field in overrides if field in BUDGETS]
    if len(budgets) > 1:
        raise ConfigError(f"run={name}: has {len(budgets)} budgets. Leave all but one of them out.")
    for field, value in overrides.items():
        if field not in hints:
            raise ConfigError(f"run={name}: {excerpt(field)} is no flag of pretraining. See pretrain.py --help.")
        if not _is_a(hints[field], value):
            raise ConfigError(f"run={name}: {field}={excerpt(value)} is of the wrong kind. See pretrain.py --help.")
        if field in BUDGETS and not 0 < value < float("inf"):
            raise ConfigError(f"run={name}: {field}={value} must be positive. Leave it out for no budget.")


def _is_a(hint: Any, value: object) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_is_a(one, value) for one in typing.get_args(hint))
    return type(value) in ((int, float) if hint is float else (hint,))
