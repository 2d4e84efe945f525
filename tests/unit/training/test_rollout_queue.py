"""Groups to batches: in order, each once, none too old, whatever comes back first, fails, or is worth nothing."""

import random
import weakref
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.config.rl import RLConfig
from nanochat.inference.rollouts import Group, Sample
from nanochat.training.rollout_queue import Batch, LocalRollouts, RolloutQueue


def group_of(id: int, version: int, is_wanted: bool = True) -> Group:
    return Group(id, 0, "", (1,), version, [Sample(reward=reward) for reward in (0.1, 0.1, float(is_wanted) or 0.1)])


def ids(groups) -> list[int]:
    return [group.id for group in groups]


def config_of(per_step: int = 2, staleness: int = 1, refill: float = 1.0, dynamic: bool = True) -> RLConfig:
    return RLConfig(groups_per_step=per_step, max_staleness=staleness, max_refill=refill, dynamic_sampling=dynamic)


def admitted(queue: RolloutQueue) -> list[int]:
    return list(islice(iter(queue.admit, None), 100))


def test_nothing_is_admitted_beyond_the_last_update():
    queue = RolloutQueue(RLConfig(groups_per_step=2, max_staleness=9, num_steps=3, dynamic_sampling=False), 0, 0)
    assert admitted(queue) == [0, 1, 2, 3, 4, 5]


@dataclass
class World:
    """A learner and samplers around a queue; in every moment a random one of them acts."""

    config: RLConfig
    wanted: float
    """Share of groups whose rewards differ; which, depends on the group and on the policy at S = 0."""
    order: random.Random
    """Whose turn it is, what comes back first, what fails."""
    rewards: int = 0
    first_group: int = 0
    first_version: int = 0
    batches: list[Batch] = field(default_factory=list)
    handed_out: Counter[int] = field(default_factory=Counter)
    """How often each group was, failures left out."""

    def is_wanted(self, group: int, version: int) -> bool:
        by_policy = version if self.config.max_staleness == 0 else 0
        return random.Random(f"{self.rewards} {group} {by_policy}").random() < self.wanted

    def run(self, updates: int) -> "World":
        queue = self.queue = RolloutQueue(self.config, self.first_group, self.first_version)
        out: dict[int, int] = {}
        learns = False
        for _ in range(50_000):
            if len(self.batches) == updates:
                return self
            turn = self.order.choice(["admit", "admit", "finish", "finish", "fail", "learn"])
            if turn == "admit" and (group := queue.admit()) is not None:
                assert group not in out
                out[group] = queue.version
                self.handed_out[group] += 1
            elif turn in ("finish", "fail") and out:
                group = self.order.choice(sorted(out))
                version = out.pop(group)
                if turn == "fail" and self.order.random() < 0.3:
                    queue.failed(group)
                    self.handed_out[group] -= 1
                else:
                    queue.finished(group_of(group, version, self.is_wanted(group, version)))
            elif turn == "learn" and learns:
                queue.version, learns = queue.version + 1, False
            elif turn == "learn":
                batch = queue.batch()
                learns = batch is not None
                if batch is not None:
                    self.batches.append(batch)
                elif not out:  # nothing is on its way: so there must be something to do
                    group = queue.admit()
                    assert group is not None, "stands still"
                    queue.failed(group)
            if self.config.max_staleness == 0 and learns:
                assert queue.admit() is None
                assert not out
        raise AssertionError("stands still")

    def by_rewards(self, updates: int) -> list[tuple[list[int], list[int]]]:
        """What the batches must be: trained and dropped."""
        batches, number = [], self.first_group
        for update in range(self.first_version, self.first_version + updates):
            trained, dropped = [], []
            while len(trained) < self.config.groups_per_step and len(trained + dropped) < self.config.most_groups:
                is_trained = not self.config.dynamic_sampling or self.is_wanted(number, update)
                (trained if is_trained else dropped).append(number)
                number += 1
            batches.append((trained, dropped))
        return batches


WORLDS = {
    "per_step": st.integers(1, 4), "refill": st.sampled_from([0.0, 0.5, 1.0, 3.0]), "dynamic": st.booleans(),
    "wanted": st.sampled_from([0.0, 0.3, 0.7, 1.0]), "seed": st.integers(0, 10**6), "first": st.sampled_from([0, 7]),
}  # fmt: skip


