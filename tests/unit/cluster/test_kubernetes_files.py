"""KubeRay's manifests by Kubernetes' schemas, KubeRay's fields and Ray's own reading; numbers as in cluster.yaml."""

import copy
import functools
import shlex
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import tyro
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.scripts.scripts import start
from ray.serve.schema import ServeDeploySchema

PROJECT = Path(__file__).parents[3]
sys.path.append(str(PROJECT / "ray_jobs"))

FILES = {
    name: yaml.safe_load((PROJECT / "deploy" / f"ray-{name}.yaml").read_text())
    for name in ("cluster", "job", "service")
}
AWS = yaml.safe_load((PROJECT / "cluster.yaml").read_text())
SERVE = yaml.safe_load((PROJECT / "serve_config.yaml").read_text())
KUBERNETES = "1.34"
ON_KUBERNETES = {
    "run_dir": "s3://YOUR-BUCKET/runs/d26",
    "max_replicas": 16,
    "replica_gpus": 1,
    "replica_by_label": True,
}
"""What the application has that serve_config.yaml, for one machine, has not."""


def fields(required: str = "", **types: object) -> dict:
    """An object that has no other fields; a type's name stands for its schema."""
    properties = {name: {"type": of} if isinstance(of, str) else of for name, of in types.items()}
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
GROUP = {"resources": STRINGS, "labels": STRINGS, "rayStartParams": STRINGS, "template": "object"}
CLUSTER = fields(
    "headGroupSpec",
    upgradeStrategy="object", suspend="boolean", managedBy="string", headServiceAnnotations=STRINGS,
    enableInTreeAutoscaling="boolean", gcsFaultToleranceOptions="object", rayVersion="string",
    authOptions=fields(enableK8sTokenAuth="boolean", secretName="string", mode={"enum": ["disabled", "token"]}),
    autoscalerOptions=fields(
        resources="object", image="string", imagePullPolicy="string", securityContext="object",
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}, version={"enum": ["v1", "v2"]}, env="array",
        idleTimeoutSeconds=COUNT, envFrom="array", volumeMounts="array",
    ),
    headGroupSpec=fields(
        "template", **GROUP, headService="object", enableIngress="boolean",
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    ),
    workerGroupSpecs={"type": "array", "items": fields(
        "groupName minReplicas maxReplicas template", **GROUP, suspend="boolean", groupName="string", replicas=COUNT,
        minReplicas=COUNT, maxReplicas=COUNT, idleTimeoutSeconds=COUNT, scaleStrategy="object", numOfHosts=COUNT,
    )},
)  # fmt: skip
SPECS = {
    "RayCluster": CLUSTER,
    "RayJob": fields(
        activeDeadlineSeconds=COUNT, backoffLimit=COUNT, rayClusterSpec=CLUSTER, submitterPodTemplate="object",
        metadata=STRINGS, clusterSelector=STRINGS, submitterConfig="object", managedBy="string",
        deletionStrategy="object", entrypoint="string", runtimeEnvYAML="string", jobId="string",
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        entrypointResources="string", entrypointNumCpus="number", entrypointNumGpus="number",
        ttlSecondsAfterFinished=COUNT, preRunningDeadlineSeconds=COUNT, shutdownAfterJobFinishes="boolean",
        suspend="boolean",
    ),
    "RayService": fields(
        rayClusterDeletionDelaySeconds=COUNT, serviceUnhealthySecondThreshold="integer",
        deploymentUnhealthySecondThreshold="integer", serveService="object", upgradeStrategy="object",
        managedBy="string", serveConfigV2="string", rayClusterConfig=CLUSTER, excludeHeadPodFromServeSvc="boolean",
    ),
}  # fmt: skip
"""The fields of ray.io/v1 in KubeRay 1.6.2. Source: docs/reference/api.md of ray-project/kuberay at v1.6.2."""


def problems(files: dict) -> list[str]:
    """Return what is wrong with the manifests."""
    found = []
    for name, manifest in files.items():
        spec = SPECS.get(manifest["kind"], False)
        schema = fields("metadata spec", apiVersion={"const": "ray.io/v1"}, kind="string", metadata="object", spec=spec)
        errors = list(jsonschema.Draft202012Validator(schema).iter_errors(manifest))
        found += [f"{name}: KubeRay: {error.json_path}: {error.message}" for error in errors]
        found += [] if errors else [f"{name}: {problem}" for problem in problems_of_cluster(cluster_of(manifest))]
    return found or problems_of_job(files["job"]["spec"]) + problems_of_service(files["service"]["spec"])


