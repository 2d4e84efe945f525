"""Rollout actors: processes that sample groups while the learner learns, and the pool that gives them work.

The first learner worker owns the pool, and the pool its actors: when that worker dies they go with it, and the next
start makes new ones, so no sample of a forgotten attempt is ever met. An actor knows nothing but the work that it is
given: every order names the policy and carries a reference to its weights in the object store, put there once. So one
that was started anew is up to date with its first order, and there is no collective in which a dead one could leave
the learner waiting.
"""

import asyncio
import contextlib
import platform
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nanochat.cluster.nodes import check_software, software
from nanochat.cluster.terminal import with_story
from nanochat.config.model import ModelConfig
from nanochat.config.rl import RLConfig, RolloutsConfig
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import ClusterError, ConfigError, excerpt
from nanochat.inference.paged_cache import cache_bytes, pages_for
from nanochat.inference.rollouts import Group, GroupSampler, with_reward
from nanochat.model.scaling import parameter_counts
from nanochat.run_context import RunContext
from nanochat.tasks.task import Task
from nanochat.training.hardware import Hardware, choose_hardware
from nanochat.training.rl import load_practice
from nanochat.training.rollout_queue import Batch, RolloutQueue

DEATHS_IN_A_ROW = 5
"""So many actors, beside all that there are at once, may die without a finished group between them."""
LOOK_S = 0.1


@dataclass(frozen=True)
class RolloutSpec:
    """All that an actor needs to begin."""

    config: RLConfig
    rollouts: RolloutsConfig
    actors: int
    model: ModelConfig
    tokenizer_folder: str
    tasks_folder: str
    working_folder: str
    """Where the module of a reward is looked for."""
    use_gpu: bool
    processes: int
    """Processes that share the cores of this machine: actors and learners."""
    placement: Mapping[str, Any] = field(default_factory=dict)
    """The option that says on which nodes actors are."""
    software: Mapping[str, str] = field(default_factory=software)
    """The driver's, which all actors must have."""

    def judged(self, task: Task) -> Task:
        """Return the task, judged by the reward that the config names."""
        return with_reward(task, self.config.reward, self.working_folder, self.rollouts.reward_timeout_s)


def check_share(spec: RolloutSpec, hardware: Hardware) -> None:
    """Raise ConfigError if weights, keys and values do not fit into what an actor has of its device."""
    pages = spec.rollouts.running * pages_for(spec.model.sequence_len)
    needed = parameter_counts(spec.model)["total"] * hardware.dtype.itemsize
    needed += cache_bytes(spec.model, pages, hardware.dtype)
    is_gpu = hardware.device.type == "cuda"
    share = ((spec.rollouts.gpus_per_actor or 1.0) if is_gpu else 1 / spec.processes) * hardware.total_bytes()
    if needed > share:
        raise ConfigError(
            f"running={spec.rollouts.running}: weights, keys and values need {needed / 2**30:.2f} GiB, an actor's "
            f"share of its device is {share / 2**30:.2f} GiB. Lower --running, or ask for fewer --actors."
        )


@dataclass(frozen=True)
class Order:
    """A group to sample, with no older weights than these; without a group, weights alone."""

    group: int | None
    version: int
    weights: list[Any]
    """The reference to them, in a list, so that it is passed as a reference."""


@dataclass(frozen=True)
class Counters:
    """What an actor has done since it began, in seconds."""

    elapsed_s: float = 0.0
    idle_s: float = 0.0
    load_s: float = 0.0
    """Spent on taking over weights."""