@settings(max_examples=150)
@given(staleness=st.integers(0, 3), **WORLDS)
def test_groups_come_in_order_each_once_and_none_is_too_old(staleness, per_step, refill, dynamic, wanted, seed, first):
    config = config_of(per_step, staleness, refill, dynamic)
    world = World(config, wanted, random.Random(seed), seed, first, first_version=first).run(8)
    due = first
    for number, batch in enumerate(world.batches, start=first):
        assert batch.number == number
        assert sorted(ids(batch.sampled)) == list(range(due, batch.next_group))
        assert ids(batch.groups) == sorted(ids(batch.groups))
        assert ids(batch.dropped) == sorted(ids(batch.dropped))
        assert len(batch.groups) <= per_step
        assert len(batch.groups) == per_step or len(batch.sampled) == config.most_groups
        assert all(number - staleness <= group.version <= number for group in batch.groups)
        assert all(len(set(group.rewards)) == 1 for group in batch.dropped)
        assert not dynamic or all(len(set(group.rewards)) > 1 for group in batch.groups)
        assert len(batch.sampled) <= config.most_groups
        due = batch.next_group
    assert [(ids(batch.groups), ids(batch.dropped)) for batch in world.batches] == world.by_rewards(8)


@settings(max_examples=150)
@given(staleness=st.integers(0, 3), **WORLDS)
def test_nothing_is_begun_that_would_be_too_old_when_it_is_due(
    staleness, per_step, refill, dynamic, wanted, seed, first
):
    world = World(config_of(per_step, staleness, refill, dynamic), wanted, random.Random(seed), seed, first, first)
    world.run(8)
    assert world.queue.resampled == 0
    assert all(world.handed_out[group.id] == 1 for batch in world.batches for group in batch.sampled)


@settings(max_examples=60)
@given(**WORLDS, other=st.integers(0, 10**6))
def test_without_staleness_batches_are_a_function_of_the_rewards(per_step, refill, dynamic, wanted, seed, first, other):
    """Which also differ from policy to policy: every group is of the policy that it updates."""
    config = config_of(per_step, 0, refill, dynamic)
    one, two = (World(config, wanted, random.Random(order), seed, first, first).run(6) for order in (seed, other))
    assert one.batches == two.batches
    assert one.queue.resampled == two.queue.resampled == 0
    assert one.handed_out.keys() == two.handed_out.keys()
    assert max(one.handed_out) == one.batches[-1].next_group - 1, "no more is sampled than is due"
    for number, batch in enumerate(one.batches, start=first):
        assert {group.version for group in batch.sampled} == {number}


def test_more_is_admitted_with_every_policy_and_not_with_every_batch():
    queue = RolloutQueue(config_of(per_step=3, staleness=2), first_group=10, version=5)
    assert admitted(queue) == list(range(10, 19))
    for group in (10, 11, 13, 14, 15, 16, 17):
        queue.finished(group_of(group, 5))
        assert queue.batch() is None
    queue.finished(group_of(12, 5))
    assert [ids(queue.batch().groups) for _ in range(2)] == [[10, 11, 12], [13, 14, 15]]
    assert queue.batch() is None
    assert admitted(queue) == []
    queue.finished(group_of(18, 5))
    assert ids(queue.batch().groups) == [16, 17, 18]
    assert queue.batch() is None
    assert admitted(queue) == []
    queue.version = 6
    assert admitted(queue) == [19, 20, 21]
    queue.version = 8
    assert admitted(queue) == list(range(22, 28))


def test_what_is_not_wanted_makes_room_for_another():
    queue = RolloutQueue(config_of(per_step=2, staleness=0, refill=1.0), 0, 0)
    assert admitted(queue) == [0, 1]
    queue.finished(group_of(1, 0, is_wanted=False))
    assert admitted(queue) == [2]
    queue.finished(group_of(0, 0))
    assert admitted(queue) == []
    queue.finished(group_of(2, 0, is_wanted=False))
    assert admitted(queue) == [3]
    queue.finished(group_of(3, 0, is_wanted=False))
    assert admitted(queue) == [], "four are all that may be sampled for two"
    batch = queue.batch()
    assert (ids(batch.groups), ids(batch.dropped), batch.next_group) == ([0], [1, 2, 3], 4)


