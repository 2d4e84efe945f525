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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.data

from nanochat import storage
from nanochat.cluster.nodes import ANYWHERE, check_nodes, check_resources, on_nodes_for
from nanochat.cluster.terminal import with_story
from nanochat.config.cluster import ClusterConfig
from nanochat.errors import ClusterError, ConfigError, excerpt
from nanochat.run_context import RunContext

PACKAGE_PLACE = "/runtime_resources/working_dir_files/"
"""Where Ray unpacks what `ray job submit --working-dir` sends."""
LOCAL_MIN_CPUS = 4
LOCAL_OBJECT_STORE_BYTES = 512 << 20


@contextlib.contextmanager
def session(config: ClusterConfig, run_dir: str) -> Iterator[None]:
    """Join or start Ray for the time of the block; what Ray says goes to the run directory's `ray_log`.

    Entry points call `environment.set_ray_environment()` before they import this module.

    Raises: ClusterError if the address does not answer, or for a node of the cluster as `check_nodes`; ConfigError for
    a run directory in a job's own copy of the project.
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
    loggers = [logging.getLogger(name) for name in ("ray", "ray.data", "ray.train")]
    address = address_of(config)
    try:
        if address is None:
            context = _start_local()
        else:
            context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, TimeoutError, ValueError) as err:
        raise ClusterError(
            f"address={address}: no Ray answers there ({err}). Start one, or leave the address out."
        ) from err
    for logger in loggers:
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO)
    loggers[0].info("the logs of Ray's processes are in %s/logs", context.address_info["session_dir"])
    ray.data.DataContext.get_current().enable_progress_bars = False
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own ends the process with a C++ trace
    try:
        # Ray prints some of its warnings, and what its nodes say of workers that die.
        with contextlib.redirect_stderr(handler.stream), contextlib.redirect_stdout(handler.stream):
            if address is not None:
                check_nodes(run_dir)
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
        ray.shutdown()
        for logger in loggers:
            logger.handlers[:] = []
        handler.close()


def address_of(config: ClusterConfig) -> str | None:
    """Return the address of the cluster to join; None = this machine alone."""
    return config.address or os.environ.get("RAY_ADDRESS")


def _start_local() -> Any:
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


def actor_map(
    actors: int, num_gpus: float, cluster: ClusterConfig = ANYWHERE, note: Callable[[str], None] = print
) -> Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]:
    """Return a map over so many actors, each of which keeps the function, and the model that it loads.

    An actor that dies is started again and its item done again, an item up to three times; results come in the items'
    order. Raises: what the function raised, as it was.
    """

    def apply_all(fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        kind, each = ("GPU", num_gpus) if num_gpus else ("CPU", 0.5)
        check_resources(f"actors={actors}", {kind: actors * each}, "train", cluster, "Ask for fewer --actors.", note)
        options = {"num_cpus": 0 if num_gpus else each, "num_gpus": num_gpus, "max_restarts": -1, "max_task_retries": 3}
        options |= on_nodes_for("train", cluster)
        pool = [ray.remote(_Actor).options(**options).remote(fn) for _ in range(actors)]
        free = deque(pool)
        running: dict[Any, tuple[int, Any]] = {}
        done: dict[int, Any] = {}
        give = 0
        try:
            for number, item in enumerate(items):
                if not free:
                    _collect(running, done, free)
                actor = free.popleft()
                running[actor.apply.remote(item)] = (number, actor)
                while give in done:
                    yield done.pop(give)
                    give += 1
            while running or done:
                while give not in done:
                    _collect(running, done, free)
                yield done.pop(give)
                give += 1
        except ray.exceptions.RayTaskError as err:
            raise with_story(err.cause, "in an actor", str(err)) from None
        except ray.exceptions.RayActorError as err:
            raise ClusterError(
                f"actors: one died four times at the same work ({excerpt(err)}). Look into Ray's log for why."
            ) from err
        finally:
            for actor in pool:
                ray.kill(actor)

    return apply_all


def _collect(running: dict[Any, tuple[int, Any]], done: dict[int, Any], free: deque[Any]) -> None:
    """Wait for one result and keep it under its item's number."""
    (ready,), _ = ray.wait(list(running), num_returns=1)
    number, actor = running.pop(ready)
    done[number] = ray.get(ready)
    free.append(actor)


def ray_context(progress: Callable[[str], None], cluster: ClusterConfig = ANYWHERE) -> RunContext:
    """Return the driver's run context: its `map` runs on the cluster."""
    return RunContext(map=functools.partial(ray_map, cluster=cluster), progress=progress)