class RolloutActor:
    """Samples groups in a thread of its own, all that it was given at once."""

    def __init__(self, spec: RolloutSpec) -> None:
        self.spec = spec

    async def begun(self) -> None:
        """Load tokenizer and task; weights come with the first order. Raises: what is wrong with them."""
        spec = self.spec
        check_software(spec.software, software(), platform.node())
        tokenizer = Tokenizer.load(spec.tokenizer_folder)
        run = RunContext(use_gpu=spec.use_gpu, local_world_size=spec.processes)
        hardware = choose_hardware(spec.config, run)
        check_share(spec, hardware)
        task = spec.judged(load_practice(spec.config, spec.tasks_folder)[0])
        self.sampler = GroupSampler(
            spec.config, tokenizer, task, spec.model, dtype=hardware.dtype, device=hardware.device,
            running=spec.rollouts.running, backend=spec.rollouts.backend,
        )  # fmt: skip
        self._start_s, self._idle_s, self._load_s = time.monotonic(), 0.0, 0.0
        self._orders: queue.SimpleQueue[tuple[Order, Future[Group]]] = queue.SimpleQueue()
        self._asked: dict[int, Future[Group]] = {}
        self._error: BaseException | None = None
        threading.Thread(target=self._work, name="sampling", daemon=True).start()

    async def sample(self, order: Order) -> tuple[Group, Counters]:
        """Return a group when it is sampled. Raises: what went wrong with it, or with the actor before."""
        group = await asyncio.wrap_future(self._handed_over(order))
        return group, Counters(time.monotonic() - self._start_s, self._idle_s, self._load_s)

    async def load(self, order: Order) -> None:
        """Take over weights at the next moment."""
        self._handed_over(order)

    def _handed_over(self, order: Order) -> "Future[Group]":
        future: Future[Group] = Future()
        self._orders.put((order, future))
        if self._error is not None:
            self._fail_orders(self._error)
        return future

    def _work(self) -> None:
        try:
            while True:
                self._take_orders()
                for group in self.sampler.step():
                    self._asked.pop(group.id).set_result(group)
        except BaseException as err:  # carried to whoever waits
            self._error = err
            for future in self._asked.values():
                future.set_exception(err)
            self._fail_orders(err)

    def _fail_orders(self, err: BaseException) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._orders.get_nowait()[1].set_exception(err)

    def _take_orders(self) -> None:
        """Take what has come; wait for it while there is nothing to do."""
        orders = []
        start_s = time.monotonic()
        if not self._asked:
            orders.append(self._orders.get())
            self._idle_s += time.monotonic() - start_s
        with contextlib.suppress(queue.Empty):
            while True:
                orders.append(self._orders.get_nowait())
        self._asked |= {order.group: future for order, future in orders if order.group is not None}
        for order, _ in orders:
            if order.version > self.sampler.version:
                newest = max((order for order, _ in orders), key=lambda order: order.version)
                start_s = time.monotonic()
                self.sampler.load(newest.version, ray.get(newest.weights[0]))
                self._load_s += time.monotonic() - start_s
            if order.group is not None:
                self.sampler.add(order.group)


@dataclass(eq=False)
class _Actor:
    """One actor as the pool sees it."""

    handle: Any
    begun: Any
    """A reference that is there once it has begun; then None. Until then it gets no work."""
    work: dict[Any, int] = field(default_factory=dict)
    """Groups that it samples, by the reference to the result."""
    counters: Counters = field(default_factory=Counters)
    reported: Counters = field(default_factory=Counters)
    """As they were when figures were last asked for."""


