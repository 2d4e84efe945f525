"""The pool of rollout actors against a Ray of this test, for what a real one cannot be made to do on demand."""

import time
from types import SimpleNamespace

import pytest
import torch

from nanochat.cluster import rollouts
from nanochat.cluster.rollouts import DEATHS_IN_A_ROW, Counters, RolloutPool, RolloutSpec
from nanochat.config.rl import RLConfig, RolloutsConfig
from nanochat.errors import ClusterError
from nanochat.inference.rollouts import Group, Sample

ray = rollouts.ray
CONFIG = RLConfig(groups_per_step=2, samples_per_group=2, num_steps=30, max_staleness=0, tis_cap=None)

pytestmark = pytest.mark.timeout(60)


def of_task(cause: Exception) -> ray.exceptions.RayTaskError:
    return ray.exceptions.RayTaskError("sample", "Traceback: in sample", cause).as_instanceof_cause()


class FakeRay:
    """Actors that answer at once; `outcomes` are errors, or None, for the next results that are asked for."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.outcomes: list[Exception | None] = []
        self.results: dict[int, object] = {}
        self.orders: list[list[int]] = []
        """Groups that each actor was given, by the order in which actors were started."""
        self.killed: list[int] = []

    def remote(self, kind):
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self._started))

    def _started(self, spec):
        number = len(self.orders)
        self.orders.append([])

        def sample(order):
            self.orders[number].append(order.group)
            samples = [Sample(tokens=[1], reward=float(place), versions=[order.version]) for place in range(2)]
            return self._ref((Group(order.group, 0, "", (1,), order.version, samples), Counters(1.0)))

        return SimpleNamespace(
            number=number, begun=SimpleNamespace(remote=lambda: self._ref(None)), sample=SimpleNamespace(remote=sample),
            load=SimpleNamespace(remote=lambda order: None),
        )  # fmt: skip

    def _ref(self, result):
        ref = len(self.results)
        self.results[ref] = result
        return ref

    def put(self, value):
        return self._ref(value)

    def wait(self, refs, num_returns, timeout):
        return refs[:num_returns], refs[num_returns:]

    def get(self, ref):
        result = self.results[ref]
        outcome = self.outcomes.pop(0) if isinstance(result, tuple) and self.outcomes else None
        if outcome is not None:
            raise outcome
        return result

    def kill(self, handle):
        self.killed.append(handle.number)


@pytest.fixture
def pool_of(monkeypatch):
    """Makes a pool whose first results end in some errors."""
    fake, pools = FakeRay(), []
    monkeypatch.setattr(rollouts, "ray", fake)

    def make(*outcomes, timeout_s=20.0):
        fake.outcomes = list(outcomes)
        spec = RolloutSpec(
            config=CONFIG, rollouts=RolloutsConfig(running=4, timeout_s=timeout_s), actors=2, model=None,
            tokenizer_folder="", tasks_folder="", working_folder="", use_gpu=False, processes=3,
        )  # fmt: skip
        notes = []
        pools.append(RolloutPool(spec, notes.append))
        pools[0].begin(0, 0)
        pools[0].publish(0, b"weights")
        return pools[0], fake, notes

    yield make
    pools[0].close()


def groups(batch):
    return [group.id for group in batch.groups]


def take_all(pool, updates):
    """Take batches, publishing after each; at S = 0 each group is of the newest policy."""
    batches = []
    for version in range(updates):
        batches.append(pool.take())
        assert [group.version for group in batches[-1].groups] == [version, version]
        pool.publish(version + 1, b"more")
    return [groups(batch) for batch in batches]


def test_every_actor_has_work_and_every_group_is_of_the_newest_policy(pool_of):
    pool, fake, notes = pool_of()
    assert take_all(pool, 9) == [[2 * number, 2 * number + 1] for number in range(9)]
    assert min(map(len, fake.orders)) >= 8, "but for the first two groups, one each"
    assert pool.figures()["resampled"] == 0.0
    assert not notes


def test_results_that_are_lost_with_their_node_are_sampled_again(pool_of):
    lost = ray.exceptions.ObjectLostError("00" * 28, "address", "call site")
    pool, fake, notes = pool_of(lost, ray.exceptions.ActorDiedError())
    assert take_all(pool, 3) == [[0, 1], [2, 3], [4, 5]]
    assert pool.deaths == len(notes) == 2
    assert all("a rollout actor died with groups " in note for note in notes)
    assert len(fake.orders) == 4, "another in the place of each"
    assert len(fake.killed) == 2, "who may be out of reach alone is ended"
    assert pool.figures()["rollout_deaths"] == 2.0


def test_an_actor_without_memory_names_what_to_lower(pool_of):
    pool, fake, _ = pool_of(of_task(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")))
    with pytest.raises(ClusterError, match=r"running=4: a rollout actor ran out of memory \(CUDA .*\)\. Lower --runn"):
        pool.take()
    assert len(fake.orders) == 2, "no other is started"


def test_what_an_actor_raises_is_raised_with_its_story(pool_of):
    pool, _, _ = pool_of(of_task(LookupError("no such word")))
    with pytest.raises(LookupError, match="no such word") as raised:
        pool.take()
    assert any("in a rollout actor" in note for note in raised.value.__notes__)


def test_deaths_in_a_row_end_the_run(pool_of):
    deaths = [ray.exceptions.ActorDiedError() for _ in range(DEATHS_IN_A_ROW + 2)]
    pool, _, _ = pool_of(*deaths)
    with pytest.raises(ClusterError, match=f"actors=2: {DEATHS_IN_A_ROW + 2} died one after the other without a sam"):
        pool.take()


def test_a_death_fewer_is_lived_through(pool_of):
    pool, _, _ = pool_of(*[ray.exceptions.ActorDiedError() for _ in range(DEATHS_IN_A_ROW + 1)])
    assert groups(pool.take()) == [0, 1]


def test_deaths_with_groups_between_them_never_end_the_run(pool_of):
    pool, _, _ = pool_of(*[ray.exceptions.ActorDiedError(), None] * 12)
    assert len(take_all(pool, 15)) == 15
    assert pool.deaths == 12


def test_a_learner_that_took_its_time_is_not_told_of_silence(pool_of):
    pool, _, _ = pool_of(timeout_s=0.4)
    pool.take()
    time.sleep(0.8)
    pool.publish(1, b"more")
    assert groups(pool.take()) == [2, 3]


def test_nobody_who_answers_is_said_in_time(pool_of, monkeypatch):
    def silent(refs, num_returns, timeout):
        time.sleep(timeout)
        return [], refs

    monkeypatch.setattr(FakeRay, "wait", lambda self, *arguments, **options: silent(*arguments, **options))
    pool, _, _ = pool_of(timeout_s=0.3)
    with pytest.raises(ClusterError, match=r"timeout_s=0.3: no group was sampled for \d s: 0 of 2 actors have begun"):
        pool.take()