def cluster_of(manifest: dict) -> dict:
    """The Ray cluster that a manifest describes."""
    return {"RayCluster": lambda spec: spec, "RayJob": lambda spec: spec["rayClusterSpec"],
            "RayService": lambda spec: spec["rayClusterConfig"]}[manifest["kind"]](manifest["spec"])  # fmt: skip


def problems_of_cluster(cluster: dict) -> list[str]:
    """Return what is wrong with a Ray cluster: as Ray's autoscaler reads it, its groups are those of cluster.yaml."""
    try:
        read = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "x", "namespace": "x"}, "spec": cluster})
    except Exception as err:  # whatever the autoscaler finds
        return [f"ray: {err}"]
    head, groups = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    checks = {
        "another Ray than pyproject's": not cluster["rayVersion"].startswith("2.60."),
        "starts without a token": cluster.get("authOptions", {}).get("mode") != "token",
        "an autoscaler of version 1, or none": not cluster.get("enableInTreeAutoscaling")
        or cluster["autoscalerOptions"].get("version") != "v2",
        "is open to others": head.get("serviceType") != "ClusterIP" or head.get("enableIngress"),
        "nodes are let go earlier or later": read["idle_timeout_minutes"] != AWS["idle_timeout_minutes"],
        "nodes are asked for faster or slower": read["upscaling_speed"] != AWS["upscaling_speed"],
        "groups of one name": len({group["groupName"] for group in groups}) < len(groups),
    }
    found = [problem for problem, is_so in checks.items() if is_so]
    for name, group in {"head": head, **{group["groupName"]: group for group in groups}}.items():
        as_read = read["available_node_types"]["headgroup" if name == "head" else name]
        found += [f"{name}: {problem}" for problem in problems_of_group(name, group, as_read)]
    return found