def test_failed_groups_come_first_and_in_order():
    queue = RolloutQueue(config_of(per_step=4, staleness=0), 0, 0)
    assert admitted(queue) == [0, 1, 2, 3]
    for group in (2, 0, 3):
        queue.failed(group)
    assert [queue.admit(), queue.admit()] == [0, 2]
    queue.finished(group_of(1, 0))
    assert admitted(queue) == [3]
    for group in (3, 2):
        queue.finished(group_of(group, 0))
        assert queue.batch() is None
    queue.finished(group_of(0, 0))
    assert ids(queue.batch().groups) == [0, 1, 2, 3]


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_group_that_is_too_old_is_sampled_again(staleness):
    queue = RolloutQueue(config_of(per_step=3, staleness=staleness), 0, 4)
    assert admitted(queue)[:3] == [0, 1, 2]
    for group, age in ((0, 1), (1, 0), (2, 2)):
        queue.finished(group_of(group, 4 - staleness - age))
    assert queue.batch() is None
    assert queue.resampled == 2
    assert queue.batch() is None
    assert admitted(queue)[:2] == [0, 2]
    for group in (2, 0):
        queue.finished(group_of(group, 4))
    batch = queue.batch()
    assert [(group.id, group.version) for group in batch.groups] == [(0, 4), (1, 4 - staleness), (2, 4)]
    assert queue.resampled == 2


@pytest.mark.parametrize(("per_step", "refill", "most"), [(4, 3.0, 16), (3, 0.5, 4), (2, 0.0, 2)])
@pytest.mark.parametrize("staleness", [0, 1])
def test_without_any_variance_the_refill_ends(staleness, per_step, refill, most):
    queue = RolloutQueue(config_of(per_step, staleness, refill), 0, 0)
    for number in range(3):
        begun = 0
        while (group := queue.admit()) is not None:
            queue.finished(group_of(group, queue.version, is_wanted=False))
            begun += 1
            assert begun < 100
        assert begun == (most * (staleness + 1) if number == 0 else most)
        batch = queue.batch()
        assert batch.groups == []
        assert ids(batch.dropped) == list(range(number * most, (number + 1) * most))
        queue.version += 1
        kept = weakref.ref(batch.dropped[0])
        del batch
        assert kept() is None


def test_without_dynamic_sampling_all_groups_are_trained_on():
    queue = RolloutQueue(config_of(per_step=3, staleness=0, dynamic=False), 0, 0)
    assert admitted(queue) == [0, 1, 2]
    for group in (2, 1, 0):
        queue.finished(group_of(group, 0, is_wanted=group == 1))
    assert admitted(queue) == []
    batch = queue.batch()
    assert (ids(batch.groups), batch.dropped, batch.next_group) == ([0, 1, 2], [], 3)


class FakeSampler:
    """Returns its groups in a random order, now and then none."""

    def __init__(self, seed: int) -> None:
        self.draw, self.version, self.added, self._groups = random.Random(seed), None, [], []

    def load(self, version: int, weights: bytes) -> None:
        assert weights == b"%d" % version
        self.version = version

    def add(self, group: int) -> None:
        self.added.append(group)
        self._groups.append(group_of(group, self.version, is_wanted=group % 3 > 0))

    def step(self) -> list[Group]:
        assert self._groups, "is called with nothing to do"
        self.draw.shuffle(self._groups)
        count = self.draw.randint(0, 2)
        finished, self._groups = self._groups[:count], self._groups[count:]
        return finished


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("seed", range(5))
def test_sampling_and_learning_take_turns_in_one_process(seed, staleness):
    sampler = FakeSampler(seed)
    rollouts = LocalRollouts(config_of(per_step=3, staleness=staleness), sampler)
    rollouts.begin(first_group=3, version=7)
    trained = []
    for version in range(7, 13):
        rollouts.publish(version, b"%d" % version)
        batch = rollouts.take()
        assert batch.number == version
        assert all(version - staleness <= group.version <= version for group in batch.groups)
        trained += ids(batch.groups)
        if staleness == 0:
            assert len(sampler.added) == batch.next_group - 3
    assert trained == [group for group in range(3, 40) if group % 3][:18]
    assert len(set(sampler.added)) == len(sampler.added)
