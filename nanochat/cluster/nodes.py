"""What a cluster's nodes are: enough for what is asked, each kind of work on its own, all of one software.

A node with the label `work` = data, train, rollouts or serve is meant for that; cluster.yaml gives its node types such
labels, `--by-label` makes jobs obey them.
"""

import hashlib
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ray
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.state import state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import nanochat
from nanochat import storage
from nanochat.config.cluster import ClusterConfig
from nanochat.errors import ClusterError, ConfigError, NanochatError, excerpt

Work = Literal["data", "train", "rollouts", "serve"]
WORK_LABEL = "work"
ANYWHERE = ClusterConfig()
UNBOUNDED = 1000
"""Nodes that a group without a bound is taken to have."""
ANSWER_S = 60.0
"""How long a node may take to say what it runs."""
MAY_BE_GONE = (
    ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError
)  # fmt: skip
"""What a task says of a node that has just died, or just come: not all of a cluster know it at the same moment."""


def on_nodes_for(work: Work, cluster: ClusterConfig) -> dict[str, dict[str, str]]:
    """Return the option of a task, actor or worker group that places it; none unless the cluster goes by labels."""
    return {"label_selector": {WORK_LABEL: work}} if cluster.by_label else {}


def resources(work: Work, cluster: ClusterConfig) -> dict[str, float]:
    """Return what the nodes have, all together, that are there now and may do this work."""
    return _sum(_nodes_for(work, cluster))


def training_gpus(cluster: ClusterConfig) -> tuple[int, bool]:
    """Return how many GPUs there are now for models, and whether these are to be on GPUs, which may come later."""
    gpus = int(resources("train", cluster).get("GPU", 0))
    return gpus, gpus > 0 if cluster.use_gpu is None else cluster.use_gpu


def _nodes_for(work: Work, cluster: ClusterConfig) -> list[dict[str, float]]:
    alive = (node for node in ray.nodes() if node["Alive"])
    return [node["Resources"] for node in alive if not cluster.by_label or node["Labels"].get(WORK_LABEL) == work]


def _sum(bundles: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for bundle in bundles:
        for kind, amount in bundle.items():
            total[kind] = total.get(kind, 0.0) + amount
    return total


def check_resources(
    asked: str,
    bundles: Sequence[Mapping[str, float]],
    work: Work,
    cluster: ClusterConfig,
    remedy: str,
    note: Callable[[str], None],
) -> None:
    """Refuse what the cluster can never have: `bundles`, each of which one process needs on one node.

    What can be added is waited for, with a note. Raises: ClusterError.
    """
    nodes, groups = _nodes_for(work, cluster), _groups_for(work, cluster)
    have, most = _sum(nodes), _sum(node for node, count in groups or () for _ in range(count))
    for kind, amount in _sum(bundles).items():
        there = have.get(kind, 0.0)
        if amount <= there:
            continue
        more = max(0, most.get(kind, 0) - there)
        lack = f"{asked}: needs {amount:g} {kind}, the cluster has {there:g}"
        lack += f" on nodes with the label {WORK_LABEL}={work}" if cluster.by_label else ""
        lack += "" if groups is None else f", at most {more:g} can be added"
        if amount > there + more:
            raise ClusterError(f"{lack}. {remedy}")
        note(f"{lack}. Waiting for nodes.")
    sizes = nodes + [node for node, count in groups or () if count]
    for bundle in bundles:
        if not any(all(size.get(kind, 0.0) >= amount for kind, amount in bundle.items()) for size in sizes):
            one = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items() if amount)
            raise ClusterError(f"{asked}: each needs {one} on one node, and no node has so much. {remedy}")


def _groups_for(work: Work, cluster: ClusterConfig) -> list[tuple[dict[str, float], int]] | None:
    """Return of each group of nodes that the autoscaler may start what one has, and how many there may be in all.

    None = there is no autoscaler. Ray knows a group's name but not its labels: where groups are named as kinds of work
    are, as in cluster.yaml, the name counts for the label.
    """
    config = state.get_cluster_config()
    if config is None or not config.node_group_configs:
        return None
    groups = list(config.node_group_configs)
    if cluster.by_label and any(group.name == work for group in groups):
        groups = [group for group in groups if group.name == work]
    return [(dict(group.resources), UNBOUNDED if group.max_count < 0 else group.max_count) for group in groups]


