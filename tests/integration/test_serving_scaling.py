"""Ray Serve does its part while streams run: replicas come and go, versions change, and no client notices."""

import asyncio
import itertools
import os
import random
import signal
import time
from dataclasses import replace

import pytest
from paced_backend import FACTORY, PROMPT_THAT_KILLS
from serving_client import Outcome, note, replica_pids, run, serving_ray, stream

from nanochat.config.replicas import ReplicasConfig

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

SMALL = ReplicasConfig(
    replica_cpus=0.25, health_check_s=0.5, target_ongoing_requests=4, look_back_s=2, upscale_delay_s=1,
    downscale_delay_s=4, cold_start_s=20,
)  # fmt: skip
UP_WITHIN_S = 15.0
"""Of a step in load: 1 s until it is told, 2 s look-back, 1 s delay, and a replica's start."""
DOWN_WITHIN_S = 40.0


@pytest.fixture(scope="module")
def ray_serve(tmp_path_factory):
    with serving_ray(tmp_path_factory) as found:
        yield found


@pytest.fixture
def deployed(ray_serve):
    """A function that deploys the endpoint; what it deployed is taken away after the test."""
    from nanochat.cluster.deployments import deploy, end
    from nanochat.cluster.endpoint_session import wait_until_ready

    address, serving = ray_serve

    def deploy_it(**changes) -> str:
        replicas = replace(SMALL, **changes)
        deploy("nanochat", "/", serving, replicas, FACTORY)
        if replicas.min_replicas:
            wait_until_ready(address)
        return address

    yield deploy_it
    end("nanochat")


def ask(session, address, tokens, prompt="Once", **changes):
    body = {"model": "paced", "prompt": prompt, "max_tokens": tokens, "return_token_ids": True}
    return stream(session, address, body | changes.pop("body", {}), **changes)


async def answer_of(session, address, tokens) -> int:
    """How many tokens an answer has that does not stream."""
    body = {"model": "paced", "prompt": "Once", "max_tokens": tokens}
    async with session.post(f"{address}/v1/completions", json=body) as answer:
        return (await answer.json())["usage"]["completion_tokens"]


async def until(condition, timeout_s: float) -> float:
    """Return after how many seconds a condition held."""
    began_s = time.monotonic()
    while not await asyncio.to_thread(condition):
        assert time.monotonic() - began_s < timeout_s, f"not within {timeout_s} s"
        await asyncio.sleep(0.2)
    return time.monotonic() - began_s


async def replica_of(session, address, number: int) -> str:
    """Which replica answers a session: its model's checkpoint says so."""
    async with session.get(f"{address}/v1/models", headers={"x-session-id": f"session {number}"}) as answer:
        return (await answer.json())["data"][0]["root"]


async def until_spread(session, address, count: int) -> None:
    """Wait until the proxy knows the replicas, so many; it hears of one, and of an end, a moment after Serve does."""
    for _ in range(100):
        running = {f"process {pid}" for pid in (await asyncio.to_thread(replica_pids)).values()}
        found = {await replica_of(session, address, number) for number in range(24)}
        if found == running and len(found) == count:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"the proxy does not use {count} replicas")


class Load:
    """So many clients, each of which asks again as soon as it is answered."""

    def __init__(self, session, address, tokens) -> None:
        self.session, self.address, self.tokens = session, address, tokens
        self.outcomes: list[Outcome] = []
        self.clients: list[asyncio.Task] = []
        self.is_over = False

    def add(self, count: int) -> None:
        self.clients += [asyncio.create_task(self._client()) for _ in range(count)]

    async def _client(self) -> None:
        while not self.is_over:
            self.outcomes.append(await ask(self.session, self.address, self.tokens))

    async def end(self) -> None:
        self.is_over = True
        await asyncio.gather(*self.clients)

    def failures(self) -> list[Outcome]:
        return [one for one in self.outcomes if not one.is_complete or len(one.tokens) != self.tokens]


def test_twenty_times_the_load_brings_replicas_and_its_end_takes_them(deployed):
    address = deployed(min_replicas=1, max_replicas=3)
    counts: list[int] = []

    async def watch() -> None:
        while True:
            counts.append(len(await asyncio.to_thread(replica_pids)))
            await asyncio.sleep(0.3)

    async def main(session):
        watcher = asyncio.create_task(watch())
        load = Load(session, address, tokens=50)
        load.add(1)
        await asyncio.sleep(3)
        assert set(counts) == {1}
        load.add(19)
        up_s = await until(lambda: counts[-1] == 3, UP_WITHIN_S + 10)
        await asyncio.sleep(4)
        load.is_over = True
        long = [asyncio.create_task(ask(session, address, 600)) for _ in range(2)]
        await load.end()
        down_s = await until(lambda: counts[-1] == 1, DOWN_WITHIN_S)
        watcher.cancel()
        return load, up_s, down_s, await asyncio.gather(*long)

    load, up_s, down_s, long = run(main)
    note(f"three replicas after {up_s:.1f} s, one again after {down_s:.1f} s, {len(load.outcomes)} requests")
    assert up_s < UP_WITHIN_S
    assert load.failures() == []
    assert all(one.is_complete and len(one.tokens) == 600 for one in long), "streams outlive their replica's dismissal"
    steps = [b - a for a, b in itertools.pairwise(counts) if b != a]
    turns = sum((a > 0) != (b > 0) for a, b in itertools.pairwise(steps))
    assert turns <= 1, counts