class RolloutPool:
    """A RolloutSource that keeps its actors busy from a thread, and replaces those that die."""

    def __init__(self, spec: RolloutSpec, note: Callable[[str], None]) -> None:
        self.spec, self.note = spec, note
        self.deaths = 0
        self._deaths_in_a_row = 0
        self._groups_at_once = -(-spec.rollouts.running // spec.config.samples_per_group) + 1
        self._actors: list[_Actor] = []
        self._newest: Order | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._heard_s = time.monotonic()
        self._changed = threading.Condition()

    def begin(self, first_group: int, version: int) -> None:
        """Start the actors."""
        self.queue = RolloutQueue(self.spec.config, first_group, version)
        self._actors = [self._started() for _ in range(self.spec.actors)]
        threading.Thread(target=self._run, name="rollout-pool", daemon=True).start()

    def publish(self, version: int, weights: bytes) -> None:
        """Put weights into the object store and tell every actor of them."""
        order = Order(None, version, [ray.put(weights)])
        with self._changed:
            self._newest, self.queue.version = order, version
            for actor in self._actors:
                if actor.begun is None:  # a queue of those who wait for room would hold on to every policy
                    actor.handle.load.remote(order)
            self._changed.notify_all()

    def take(self) -> Batch:
        """Wait for the next batch. Raises: what a reward raised; ClusterError if nobody is left to sample."""
        with self._changed:
            self._heard_s = time.monotonic()
            while (batch := self.queue.batch()) is None:
                if self._error is not None:
                    raise self._error
                self._check_silence()
                self._changed.wait(LOOK_S)
            self._changed.notify_all()
            return batch

    def figures(self) -> dict[str, float]:
        """Return the actors' share of time without work since the last call, what loading took, and their deaths."""
        idle_s = elapsed_s = load_s = 0.0
        with self._changed:
            for actor in self._actors:
                now, before, actor.reported = actor.counters, actor.reported, actor.counters
                elapsed_s += now.elapsed_s - before.elapsed_s
                idle_s += now.idle_s - before.idle_s
                load_s += now.load_s - before.load_s
        return {
            "rollout_idle_share": idle_s / elapsed_s if elapsed_s else 0.0, "load_s": load_s / len(self._actors),
            "rollout_actors": float(len(self._actors)), "rollout_deaths": float(self.deaths),
            "resampled": float(self.queue.resampled),
        }  # fmt: skip

    def close(self) -> None:
        """End the actors."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for actor in self._actors:
                ray.kill(actor.handle)

    def _started(self) -> _Actor:
        """Start an actor, wherever there is room."""
        rollouts, use_gpu = self.spec.rollouts, self.spec.use_gpu
        options = {
            "num_cpus": rollouts.cpus_per_actor, "num_gpus": (rollouts.gpus_per_actor or 1.0) if use_gpu else 0.0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group=None), "max_restarts": 0,
            **self.spec.placement,
        }  # fmt: skip
        handle = ray.remote(RolloutActor).options(**options).remote(self.spec)
        return _Actor(handle, handle.begun.remote())

    def _run(self) -> None:
        """Hand out work and take in results until closed."""
        try:
            while True:
                with self._changed:
                    if self._closed:
                        return
                    self._hand_out()
                    pending = [ref for actor in self._actors for ref in (*actor.work, actor.begun) if ref is not None]
                    if not pending:
                        self._changed.wait(LOOK_S)
                if pending:
                    ready, _ = ray.wait(pending, num_returns=1, timeout=LOOK_S)
                    with self._changed:
                        for ref in ready:
                            self._take_in(ref)
                        self._changed.notify_all()
        except BaseException as err:  # carried to the learner's thread
            with self._changed:
                self._error = err
                self._changed.notify_all()

    def _hand_out(self) -> None:
        """Give admitted groups to the actors that have least to do."""
        ready = [actor for actor in self._actors if actor.begun is None]
        while ready and self._newest is not None:
            actor = min(ready, key=lambda actor: len(actor.work))
            if len(actor.work) >= self._groups_at_once or (group := self.queue.admit()) is None:
                return
            actor.work[actor.handle.sample.remote(replace(self._newest, group=group))] = group

    def _take_in(self, ref: Any) -> None:
        """Take a result; of an actor that died all groups are handed out again, and another takes its place."""
        actor = next((one for one in self._actors if ref in one.work or ref == one.begun), None)
        if self._closed or actor is None:
            return
        try:
            result = ray.get(ref)
        except ray.exceptions.RayTaskError as err:
            if isinstance(err.cause, torch.OutOfMemoryError):
                raise ClusterError(
                    f"running={self.spec.rollouts.running}: a rollout actor ran out of memory ({excerpt(err.cause)}). "
                    "Lower --running."
                ) from err
            raise with_story(err.cause, "in a rollout actor", str(err)) from None
        except ray.exceptions.RayError as err:  # it died, or its node, or the result on the way
            self._bury(actor, err)
            return
        if ref == actor.begun:
            actor.begun = None
            return
        del actor.work[ref]
        group, actor.counters = result
        self.queue.finished(group)
        self._deaths_in_a_row = 0
        self._heard_s = time.monotonic()

    def _bury(self, actor: _Actor, err: ray.exceptions.RayError) -> None:
        groups = sorted(actor.work.values())
        which = f"groups {groups[0]} to {groups[-1]}" if groups else "no group"
        self.deaths += 1
        self._deaths_in_a_row += 1
        self.note(f"a rollout actor died with {which}; another takes its place ({excerpt(err)})")
        if self._deaths_in_a_row >= DEATHS_IN_A_ROW + len(self._actors):
            raise ClusterError(
                f"actors={self.spec.actors}: {self._deaths_in_a_row} died one after the other without a sample, the "
                f"last with {which} ({excerpt(err)}). Look into Ray's log, or free memory."
            )
        ray.kill(actor.handle)  # it may be out of reach alone
        for group in groups:
            self.queue.failed(group)
        self._actors[self._actors.index(actor)] = self._started()

    def _check_silence(self) -> None:
        """Raise ClusterError if no group has come for too long."""
        silent_s = time.monotonic() - self._heard_s
        if silent_s > self.spec.rollouts.timeout_s:
            begun = sum(actor.begun is None for actor in self._actors)
            groups = sum(len(actor.work) for actor in self._actors)
            raise ClusterError(
                f"timeout_s={self.spec.rollouts.timeout_s:g}: no group was sampled for {silent_s:.0f} s: {begun} of "
                f"{self.spec.actors} actors have begun and work on {groups} groups ({self.deaths} died before). "
                + ("Wait longer, or make groups smaller." if groups else "Ask for fewer --actors, or free a node.")
            )
