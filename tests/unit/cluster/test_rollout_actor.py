"""One rollout actor without a Ray: when it takes over weights, what it answers, and how it ends."""

import asyncio
import platform
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nanochat.cluster import rollouts
from nanochat.cluster.rollouts import Order, RolloutActor, RolloutSpec
from nanochat.config.model import ModelConfig
from nanochat.config.rl import RLConfig, RolloutsConfig
from nanochat.errors import ClusterError
from nanochat.inference.rollouts import Group
from nanochat.training.hardware import Hardware

pytestmark = pytest.mark.timeout(60)


class FakeSampler:
    """Samples until its policy is `until` or newer; group 13 is more than it can bear."""

    until = 0

    def __init__(self, *arguments, **options):
        self.version = -1
        self.loaded: list[tuple[int, bytes]] = []
        self.groups: list[int] = []

    def load(self, version: int, weights: bytes) -> None:
        self.version = version
        self.loaded.append((version, weights))

    def add(self, group: int) -> None:
        assert self.version >= 0, "weights come first"
        self.groups.append(group)

    def step(self) -> list[Group]:
        time.sleep(0.001)
        if 13 in self.groups:
            raise LookupError("no such word")
        if self.version < self.until:
            return []
        done, self.groups = self.groups, []
        return [Group(group, 0, "", (1,), self.version) for group in done]


@pytest.fixture
def actor(monkeypatch):
    """One that has begun, in an event loop of its own; runs coroutines with a limit."""
    monkeypatch.setattr(rollouts, "GroupSampler", FakeSampler)
    monkeypatch.setattr(rollouts, "load_practice", lambda config, folder: (None, None))
    monkeypatch.setattr(rollouts, "Tokenizer", SimpleNamespace(load=lambda folder: None))
    hardware = Hardware(torch.device("cpu"), torch.float32, "")
    monkeypatch.setattr(rollouts, "choose_hardware", lambda config, run: hardware)
    monkeypatch.setattr(rollouts, "ray", SimpleNamespace(get=lambda weights: weights))
    spec = RolloutSpec(
        config=RLConfig(), rollouts=RolloutsConfig(), actors=1, model=ModelConfig(n_layer=1), tokenizer_folder="",
        tasks_folder="", working_folder="", use_gpu=False, processes=2,
    )  # fmt: skip
    return RolloutActor(spec)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def order(group: int | None, version: int) -> Order:
    return Order(group, version, [f"weights {version}".encode()])


def test_an_actor_of_other_software_does_not_begin(actor):
    """It may be on a node that came after the nodes were looked at."""
    actor.spec = replace(actor.spec, software=actor.spec.software | {"torch": "2.0.0"})
    with pytest.raises(
        ClusterError, match=rf"^node={platform.node()}: has torch 2\.13\.0, the driver 2\.0\.0\. Use one"
    ):
        run(actor.begun())


def test_each_order_is_answered_with_weights_at_least_as_new(actor):
    async def work():
        await actor.begun()
        first = await actor.sample(order(0, 0))
        await actor.load(order(None, 2))
        late, newest = await asyncio.gather(actor.sample(order(1, 1)), actor.sample(order(2, 2)))
        return first, late, newest

    found = run(work())
    assert [(group.id, group.version) for group, _ in found] == [(0, 0), (1, 2), (2, 2)]
    assert actor.sampler.loaded == [(0, b"weights 0"), (2, b"weights 2")], "each once, and never an older one"
    counters = found[-1][1]
    assert counters.elapsed_s >= counters.idle_s > 0
    assert counters.load_s >= 0


def test_new_weights_are_taken_over_in_the_middle_of_a_group(actor, monkeypatch):
    monkeypatch.setattr(FakeSampler, "until", 1)

    async def work():
        await actor.begun()
        asked = asyncio.ensure_future(actor.sample(order(0, 0)))
        await asyncio.sleep(0.05)
        assert not asked.done()
        await actor.load(order(None, 1))
        return await asked

    assert run(work())[0].version == 1


def test_an_error_is_given_to_who_waits_and_to_who_comes_later(actor):
    async def work():
        await actor.begun()
        both = await asyncio.gather(
            actor.sample(order(12, 0)), actor.sample(order(13, 0)), return_exceptions=True
        )  # fmt: skip
        later = await asyncio.gather(actor.sample(order(14, 0)), return_exceptions=True)
        return [*both, *later]

    found = run(work())
    assert [str(err) for err in found[1:]] == ["no such word"] * 2
    assert all(isinstance(err, LookupError) for err in found[1:])
