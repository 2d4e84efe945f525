"""Who is let in to wait for answers, by what a backend says that it is doing."""

from types import SimpleNamespace

import pytest

from nanochat.config.serving import ServingConfig
from nanochat.inference.requests import Load
from nanochat.serving.answers import Admission
from nanochat.serving.errors import ApiError


def admission(**load: int) -> Admission:
    """Of two models with four places each, behind which two may wait."""
    backend = SimpleNamespace(models={"one": None, "two": None}, is_healthy=True, load=lambda: Load(**load))
    return Admission(backend, ServingConfig(max_running=4, max_waiting=2))  # type: ignore[arg-type]


def test_who_came_since_the_last_step_waits_for_the_places_of_every_model():
    """Three of the eight places are free, so the three who wait have them, and two more may come."""
    admission(running=5, waiting=3).enter("one", answers=2, tokens=9)
    with pytest.raises(ApiError, match="1 requests are waiting already, at most 2 may"):
        admission(running=7, waiting=2).enter("one", answers=2, tokens=9)
