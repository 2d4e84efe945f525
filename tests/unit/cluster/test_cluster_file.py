"""The files for `ray up` by Ray's validator, EC2's field names, and what else would only show on a paid machine."""

import copy
import functools
import re
from pathlib import Path

import botocore.session
import botocore.validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

PROJECT = Path(__file__).parents[3]
CONFIG = yaml.safe_load((PROJECT / "cluster.yaml").read_text())
OWN_MACHINES = yaml.safe_load((PROJECT / "deploy" / "own-machines.yaml").read_text())
MACHINES = {"m7i.2xlarge": (8, 0), "m7i.16xlarge": (64, 0), "p5.48xlarge": (192, 8), "g6.48xlarge": (192, 8),
            "g6.12xlarge": (48, 4)}  # fmt: skip
"""vCPUs and GPUs. Source: aws.amazon.com/ec2/instance-types, 2026-11."""
EMPTY = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")


def problems(config: dict) -> list[str]:
    """Return what is wrong with a cluster file."""
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as err:  # whatever the validator finds
        return [f"ray: {err}"]
    found = []
    if config["provider"]["type"] != "local":  # its defaults are empty
        found += [f"{name}: must be written out" for name in EMPTY if config.get(name) != []]
    elif "--gpus" not in config["docker"]["run_options"]:
        found.append("docker: its containers see no GPU")
    for name, node in config.get("available_node_types", {}).items():
        found += [f"{name}: {problem}" for problem in problems_of_node(config, name, node)]
    for kind in ("head", "worker"):
        if not any(
            "RAY_AUTH_MODE=token" in line and "ray start" in line for line in config[f"{kind}_start_ray_commands"]
        ):
            found.append(f"{kind}: starts without a token")
    if not any("--dashboard-host=127.0.0.1" in line for line in config["head_start_ray_commands"]):
        found.append("head: the dashboard listens to others")
    if "~/.ray/auth_token" not in config["file_mounts"].values():
        found.append("file_mounts: nobody brings the token")
    if "IpPermissions" in config["provider"].get("security_group", {}):
        found.append("provider: ports are open to others")
    return found


@functools.cache
def fields_of_ec2():
    """What EC2 calls a machine's properties."""
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def problems_of_node(config: dict, name: str, node: dict) -> list[str]:
    """Return what is wrong with a node type."""
    machine, docker, is_head = node["node_config"], node.get("docker", {}), name == config["head_node_type"]
    report = botocore.validate.ParamValidator().validate(machine | {"MinCount": 1, "MaxCount": 1}, fields_of_ec2())
    cpus, gpus = MACHINES.get(machine.get("InstanceType"), (0, 0))
    image = docker.get("worker_image", config["docker"]["image"])
    expected = {"CPU": 0} if is_head else {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    checks = {
        report.generate_report(): bool(report.generate_report()),
        "its resources are not those of its InstanceType": node["resources"] != expected,
        "its label does not name its work": node.get("labels") != {"work": name},
        "is paid for while nothing runs": not is_head and node.get("min_workers") != 0,
        "its containers see no GPU": gpus and "--gpus" not in docker.get("worker_run_options", []),
        "its image is not the pinned one": image != config["docker"]["image"] or not re.search(r":[\d.]+$", image),
        "may be taken away at any moment": name in ("train", "head") and "InstanceMarketOptions" in machine,
    }
    return [problem for problem, is_so in checks.items() if is_so]


def test_the_cluster_file_is_sound():
    assert problems(CONFIG) == []


def test_the_file_for_own_machines_is_sound_and_starts_ray_alike():
    assert problems(OWN_MACHINES) == []
    for name in ("file_mounts", "head_start_ray_commands", "worker_start_ray_commands"):
        assert OWN_MACHINES[name] == CONFIG[name]
    assert OWN_MACHINES["docker"]["image"] == CONFIG["docker"]["image"]


def changed(path: str, value: object, start: dict = CONFIG) -> dict:
    config = copy.deepcopy(start)
    *parents, last = path.split("/")
    place = config
    for name in parents:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("available_node_types/train/node_configs", {}, "ray: "),
        ("available_node_types/train/resources", {"CPU": 0.5}, "ray: "),
        ("head_node_type", "master", "ray: "),
        ("available_node_types/train/min_workers", 99, "ray: "),
        ("provider/type", None, "ray: "),
        ("setup_commands", None, "setup_commands: must be written out"),
        ("available_node_types/train/node_config/InstanceTypo", "p5.48xlarge", "Unknown parameter"),
        ("available_node_types/train/node_config/BlockDeviceMappings", [{"Ebs": {"Size": 5}}], "Unknown parameter"),
        ("available_node_types/train/node_config/InstanceType", "p4d.24xlarge", "not those of its InstanceType"),
        ("available_node_types/train/resources", {"CPU": 192, "GPU": 16}, "not those of its InstanceType"),
        ("available_node_types/head/resources", {"CPU": 8}, "not those of its InstanceType"),
        ("available_node_types/rollouts/labels", {"work": "rollout"}, "does not name its work"),
        ("available_node_types/serve/min_workers", 1, "is paid for"),
        ("available_node_types/serve/docker", None, "see no GPU"),
        ("docker/image", "YOUR-REGISTRY/nanochat-on-ray:latest", "not the pinned one"),
        ("available_node_types/train/node_config/InstanceMarketOptions", {"MarketType": "spot"}, "may be taken away"),
        ("worker_start_ray_commands", ["ray start --address=$RAY_HEAD_IP:6379"], "without a token"),
        ("head_start_ray_commands", ["RAY_AUTH_MODE=token ray start --dashboard-host=0.0.0.0"], "listens to others"),
        ("file_mounts", {}, "nobody brings the token"),
        ("provider/security_group", {"IpPermissions": [{"FromPort": 8265}]}, "open to others"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_it_is_found(path, value, message):
    found = problems(changed(path, value))
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("provider/worker_ips", None, "ray: "),
        ("provider/head_ip", None, "ray: "),
        ("available_node_types", {"gpu": {"resources": {}, "node_config": {}}}, "ray: "),
        ("max_worker", 2, "ray: "),
        ("docker/run_options", [], "see no GPU"),
        ("file_mounts", {}, "nobody brings the token"),
        ("head_start_ray_commands", ["ray start --head --dashboard-host=127.0.0.1"], "without a token"),
    ],
)
def test_what_is_wrong_with_the_one_for_own_machines_is_found(path, value, message):
    found = problems(changed(path, value, OWN_MACHINES))
    assert any(message in problem for problem in found), found
