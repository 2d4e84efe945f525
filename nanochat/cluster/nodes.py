"""What a cluster's nodes are: enough for what is asked, each kind of work on its own, all of one software.

A node with the label `work` = data, train, rollouts or serve is meant for that; cluster.yaml gives its node types such
labels, `--by-label` makes jobs obey them.
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Mapping
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
ANSWER_S = 60.0
"""How long a node may take to say what it runs."""


def on_nodes_for(work: Work, cluster: ClusterConfig) -> dict[str, dict[str, str]]:
    """Return the option of a task, actor or worker group that places it; none unless the cluster goes by labels."""
    return {"label_selector": {WORK_LABEL: work}} if cluster.by_label else {}


def resources(work: Work, cluster: ClusterConfig) -> dict[str, float]:
    """Return what the nodes have that are there now and may do this work."""
    total: dict[str, float] = {}
    for node in ray.nodes():
        if node["Alive"] and (not cluster.by_label or node["Labels"].get(WORK_LABEL) == work):
            for kind, amount in node["Resources"].items():
                total[kind] = total.get(kind, 0.0) + amount
    return total


def check_resources(
    asked: str,
    needed: Mapping[str, float],
    work: Work,
    cluster: ClusterConfig,
    remedy: str,
    note: Callable[[str], None],
) -> None:
    """Raise ClusterError if so much is neither there nor can be added; what can be added is waited for, with a note."""
    have, most = resources(work, cluster), state.get_max_resources_from_cluster_config()
    for kind, amount in needed.items():
        there = have.get(kind, 0.0)
        if amount <= there:
            continue
        more = 0 if most is None else max(0, most.get(kind, 0) - there)
        lack = f"{asked}: needs {amount:g} {kind}, the cluster has {there:g}"
        lack += f" on nodes with the label {WORK_LABEL}={work}" if cluster.by_label else ""
        lack += "" if most is None else f", at most {more:g} can be added"
        if amount > there + more:
            raise ClusterError(f"{lack}. {remedy}")
        note(f"{lack}. Waiting for nodes.")


def software() -> dict[str, str]:
    """Return what must be alike on all nodes: versions, a hash of this package's own code, and how Ray knows its own.

    Of torch the release alone: nodes with and without GPUs have different builds of it. Where some demand a token and
    others do not, objects of one are lost to the other without a word of why.
    """
    code = hashlib.sha256()
    folder = Path(nanochat.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        code.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return {
        "Python": platform.python_version(),
        "Ray": ray.__version__,
        "torch": importlib.metadata.version("torch").partition("+")[0],
        "nanochat": f"{nanochat.__version__} (code {code.hexdigest()[:12]})",
        "RAY_AUTH_MODE": "token" if is_token_auth_enabled() else "disabled",
    }


def check_nodes(run_dir: str) -> None:
    """Ask every node what it runs, and whether it sees the run directory.

    Raises: ClusterError if one runs other software than this process (results would differ without a word), does not
    see the directory (checkpoints would be lost), or does not answer.
    """
    path = storage.absolute(run_dir)
    answers: dict[Any, str] = {}
    for node in ray.nodes():
        if node["Alive"]:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(_answer)
            answers[task.remote(path)] = node["NodeManagerAddress"]
    ready, late = ray.wait(list(answers), num_returns=len(answers), timeout=ANSWER_S)
    if late:
        names = ", ".join(sorted(answers[one] for one in late))
        raise ClusterError(f"nodes={names}: have not answered for {ANSWER_S:g} s. Look at them with `ray status`.")
    mine = software()
    for one in ready:
        node = f"node={answers[one]}"
        try:
            theirs, sees_it = ray.get(one)
        except (ray.exceptions.RayError, NanochatError) as err:
            raise ClusterError(
                f"{node}: cannot run this project ({type(err).__name__}: {excerpt(str(err).splitlines()[-1])}). "
                "Install it there, or use the Dockerfile's image."
            ) from err
        for name, version in mine.items():
            if theirs[name] != version:
                remedy = (
                    "Use one image for all nodes, and one RAY_AUTH_MODE to start Ray and for jobs (token by default)."
                )
                raise ClusterError(f"{node}: has {name} {theirs[name]}, the driver {version}. {remedy}")
        if not sees_it:
            raise ClusterError(f"{node}: does not see run_dir={run_dir}. Put it where all nodes see it, or use a URI.")


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