def software() -> dict[str, str]:
    """Return what must be alike on all nodes: versions, a hash of this package's own code, and how Ray knows its own.

    Of torch the release alone: nodes with and without GPUs have different builds of it. Where some demand a token and
    others do not, objects of one are lost to the other without a word of why.
    """
    code = hashlib.sha256()
    folder = Path(nanochat.__file__).parent
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.cpp")]):
        code.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return {
        "Python": platform.python_version(),
        "Ray": ray.__version__,
        "torch": importlib.metadata.version("torch").partition("+")[0],
        "nanochat": f"{nanochat.__version__} (code {code.hexdigest()[:12]})",
        "RAY_AUTH_MODE": "token" if is_token_auth_enabled() else "disabled",
    }


def check_software(drivers: Mapping[str, str], nodes: Mapping[str, str], node: str) -> None:
    """Raise ClusterError if a node does not run what the driver does: results would differ without a word.

    Processes that train or sample ask it of themselves, for they may be on a node that came after `check_nodes`.
    """
    for name, version in drivers.items():
        if nodes[name] != version:
            remedy = "Use one image for all nodes, and one RAY_AUTH_MODE to start Ray and for jobs (token by default)."
            raise ClusterError(f"node={node}: has {name} {nodes[name]}, the driver {version}. {remedy}")


def check_nodes(run_dir: str) -> None:
    """Ask every node what it runs, and whether it sees the run directory.

    One that dies meanwhile is none of them. Raises: ClusterError if one runs other software than this process, does not
    see the directory (checkpoints would be lost), or does not answer.
    """
    path, mine, deadline = storage.absolute(run_dir), software(), time.monotonic() + ANSWER_S
    asked = {_ask(node, path): node for node in _alive().items()}
    failed: dict[str, Exception] = {}
    while asked:
        ready, _ = ray.wait(list(asked), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            for id, address in asked.values():
                if id in failed:
                    raise _unable(address, failed[id])
            names = ", ".join(sorted(address for _, address in asked.values()))
            raise ClusterError(f"nodes={names}: have not answered for {ANSWER_S:g} s. Look at them with `ray status`.")
        node = asked.pop(ready[0])
        id, address = node
        try:
            theirs, sees_it = ray.get(ready[0])
        except (ray.exceptions.RayError, NanochatError) as err:
            if id not in _alive():
                continue
            if isinstance(err, MAY_BE_GONE) and time.monotonic() < deadline:
                failed[id] = err
                time.sleep(1)
                asked[_ask(node, path)] = node
                continue
            raise _unable(address, err) from err
        check_software(mine, theirs, address)
        if not sees_it:
            raise ClusterError(
                f"node={address}: does not see run_dir={run_dir}. Put it where all nodes see it, or use a URI."
            )


def _alive() -> dict[str, str]:
    """Return the address of each living node, by its id."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _unable(address: str, err: Exception) -> ClusterError:
    return ClusterError(
        f"node={address}: cannot run this project ({type(err).__name__}: {excerpt(str(err).splitlines()[-1])}). "
        "Install it there, or use the Dockerfile's image."
    )


def _ask(node: tuple[str, str], path: str) -> Any:
    here = NodeAffinitySchedulingStrategy(node[0], soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(_answer).remote(path)


class _Claim:
    """An actor that is there as long as the job that started it."""


def claim(run_dir: str) -> Any:
    """Keep a run directory to this job among all of the cluster, as long as the result is held.

    A lock file (`storage.claimed`) is one machine's; behind a URI there is none. Raises: ConfigError if another has it.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": f"claim of {run_dir}", "namespace": "nanochat", "num_cpus": 0, "scheduling_strategy": here}
    try:
        return ray.remote(_Claim).options(**options).remote()
    except ValueError as err:
        raise ConfigError(
            f"run_dir={run_dir}: another job of this cluster is at work in it. Wait for its end, or use another."
        ) from err


def _answer(run_dir: str) -> tuple[dict[str, str], bool]:
    return software(), storage.exists(run_dir) or not storage.is_local(run_dir)