def problems_of_group(name: str, group: dict, as_read: dict) -> list[str]:
    """Return what is wrong with a kind of pod."""
    node, pod = AWS["available_node_types"].get(name), group["template"]["spec"]
    if node is None:
        return ["is no node type of cluster.yaml"]
    template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
    try:
        kubernetes_validate.validate(template, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as err:
        return [f"kubernetes: {err.message}"]
    machine, container = node["node_config"], pod["containers"][0]
    options = {option.removeprefix("--") for one in start.params for option in one.opts}
    resources = {kind: amount for kind, amount in as_read["resources"].items() if kind != "memory"}
    shm = [volume["emptyDir"].get("medium") for volume in pod.get("volumes", []) if volume["name"] == "shm"]
    mounts = [mount["mountPath"] for mount in container.get("volumeMounts", []) if mount["name"] == "shm"]
    requests, limits = (container["resources"][kind] for kind in ("requests", "limits"))
    gpus, place = node["resources"].get("GPU", 0), pod.get("nodeSelector", {})
    checks = {
        "its resources are not cluster.yaml's": resources != node["resources"],
        "its labels are not cluster.yaml's": as_read["labels"] != node["labels"],
        "its numbers are not cluster.yaml's": name != "head"
        and any(as_read[key] != node[key] for key in ("min_workers", "max_workers")),
        "its image is not cluster.yaml's": container.get("image") != AWS["docker"]["image"],
        "`ray start` has no such option": not group.get("rayStartParams", {}).keys() <= options,
        "another machine": place.get("node.kubernetes.io/instance-type") != machine["InstanceType"],
        "another price": place.get("karpenter.sh/capacity-type")
        != machine.get("InstanceMarketOptions", {"MarketType": "on-demand"})["MarketType"],
        "its machines with GPUs turn it away": gpus
        and not any(one["key"] == "nvidia.com/gpu" for one in pod.get("tolerations", [])),
        "Ray's memory is not /dev/shm": shm != ["Memory"] or mounts != ["/dev/shm"],
        "Kubernetes may end it for its memory": requests.get("memory") != limits.get("memory"),
        "asks for all of its machine": int(requests["cpu"]) >= MACHINE_CPUS[machine["InstanceType"]],
        "is started again as the same node": pod.get("restartPolicy") != "Never",
        "runs as root": not pod.get("securityContext", {}).get("runAsNonRoot"),
        "may talk to Kubernetes": name != "head" and pod.get("automountServiceAccountToken") is not False,
    }
    return [problem for problem, is_so in checks.items() if is_so]


MACHINE_CPUS = {
    node["node_config"]["InstanceType"]: node["resources"]["CPU"] or 8 for node in AWS["available_node_types"].values()
}


def problems_of_job(spec: dict) -> list[str]:
    """Return what is wrong with the job: its command is the one that cluster.yaml shows, and can be read."""
    import pretrain

    python, script, *flags = shlex.split(spec["entrypoint"])
    shown = (PROJECT / "cluster.yaml").read_text().split("#     ")[1].splitlines()[0]
    checks = {
        "another command than cluster.yaml's": shlex.split(shown)
        != [python, script.removeprefix("/home/ray/nanochat/"), *flags],
        "is not tried again": not spec.get("backoffLimit"),
        "its machines stay": not spec.get("shutdownAfterJobFinishes"),
        "it has no place for the stage's work": [
            group["groupName"] for group in spec["rayClusterSpec"]["workerGroupSpecs"]
        ]
        != ["data", "train"],
    }
    try:
        tyro.cli(functools.wraps(pretrain.pretrain)(lambda **_: 0), args=flags)
    except SystemExit:
        return ["job: a flag that is none"]
    return [f"job: {problem}" for problem, is_so in checks.items() if is_so]


def problems_of_service(spec: dict) -> list[str]:
    """Return what is wrong with the service: it serves what serve_config.yaml does."""
    config = yaml.safe_load(spec["serveConfigV2"])
    try:
        ServeDeploySchema.model_validate(config)
    except ValueError as err:
        return [f"service: serve: {err}"]
    expected = copy.deepcopy(SERVE) | {"http_options": SERVE["http_options"] | {"host": "0.0.0.0"}}
    expected["applications"][0]["args"] |= ON_KUBERNETES
    cluster = spec["rayClusterConfig"]
    containers = [
        group["template"]["spec"]["containers"][0] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]
    checks = {
        "is not serve_config.yaml's": config != expected,
        "nobody brings the keys": any(
            "NANOCHAT_API_KEYS" not in {one["name"] for one in container.get("env", [])} for container in containers
        ),
        "its replicas have no place": [group["groupName"] for group in cluster["workerGroupSpecs"]] != ["serve"],
    }
    return [f"service: {problem}" for problem, is_so in checks.items() if is_so]


def test_the_manifests_are_sound():
    assert problems(FILES) == []


def changed(path: str, value: object) -> dict:
    """The manifests with one thing changed; None deletes it. Numbers in the path choose a group or a container."""
    files = copy.deepcopy(FILES)
    *parents, last = (int(name) if name.isdigit() else name for name in path.split("|"))
    place = files
    for name in parents:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return files


GROUPS = "cluster|spec|workerGroupSpecs"
POD = f"{GROUPS}|1|template|spec"
RAY = f"{POD}|containers|0"
CONFIG = FILES["service"]["spec"]["serveConfigV2"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("cluster|apiVersion", "ray.io/v1alpha1", "KubeRay: $.apiVersion"),
        ("cluster|kind", "RayClusters", "KubeRay: $"),
        ("cluster|spec|autoscalerOption", {}, "KubeRay: $.spec"),
        ("cluster|spec|autoscalerOptions|upscalingMode", "Fast", "KubeRay: $.spec.autoscalerOptions"),
        (f"{GROUPS}|1|minReplica", 0, "KubeRay: $.spec.workerGroupSpecs[1]"),
        (f"{GROUPS}|1|maxReplicas", None, "KubeRay: $.spec.workerGroupSpecs[1]"),
        (f"{GROUPS}|1|rayStartParams|num-cpus", 192, "KubeRay: $.spec.workerGroupSpecs[1]"),
        ("job|spec|backofLimit", 3, "KubeRay: $.spec"),
        ("service|spec|rayClusterSpec", {}, "KubeRay: $.spec"),
        (f"{GROUPS}|1|labels|work", "not a label!", "ray: "),
        (f"{RAY}|resources|limit", {}, "kubernetes: "),
        (f"{POD}|tolerance", [], "kubernetes: "),
        (f"{RAY}|volumeMounts|0|path", "/dev/shm", "kubernetes: "),
        (f"{RAY}|name", None, "kubernetes: "),
        ("cluster|spec|rayVersion", "2.9.0", "another Ray"),
        ("cluster|spec|authOptions", None, "without a token"),
        ("job|spec|rayClusterSpec|authOptions|mode", "disabled", "without a token"),
        ("cluster|spec|enableInTreeAutoscaling", False, "autoscaler of version 1"),
        ("cluster|spec|autoscalerOptions|version", "v1", "autoscaler of version 1"),
        ("cluster|spec|autoscalerOptions|idleTimeoutSeconds", 60, "let go earlier"),
        ("cluster|spec|autoscalerOptions|upscalingMode", "Default", "asked for faster"),
        ("cluster|spec|headGroupSpec|serviceType", "LoadBalancer", "open to others"),
        ("service|spec|rayClusterConfig|headGroupSpec|enableIngress", True, "open to others"),
        ("cluster|spec|headGroupSpec|rayStartParams", {}, "head: its resources"),
        (f"{GROUPS}|0|groupName", "train", "groups of one name"),
        (f"{GROUPS}|1|groupName", "training", "is no node type"),
        (f"{GROUPS}|1|minReplicas", 1, "train: its numbers"),
        (f"{GROUPS}|1|maxReplicas", 9, "train: its numbers"),
        (f"{GROUPS}|1|numOfHosts", 2, "train: its numbers"),
        (f"{GROUPS}|1|labels|work", "serve", "train: its labels"),
        (f"{GROUPS}|1|rayStartParams|num-cpus", "96", "train: its resources"),
        (f"{RAY}|resources|limits|nvidia.com/gpu", "4", "train: its resources"),
        (f"{GROUPS}|1|rayStartParams|num-gpu", "8", "no such option"),
        (f"{RAY}|image", "YOUR-REGISTRY/nanochat-on-ray:latest", "its image"),
        (f"{RAY}|image", None, "its image"),
        (f"{POD}|nodeSelector|node.kubernetes.io/instance-type", "p4d.24xlarge", "another machine"),
        (f"{POD}|nodeSelector|karpenter.sh/capacity-type", "spot", "another price"),
        (f"{POD}|tolerations", [], "turn it away"),
        (f"{POD}|volumes|0|emptyDir", {}, "not /dev/shm"),
        (f"{RAY}|volumeMounts", [], "not /dev/shm"),
        (f"{RAY}|resources|limits|memory", "900Gi", "end it for its memory"),
        (f"{RAY}|resources|requests|cpu", "192", "all of its machine"),
        (f"{POD}|restartPolicy", "Always", "started again"),
        (f"{POD}|securityContext", {}, "runs as root"),
        (f"{POD}|automountServiceAccountToken", True, "may talk to Kubernetes"),
        ("job|spec|entrypoint", "python /home/ray/nanochat/ray_jobs/pretrain.py --dept 26", "a flag that is none"),
        ("job|spec|entrypoint", "python /home/ray/nanochat/ray_jobs/pretrain.py --depth 26", "another command"),
        ("job|spec|backoffLimit", 0, "is not tried again"),
        ("job|spec|shutdownAfterJobFinishes", False, "its machines stay"),
        ("job|spec|rayClusterSpec|workerGroupSpecs", [], "no place for the stage"),
        ("service|spec|serveConfigV2", CONFIG.replace("import_path", "import"), "serve: "),
        ("service|spec|serveConfigV2", CONFIG.replace("max_running: 32", "max_running: 64"), "not serve_config.yaml's"),
        ("service|spec|serveConfigV2", CONFIG.replace("0.0.0.0", "127.0.0.1"), "not serve_config.yaml's"),
        ("service|spec|rayClusterConfig|workerGroupSpecs|0|template|spec|containers|0|env", [], "brings the keys"),
        ("service|spec|rayClusterConfig|workerGroupSpecs", [], "have no place"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_them_is_found(path, value, message):
    found = problems(changed(path, value))
    assert any(message in problem for problem in found), found