def test_no_stream_ends_falsely_when_its_replica_is_killed(deployed):
    address = deployed(min_replicas=2, max_replicas=2)
    pids = replica_pids()
    assert len(pids) == 2

    async def main(session):
        await until_spread(session, address, 2)
        streams = [asyncio.create_task(ask(session, address, 250)) for _ in range(16)]
        whole = [asyncio.create_task(answer_of(session, address, 250)) for _ in range(4)]
        await asyncio.sleep(2)
        os.kill(next(iter(pids.values())), signal.SIGKILL)
        killed_s = time.monotonic()
        more = [await ask(session, address, 3) for _ in range(20)]
        outcomes = await asyncio.gather(*streams)
        await until(lambda: len(replica_pids()) == 2, 30)
        return outcomes, more, await asyncio.gather(*whole), time.monotonic() - killed_s

    outcomes, more, whole, back_s = run(main)
    broken = [one for one in outcomes if one.error]
    note(f"{len(broken)} of 16 broken ({broken[0].error}), both replicas again after {back_s:.1f} s")
    assert 0 < len(broken) < 16
    assert not any(one.ended_falsely for one in outcomes)
    assert all(one.is_complete and len(one.tokens) == 250 for one in outcomes if not one.error)
    assert not [one.error for one in more if not one.is_complete], "new requests go to the other one at once"
    assert whole == [250] * 4, "nothing of these had been sent: the other one computes them"

    async def go_on(session):
        cut = broken[0]
        rest = await ask(session, address, 250, body={"continue_token_ids": cut.tokens})
        return cut.tokens + rest.tokens, rest

    tokens, rest = run(go_on)
    uncut = next(one for one in outcomes if not one.error)
    assert rest.is_complete
    assert tokens == uncut.tokens


def test_a_replica_whose_engine_has_died_is_replaced(deployed):
    address = deployed(min_replicas=1, max_replicas=1)
    (before,) = replica_pids().values()

    async def main(session):
        died = await ask(session, address, 5, prompt=PROMPT_THAT_KILLS)
        back_s = await until(lambda: (pids := list(replica_pids().values())) and pids != [before], 30)
        return died, back_s, await ask(session, address, 5)

    died, back_s, after = run(main)
    note(f"replaced after {back_s:.1f} s")
    assert died.error
    assert after.is_complete


def test_a_new_version_under_load_fails_no_request(deployed):
    address = deployed(min_replicas=2, max_replicas=2)
    old = set(replica_pids().values())

    async def main(session):
        loads = [Load(session, address, tokens=60), Load(session, address, tokens=3)]
        for load in loads:
            load.add(6)
        long = asyncio.create_task(ask(session, address, 500))
        await asyncio.sleep(1)
        # Another size is another version: every replica is replaced.
        await asyncio.to_thread(lambda: deployed(min_replicas=2, max_replicas=2, replica_cpus=0.3))
        await asyncio.sleep(3)
        for load in loads:
            await load.end()
        return loads, await long

    loads, long = run(main)
    note(f"{sum(len(load.outcomes) for load in loads)} requests while both replicas were replaced")
    assert not old & set(replica_pids().values())
    assert [load.failures() for load in loads] == [[], []]
    assert long.is_complete


def test_nothing_runs_on_for_two_hundred_clients_that_hang_up(deployed):
    address = deployed(min_replicas=1, max_replicas=1)
    draw = random.Random(0)

    async def main(session):
        async def client() -> None:
            await asyncio.sleep(draw.random() * 2)
            await ask(session, address, 400, hang_up_after=draw.randint(0, 20))

        for _ in range(4):
            await asyncio.gather(*[client() for _ in range(50)])

        async def running() -> float:
            async with session.get(f"{address}/metrics") as answer:
                lines = (await answer.text()).splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))

        began_s = time.monotonic()
        while await running():
            assert time.monotonic() - began_s < 2
            await asyncio.sleep(0.05)
        return await ask(session, address, 5)

    assert run(main).is_complete


def test_from_zero_replicas_a_request_waits_for_the_first(deployed):
    address = deployed(min_replicas=0, max_replicas=1)
    assert replica_pids() == {}

    async def main(session):
        first = await ask(session, address, 20)
        gone_s = await until(lambda: not replica_pids(), DOWN_WITHIN_S)
        return first, gone_s

    first, gone_s = run(main)
    note(f"first token after {first.first_s:.1f} s; none again after {gone_s:.1f} s")
    assert first.is_complete
    assert first.first_s < 20


def test_while_no_replica_can_start_a_request_gets_503_in_time(ray_serve):
    """A cluster that is full: the request waits for cold_start_s, then hears when to come again."""
    from nanochat.cluster.deployments import deploy, end

    address, serving = ray_serve
    import ray

    @ray.remote(num_cpus=0)
    class Holder:
        def ready(self):
            return True

    holders = [Holder.options(num_cpus=1).remote() for _ in range(int(ray.cluster_resources()["CPU"]))]
    ray.get([one.ready.remote() for one in holders], timeout=60)
    try:
        deploy("nanochat", "/", serving, replace(SMALL, min_replicas=0, max_replicas=1, replica_cpus=1.0), FACTORY)
        outcome = run(lambda session: ask(session, address, 5))
    finally:
        for one in holders:
            ray.kill(one)
        end("nanochat")
    note(f"after {outcome.all_s:.1f} s: {outcome.error}")
    assert outcome.status == 503
    assert outcome.headers["Retry-After"]
    assert '"error"' in outcome.body
    assert 19 < outcome.all_s < 25


def test_a_session_stays_on_its_replica_and_sessions_spread(deployed):
    address = deployed(min_replicas=2, max_replicas=2)

    async def main(session):
        await until_spread(session, address, 2)
        return [[await replica_of(session, address, number) for number in range(24)] for _ in range(3)]

    rounds = run(main)
    assert rounds[0] == rounds[1] == rounds[2]
    assert len(set(rounds[0])) == 2
