"""The measured cost of a checkpoint to the number of steps between two: as often as loses least time.

Checkpoints every t seconds lose cost / t of the time to themselves and, at each failure, t / 2 of work on average: the
sum is least at t = sqrt(2 cost * mean time between failures). Cadence changes no row and no number of a run.
Sources: Young 1974 (doi:10.1145/361147.361115); Daly 2006 (doi:10.1016/j.future.2004.11.016), also for the bound: who
needs longer for a checkpoint than half the time between failures takes one in that time.
"""

import math
import time
from collections.abc import Callable

WARM_STEPS = 10
"""After so many steps of a start comes the first checkpoint, which shows what one costs."""


def young_daly_s(cost_s: float, failures_s: float) -> float:
    """Return the seconds between checkpoints that lose least, of which each costs `cost_s` of training time."""
    return min(math.sqrt(2 * cost_s * failures_s), failures_s)


class Cadence:
    """Says when a checkpoint is due: every so many steps, or for `every` None as Young and Daly have it.

    Every worker asks after every step; the first one's clock decides, and `shared` hands its choice to all.
    """

    def __init__(
        self, every: int | None, failures_s: float, shared: Callable[[int], int], note: Callable[[str], None]
    ) -> None:
        self.every, self.failures_s, self.shared, self.note = every, failures_s, shared, note
        self._first: int | None = None
        self._next: int | None = None
        self._steps: int | None = None
        self._mark_s = 0.0

    def due(self, step: int) -> bool:
        """Tell whether to save before `step`, which comes next."""
        if self.every is not None:
            return self.every > 0 and step % self.every == 0
        if self._first is None:  # the first step is done, and what it compiled
            self._first, self._mark_s = step, time.perf_counter()
            self._next = step + WARM_STEPS
        return step == self._next

    def saved(self, step: int, cost_s: float) -> None:
        """Take note of a checkpoint; the first one's cost decides how many steps lie between them from now on."""
        if self._first is None or step == self._first:
            return
        if self._steps is None:
            self._mark_s += cost_s
            self._steps, step_s = self._chosen(step, cost_s)
            self.note(
                f"a checkpoint every {self._steps} steps of {step_s:.2g} s from now on: it stops training for "
                f"{cost_s:.2g} s, and there are {self.failures_s:.0f} s between failures (Young/Daly)"
            )
        self._next = step + self._steps

    def _chosen(self, step: int, cost_s: float) -> tuple[int, float]:
        """Return the first worker's number of steps, and how long one takes here."""
        assert self._first is not None, "steps are measured from the first one on"
        step_s = (time.perf_counter() - self._mark_s) / (step - self._first)
        return self.shared(max(1, round(young_daly_s(cost_s, self.failures_s) / step_s))), step_s
