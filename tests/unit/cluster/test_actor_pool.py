"""Actors that do items and are lost at some of them, with a Ray of this test."""

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat.cluster import session
from nanochat.cluster.session import MAX_LOSSES, actor_map
from nanochat.errors import ClusterError

ray = session.ray


class FakeRay:
    """Actors that are ready in any order, and lost at an item as often as `deaths` has it."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.deaths: dict[int, int] = {}
        """By item."""
        self.started: list[int] = []
        self.killed: list[int] = []
        self.items: dict[int, int] = {}
        self.refs = itertools.count()
        self.draw = random.Random(0)

    def remote(self, kind: type) -> SimpleNamespace:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self._start))

    def _start(self, fn: Any) -> SimpleNamespace:
        def apply(item: int) -> int:
            ref = next(self.refs)
            self.items[ref] = item
            return ref

        self.started.append(len(self.started))
        return SimpleNamespace(number=self.started[-1], apply=SimpleNamespace(remote=apply))

    def put(self, value: Any) -> Any:
        return value

    def wait(self, refs: list[int], num_returns: int) -> tuple[list[int], list[int]]:
        ready = self.draw.choice(refs)
        return [ready], [ref for ref in refs if ref != ready]

    def get(self, ref: int) -> int:
        item = self.items[ref]
        if self.deaths.get(item):
            self.deaths[item] -= 1
            raise ray.exceptions.ActorDiedError
        return item * item

    def kill(self, actor: SimpleNamespace) -> None:
        self.killed.append(actor.number)


@pytest.fixture
def fake(monkeypatch):
    made = FakeRay()
    monkeypatch.setattr(session, "ray", made)
    monkeypatch.setattr(session, "start_ray", lambda: None)
    monkeypatch.setattr(session, "check_resources", lambda *asked: None)
    return made


def test_what_is_lost_fewer_times_is_done_in_the_end_and_results_are_in_order(fake):
    """Losses are counted for each item: five in all end nothing, and others take the lost ones' places."""
    fake.deaths = {1: MAX_LOSSES - 1, 4: 2}
    assert list(actor_map(3, 0.0)(abs, range(20))) == [item * item for item in range(20)]
    assert len(fake.started) == 3 + MAX_LOSSES - 1 + 2
    assert sorted(fake.killed) == fake.started


def test_an_item_that_kills_its_actors_ends_the_map(fake):
    fake.deaths = {1: MAX_LOSSES}
    with pytest.raises(ClusterError, match=rf"^actors: {MAX_LOSSES} were lost at the same work \(.*\)\. Look into"):
        list(actor_map(3, 0.0)(abs, range(20)))
    assert not fake.deaths[1]
