"""Joining or starting Ray, quietly, and a `map` that runs on it.

A job on a laptop starts its own Ray (nodes meet on loopback; Ray's agents listen on all interfaces, and the token of
`environment.py` guards them), with more logical CPUs than cores so that data tasks never wait for
training workers; under `ray job submit`, or with an address, it joins the cluster. Ray's own messages go to the log.
"""

import contextlib
import functools
import logging
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.data

from nanochat import storage
from nanochat.cluster.nodes import ANYWHERE, check_nodes, check_resources, claim, on_nodes_for
from nanochat.cluster.terminal import with_story
from nanochat.config.cluster import ClusterConfig
from nanochat.errors import ClusterError, ConfigError, excerpt
from nanochat.run_context import RunContext

PACKAGE_PLACE = "/runtime_resources/working_dir_files/"
"""Where Ray unpacks what `ray job submit --working-dir` sends."""
LOCAL_MIN_CPUS = 4
MAX_LOSSES = 4
"""So many actors may be lost at one piece of work before it is taken for their cause."""
LOCAL_OBJECT_STORE_BYTES = 512 << 20


class _Session:
    """Where Ray's words go, and how it is started when something first needs it."""

    def __init__(self, config: ClusterConfig, run_dir: str, handler: logging.FileHandler, is_alone: bool) -> None:
        self.address, self.run_dir, self.handler = address_of(config), storage.absolute(run_dir), handler
        self.is_alone = is_alone
        self.loggers = [logging.getLogger(name) for name in ("ray", "ray.data", "ray.train")]
        self.is_started = False

    def start(self) -> None:
        """Join or start Ray, once; signals keep their handlers: Ray's own ends the process with a C++ trace."""
        if self.is_started:
            return
        self.is_started = True
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        context = _start_local() if self.address is None else _join(self.address)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for logger in self.loggers:
            logger.handlers[:] = [self.handler]
            logger.propagate = False
            logger.setLevel(logging.INFO)
        self.loggers[0].info("the logs of Ray's processes are in %s/logs", context.address_info["session_dir"])
        ray.data.DataContext.get_current().enable_progress_bars = False
        if self.address is not None:
            check_nodes(self.run_dir)
            if self.is_alone:
                self.claim = claim(self.run_dir)

    def end(self) -> None:
        """Leave or end Ray."""
        if self.is_started:
            ray.shutdown()
        for logger in self.loggers:
            logger.handlers[:] = []
        self.handler.close()


_sessions: list[_Session] = []
"""The session that is open, if one is: Ray, too, is one for a process."""


@contextlib.contextmanager
def session(config: ClusterConfig, run_dir: str, is_alone: bool = True) -> Iterator[None]:
    """Have a Ray for the time of the block: `start_ray` joins or starts it when something first needs it.

    What Ray says goes to the run directory's `ray_log`. `is_alone` refuses a second such session of the cluster in the
    same run directory. Entry points call `environment.set_ray_environment()` before they import this module.

    Raises: ConfigError for a run directory in a job's own copy of the project.
    """
    log_path = storage.RunFolder(run_dir).ray_log
    if PACKAGE_PLACE in storage.absolute(run_dir):
        raise ConfigError(
            f"run_dir={run_dir}: lies in this job's own copy of the project, which goes when the job ends. "
            "Name a folder that all nodes share, from its root on, or a URI."
        )
    os.makedirs(os.path.dirname(log_path) or ".", exist_ok=True)
    handler = logging.FileHandler(log_path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    _sessions.append(_Session(config, run_dir, handler, is_alone))
    try:
        # Ray prints some of its warnings, and what its nodes say of workers that die.
        with contextlib.redirect_stderr(handler.stream), contextlib.redirect_stdout(handler.stream):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _sessions.pop().end()


def start_ray() -> None:
    """Join or start the Ray of the open session, if that has not happened yet.

    Raises: ClusterError if the address does not answer or wants another token, or for a node as `check_nodes`;
    ConfigError if another job of the cluster is at work in the run directory.
    """
    _sessions[-1].start()


def address_of(config: ClusterConfig) -> str | None:
    """Return the address of the cluster to join; None = this machine alone."""
    return config.address or os.environ.get("RAY_ADDRESS")


def _join(address: str) -> Any:
    try:
        return ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, TimeoutError, ValueError) as err:
        raise ClusterError(
            f"address={address}: no Ray answers there ({err}). Start one, or leave the address out."
        ) from err
    except ray.exceptions.AuthenticationError as err:
        raise ClusterError(
            f"address={address}: wants another token than this process has ({excerpt(err.message)}). "
            "Copy the head's ~/.ray/auth_token here, and set RAY_AUTH_MODE as it is set there."
        ) from err


