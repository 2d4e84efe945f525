"""Groups to batches: which may be sampled now, and which make up the next update. Pure, the same for every source.

Groups are numbered, and trained on in the order of their numbers: what is short does not come first. So all that a
checkpoint needs to know is the first group that has not been trained on.

The update number b makes policy b + 1 from policy b. A sample that begins under policy v may be part of the updates
v to v + S, S being `max_staleness`: at admission no more groups are begun than those updates take, and at consumption a
group that is older all the same is sampled again.

Source of the idea of a bound at admission: AReaL, arXiv 2505.24298, section 5.1.
"""

import heapq
from dataclasses import dataclass, field
from typing import Protocol

from nanochat.config.rl import RLConfig
from nanochat.inference.rollouts import Group, GroupSampler


@dataclass
class Batch:
    """The groups of one update."""

    number: int
    """Of the update, and of the policy that it updates."""
    groups: list[Group]
    """Those to train on, in order."""
    next_group: int
    """The first group that is not in it."""
    dropped: list[Group] = field(default_factory=list)
    """Those whose rewards are all equal, where dynamic sampling leaves them out."""

    @property
    def sampled(self) -> list[Group]:
        """All groups that were sampled for it."""
        return self.groups + self.dropped


class RolloutQueue:
    """What has been handed out to be sampled, what has come back, and what is due."""

    def __init__(self, config: RLConfig, first_group: int, version: int) -> None:
        self.config = config
        self.version = version
        """The newest policy."""
        self.next_batch = version
        self.first_group = first_group
        """Of the next batch."""
        self.resampled = 0
        """Groups that were too old when they were due."""
        self._next = first_group
        self._again: list[int] = []
        self._out: set[int] = set()
        self._done: dict[int, Group] = {}
        self._unwanted: set[int] = set()
        """Of those."""

    def admit(self) -> int | None:
        """Return a group to sample now, the first of those that may be, or None; it is out until it comes back."""
        if self._again:
            group = heapq.heappop(self._again)
        else:
            end = min(self.version + self.config.max_staleness + 1, self.config.num_steps)
            if not self._lacks_groups(end - self.next_batch):
                return None
            group, self._next = self._next, self._next + 1
        self._out.add(group)
        return group

    def finished(self, group: Group) -> None:
        """Take a group back that was sampled."""
        self._out.remove(group.id)
        self._done[group.id] = group
        if self.config.dynamic_sampling and max(group.rewards) == min(group.rewards):
            self._unwanted.add(group.id)

    def failed(self, group: int) -> None:
        """Take a group back that was not sampled: it is handed out again."""
        self._out.remove(group)
        heapq.heappush(self._again, group)

    def batch(self) -> Batch | None:
        """Return the next batch once all of its groups are there."""
        groups: list[Group] = []
        dropped: list[Group] = []
        number = self.first_group
        while len(groups) < self.config.groups_per_step and len(groups) + len(dropped) < self.config.most_groups:
            if number not in self._done:
                return None
            group = self._done[number]
            (dropped if number in self._unwanted else groups).append(group)
            number += 1
        stale = [group.id for group in groups if self.next_batch - group.version > self.config.max_staleness]
        if stale:
            for old in stale:
                del self._done[old]
                heapq.heappush(self._again, old)
            self.resampled += len(stale)
            return None
        batch = Batch(self.next_batch, groups, number, dropped)
        for group in batch.sampled:
            del self._done[group.id]
            self._unwanted.discard(group.id)
        self.next_batch, self.first_group = self.next_batch + 1, number
        return batch

    def _lacks_groups(self, batches: int) -> bool:
        """Tell if what is handed out makes fewer batches, even if all that is still out turns out to be wanted."""
        wanted = total = 0
        for number in range(self.first_group, self._next):
            if batches <= 0:
                return False
            total += 1
            wanted += number not in self._unwanted
            if wanted == self.config.groups_per_step or total == self.config.most_groups:
                batches, wanted, total = batches - 1, 0, 0
        return batches > 0


class RolloutSource(Protocol):
    """Where the learner's batches come from; the first worker has it."""

    def begin(self, first_group: int, version: int) -> None:
        """Begin with the first group of the update that makes policy version + 1."""
        ...

    def publish(self, version: int, weights: bytes) -> None:
        """Let all that is sampled from now on be of these weights."""
        ...

    def take(self) -> Batch:
        """Return the next batch, when it is there. Raises: ClusterError if there is nobody left to sample it."""
        ...

    def figures(self) -> dict[str, float]:
        """Return what there is to report since the last call, such as the share of time without work."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class LocalRollouts:
    """Samples in this process whenever the learner waits: learning and sampling take turns."""

    def __init__(self, config: RLConfig, sampler: GroupSampler) -> None:
        self.config, self.sampler = config, sampler

    def begin(self, first_group: int, version: int) -> None:
        """Begin with the first group of an update."""
        self.queue = RolloutQueue(self.config, first_group, version)

    def publish(self, version: int, weights: bytes) -> None:
        """Sample with these weights from now on."""
        self.sampler.load(version, weights)
        self.queue.version = version

    def take(self) -> Batch:
        """Sample until the next batch is there."""
        while (batch := self.queue.batch()) is None:
            while (group := self.queue.admit()) is not None:
                self.sampler.add(group)
            for finished in self.sampler.step():
                self.queue.finished(finished)
        return batch

    def figures(self) -> dict[str, float]:
        """Return nothing: who takes turns has no idle time."""
        return {}

    def close(self) -> None:
        """Nothing is held."""
