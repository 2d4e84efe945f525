"""Who a process is in a run, where it writes, and how work fans out: the one seam between stages and Ray.

Every stage is `stage(config, run, inputs) -> artifact`. Alone in one process `RunContext()` is all it needs; under Ray
`nanochat.cluster` fills in rank and world size, and a `map` that runs tasks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Map = Callable[..., Iterator[Any]]
"""Applies a function to every item; results come in the items' order. Builtin map, or Ray tasks with retries."""


@dataclass(frozen=True)
class RunContext:
    """One process's place in a run."""

    rank: int = 0
    """This worker's number among all."""
    world_size: int = 1
    """Workers that train together."""
    local_rank: int = 0
    """This worker's number on its node: which GPU."""
    local_world_size: int = 1
    """Workers on this node: what share of its cores."""
    gpu_share: float = 1.0
    """How much of its GPU's memory is this worker's."""
    use_gpu: bool = True
    """Whether to compute on a GPU where there is one."""
    seconds_left: Callable[[], float | None] = field(default=lambda: None)
    """How long until a node of this run is taken away (spot, maintenance); None = nobody has said so."""
    map: Map = field(default=map)
    """How independent items are worked on."""
    progress: Callable[[str], None] = field(default=lambda line: None)
    """Shows a person one line about what is going on, which the next one replaces."""
    note: Callable[[str], None] = field(default=lambda line: None)
    """Tells a person what should be known afterwards, too."""
