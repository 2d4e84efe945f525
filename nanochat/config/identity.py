"""Which fields define a run's numbers, and the refusal to continue a run under other ones."""

import dataclasses
import typing
from typing import Annotated, Any, TypeVar

from nanochat.errors import ConfigError

T = TypeVar("T")
_MARK = "identity"
Identity = Annotated[T, _MARK]
"""`depth: Identity[int]`: a run directory made with another value is refused."""


def identity_fields(config: Any) -> dict[str, Any]:
    """Return the identity fields of a config dataclass and their values, as JSON has them: tuples are lists."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    values = ((field, getattr(config, field.name)) for field in dataclasses.fields(config))
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field, value in values
        if _MARK in getattr(hints[field.name], "__metadata__", ())
    }


def refuse_other_identity(before: dict[str, Any], now: dict[str, Any], folder: str) -> None:
    """Raise ConfigError naming every identity value that differs from the one the folder was made with."""
    changed = [f"{name}={now.get(name)!r} (was {before.get(name)!r})" for name in sorted(before.keys() | now.keys())
               if before.get(name) != now.get(name)]  # fmt: skip
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: {folder} holds a run with other values. "
            "Use the old values to resume it. To start anew delete that folder, or use another --run-dir "
            "(make: RUN_DIR=...)."
        )