def _start_local() -> Any:
    # A control store of one's own that is gone does not come back: not 60 s of waiting for it.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    memory = psutil.virtual_memory()
    token_folder = Path.home() / ".ray"
    token_folder.mkdir(exist_ok=True)
    token_folder.chmod(0o700)  # Ray would write the token there for all users to read
    return ray.init(
        address="local",
        num_cpus=max(LOCAL_MIN_CPUS, psutil.cpu_count() or 1),
        object_store_memory=min(LOCAL_OBJECT_STORE_BYTES, memory.available // 4),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )


def ray_map(fn: Callable[[Any], Any], items: Iterable[Any], cluster: ClusterConfig = ANYWHERE) -> Iterator[Any]:
    """Apply a function to every item in parallel tasks, on nodes for data; results come in the items' order.

    A task whose worker or node dies is run again, up to three times. Raises: what `fn` raised, as it was.
    """
    start_ray()
    task = ray.remote(max_retries=3, **on_nodes_for("data", cluster))(_apply)
    function = ray.put(fn)
    ahead = 2 * int(ray.cluster_resources().get("CPU", 1))  # also bounds what still runs after an error
    pending: deque[Any] = deque()
    try:
        for item in items:
            pending.append(task.remote(function, item))
            if len(pending) > ahead:
                yield ray.get(pending.popleft())
        while pending:
            yield ray.get(pending.popleft())
    except ray.exceptions.RayTaskError as err:
        raise with_story(err.cause, "in a task", str(err)) from None


def _apply(fn: Callable[[Any], Any], item: Any) -> Any:
    return fn(item)


class _Actor:
    """Keeps a callable, and what it loads, in a process of its own."""

    def __init__(self, fn: Callable[[Any], Any]) -> None:
        self.fn = fn

    def apply(self, item: Any) -> Any:
        """Call it."""
        return self.fn(item)


class _ActorPool:
    """Actors that hold a function; one that is lost, or cannot be reached, is replaced and its item given again.

    Ray's own retries are not used: those of a node that has just gone are spent in seconds, before it is known as gone.
    """

    def __init__(self, fn: Callable[[Any], Any], actors: int, options: dict[str, Any]) -> None:
        self.fn, self.start = ray.put(fn), ray.remote(_Actor).options(**options).remote
        self.free = deque(self.start(self.fn) for _ in range(actors))
        self.running: dict[Any, tuple[int, Any, Any]] = {}
        """For each result that is due the item's number, the item, and its actor."""
        self.done: dict[int, Any] = {}
        self.losses: Counter[int] = Counter()

    def give(self, number: int, item: Any) -> None:
        """Let a free actor do an item."""
        actor = self.free.popleft()
        self.running[actor.apply.remote(item)] = (number, item, actor)

    def collect(self) -> None:
        """Wait for one result and keep it, or replace an actor. Raises: ClusterError for an item that kills them."""
        (ready,), _ = ray.wait(list(self.running), num_returns=1)
        number, item, actor = self.running.pop(ready)
        try:
            self.done[number] = ray.get(ready)
        except ray.exceptions.RayActorError as err:
            self.losses[number] += 1
            if self.losses[number] == MAX_LOSSES:
                raise ClusterError(
                    f"actors: {MAX_LOSSES} were lost at the same work ({excerpt(err)}). Look into Ray's log for why."
                ) from err
            ray.kill(actor)
            self.free.appendleft(self.start(self.fn))
            self.give(number, item)
        else:
            self.free.append(actor)

    def end(self) -> None:
        """End all of them."""
        for actor in [*self.free, *(actor for *_, actor in self.running.values())]:
            ray.kill(actor)


def actor_map(
    actors: int, num_gpus: float, cluster: ClusterConfig = ANYWHERE, note: Callable[[str], None] = print
) -> Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]:
    """Return a map over so many actors, each of which keeps the function, and the model that it loads.

    An actor that is lost is replaced and its item done again, up to three times; results come in the items' order.
    Raises: what the function raised, as it was; ClusterError if there is no room, or for an item that kills actors.
    """

    def apply_all(fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        start_ray()
        kind, each = ("GPU", num_gpus) if num_gpus else ("CPU", 0.5)
        check_resources(f"actors={actors}", [{kind: each}] * actors, "train", cluster, "Ask for fewer --actors.", note)
        options = {"num_cpus": 0 if num_gpus else each, "num_gpus": num_gpus} | on_nodes_for("train", cluster)
        pool = _ActorPool(fn, actors, options)
        give = 0
        try:
            for number, item in enumerate(items):
                while not pool.free:
                    pool.collect()
                pool.give(number, item)
                while give in pool.done:
                    yield pool.done.pop(give)
                    give += 1
            while pool.running or pool.done:
                while give not in pool.done:
                    pool.collect()
                yield pool.done.pop(give)
                give += 1
        except ray.exceptions.RayTaskError as err:
            raise with_story(err.cause, "in an actor", str(err)) from None
        finally:
            pool.end()

    return apply_all


def ray_context(progress: Callable[[str], None], cluster: ClusterConfig = ANYWHERE) -> RunContext:
    """Return the driver's run context: its `map` runs on the cluster."""
    return RunContext(map=functools.partial(ray_map, cluster=cluster), progress=progress)
