"""The cluster files are valid for Ray and KubeRay: by their schemas, and in what neither of them checks."""

import copy
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
TOKEN = "~/.ray/auth_token"
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


FILES = ("ray_cluster.yaml", "clusters/aws.yaml")
MANIFESTS = ("clusters/kuberay-raycluster.yaml", "clusters/kuberay-rayjob.yaml")


@pytest.fixture(params=FILES)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read(request.param)


def read(file: str, gpu: bool = False) -> dict[str, Any]:
    """The content of a file; with `gpu`, after the `sed` command in its first lines."""
    text = (ROOT / file).read_text()
    if gpu:
        (command,) = re.findall(r"(?m)\bsed (?:-i )?'(.*?)' ", text)
        text = subprocess.run(["sed", command], input=text, capture_output=True, text=True, check=True).stdout
    return yaml.safe_load(text)


def test_ray_accepts_the_file_and_starts_every_worker() -> None:
    cluster = read("ray_cluster.yaml")
    workers = len(cluster["provider"]["worker_ips"])
    filled_in = prepare_config(copy.deepcopy(cluster))
    validate_config(filled_in)
    node_type = filled_in["available_node_types"]["local.cluster.node"]
    assert (node_type["min_workers"], node_type["max_workers"]) == (workers, workers)


def test_ray_accepts_the_file_for_aws() -> None:
    cluster = read("clusters/aws.yaml")
    filled_in = prepare_config(copy.deepcopy(cluster))
    validate_config(filled_in)
    assert filled_in["available_node_types"].keys() == {"head", "gpu"}
    market = filled_in["available_node_types"]["gpu"]["node_config"]["InstanceMarketOptions"]
    assert market == {"MarketType": "spot"}
    assert filled_in["head_setup_commands"][-1:] == cluster["head_setup_commands"], "Ray's own would be appended"


def test_rays_schema_refuses_a_command_that_is_no_string() -> None:
    cluster = read("ray_cluster.yaml")
    cluster["setup_commands"].append({"echo a": "b"})  # what YAML makes of an unquoted `echo a: b`
    with pytest.raises(jsonschema.ValidationError, match="is not of type 'string'"):
        validate_config(prepare_config(cluster))


def test_commands_are_strings(cluster: dict[str, Any]) -> None:
    filled_in = prepare_config(cluster)
    for section in COMMANDS:
        for command in filled_in[section]:
            assert isinstance(command, str), f"{section}: {command!r}"
            assert "\n" not in command, f"{section}: {command!r} is more than one line"


def test_file_mounts_are_what_an_installation_needs(cluster: dict[str, Any]) -> None:
    mounts = dict(cluster["file_mounts"])
    assert mounts.pop(TOKEN) == TOKEN
    locks = {remote: local for remote, local in mounts.items() if local.startswith("clusters/")}
    for remote, local in locks.items():
        name = local.removeprefix("clusters/")
        assert mounts.pop(remote) == local
        assert remote == f"~/keras-perceiver-ray/{name}"
        assert f"--require-hashes -r ~/keras-perceiver-ray/{name}" in commands_of(cluster).replace("--no-deps ", "")
        assert "--hash=sha256:" in (ROOT / local).read_text()
    for remote, local in mounts.items():
        assert (ROOT / local).exists(), f"{local} is not in the repository"
        assert remote == f"~/keras-perceiver-ray/{local}"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = settings["project"]
    packages = [name.removesuffix("*") for name in settings["tool"]["setuptools"]["packages"]["find"]["include"]]
    if cluster["provider"]["type"] == "aws":  # its workers have GPUs; the other file has a marked line
        assert mounts.pop("~/keras-perceiver-ray/requirements-gpu.txt") == "requirements-gpu.txt"
    needed = {"pyproject.toml", "requirements.txt", project["readme"], *project["license-files"], *packages}
    assert set(mounts.values()) == needed


def test_the_marked_lines_install_what_gpus_need_from_the_lock() -> None:
    plain, cluster = read("ray_cluster.yaml"), read("ray_cluster.yaml", gpu=True)
    validate_config(prepare_config(copy.deepcopy(cluster)))
    added = set(cluster["file_mounts"].items()) - set(plain["file_mounts"].items())
    assert added == {("~/keras-perceiver-ray/requirements-gpu.txt", "requirements-gpu.txt")}
    *before, last = cluster["setup_commands"]
    assert before == plain["setup_commands"]
    assert "--require-hashes -r ~/keras-perceiver-ray/requirements-gpu.txt &&" in last


def test_every_worker_on_aws_has_a_gpu_and_its_libraries_from_the_lock() -> None:
    cluster = read("clusters/aws.yaml")
    assert cluster["file_mounts"]["~/keras-perceiver-ray/requirements-gpu.txt"] == "requirements-gpu.txt"
    (install,) = [command for command in cluster["setup_commands"] if "installed.txt" in command]
    assert "--require-hashes -r ~/keras-perceiver-ray/requirements-gpu.txt" in install
    assert "requirements-gpu.txt > wanted.txt" in install, "it would not be installed again when the lock has changed"
    images = {kind["node_config"]["ImageId"] for kind in cluster["available_node_types"].values()}
    assert len(images) == 1, "all nodes start from the image with the driver"


def test_the_image_for_gpus_is_made_from_the_lock() -> None:
    text = (ROOT / "clusters/Dockerfile").read_text()
    assert re.search(r"(?m)^COPY .*\brequirements-gpu\.txt .*/install/$", text)
    assert re.search(r'test -z "\$GPU" \|\| uv pip install .*--require-hashes -r /install/requirements-gpu\.txt', text)
    copied = [name for line in re.findall(r"(?m)^COPY (.*) \S+$", text) for name in line.split()]
    assert all((ROOT / name).exists() for name in copied), copied


def commands_of(cluster: dict[str, Any]) -> str:
    return "\n".join(command for section in COMMANDS for command in cluster.get(section, []))


def test_everything_is_installed_by_its_hash_and_the_token_is_hidden(cluster: dict[str, Any]) -> None:
    installs = re.findall(r"pip install ([^&|;]*)", commands_of(cluster))
    assert len(installs) >= 3
    for arguments in installs:
        assert "--require-hashes" in arguments or "--no-deps --no-build-isolation --editable" in arguments, arguments
    assert "chmod 600 ~/.ray/auth_token" in cluster["setup_commands"]


def test_git_does_not_track_the_settings_of_a_place() -> None:
    ignored = subprocess.run(
        ["git", "check-ignore", "ray_cluster.local.yaml", "clusters/aws.local.yaml", "ray_cluster.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if ignored.returncode == 128:
        pytest.skip("this is no git checkout")
    assert ignored.stdout.split() == ["ray_cluster.local.yaml", "clusters/aws.local.yaml"]


def test_nothing_is_mounted_where_the_driver_would_import_it(cluster: dict[str, Any]) -> None:
    # `ray submit` puts the home directory first on sys.path.
    for remote in cluster["file_mounts"]:
        top_level = remote.removeprefix("~/").split("/")[0]
        assert not top_level.isidentifier(), f"{remote} could be imported as {top_level}"


def test_only_the_loopback_serves_the_dashboard(cluster: dict[str, Any]) -> None:
    (start,) = [command for command in cluster["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start


def test_runs_and_records_are_kept_where_they_outlive_the_head(cluster: dict[str, Any]) -> None:
    commands = "\n".join(cluster["setup_commands"])
    (storage,) = re.findall(r"'export PERCEIVER_STORAGE=\"(\S+?)\"'", commands)
    (tracking,) = re.findall(r"'export MLFLOW_TRACKING_URI=\"(\S+?)\"'", commands)
    assert storage.startswith(("/mnt/", "s3://"))
    assert tracking.startswith(("sqlite:////mnt/", "http://"))


@pytest.mark.parametrize("file", [*FILES, *MANIFESTS])
def test_no_secret_and_no_real_address_in_the_file(file: str) -> None:
    text = (ROOT / file).read_text()
    assert not re.search(r"RAY_AUTH_TOKEN=\w|PRIVATE KEY|[0-9a-fA-F]{32}|[0-9a-f]{8}-[0-9a-f]{4}-", text)
    addresses = re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", text)
    assert all(address.startswith("192.0.2.") or address in ("127.0.0.1", "0.0.0.0") for address in addresses), (
        addresses
    )


def strictly(schema: Any) -> Any:
    """`schema` with what `kubectl` adds: a field that is not in it is an error."""
    if isinstance(schema, list):
        return [strictly(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: strictly(part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


@pytest.fixture(scope="module")
def kuberay() -> dict[str, jsonschema.Draft202012Validator]:
    """A validator of each kind of KubeRay's."""
    schemas = strictly(json.loads((ROOT / "tests/schemas/kuberay-v1.7.0.json").read_text()))
    validators = {}
    for kind, schema in schemas["kinds"].items():
        schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
        validators[kind] = jsonschema.Draft202012Validator(schema | {"$defs": schemas["$defs"]})
    return validators


@pytest.mark.parametrize("file", MANIFESTS)
def test_kuberay_accepts_the_manifest(file: str, kuberay: dict[str, jsonschema.Draft202012Validator]) -> None:
    manifest = read(file)
    assert manifest["apiVersion"] == "ray.io/v1"
    kuberay[manifest["kind"]].validate(manifest)
    cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [container for group in groups for container in group["template"]["spec"]["containers"]]
    for container in containers:
        assert {"PERCEIVER_STORAGE", "MLFLOW_TRACKING_URI"} <= {variable["name"] for variable in container["env"]}
    assert len({container["image"] for container in containers}) == 1


@pytest.mark.parametrize("file", MANIFESTS)
def test_the_marked_lines_give_each_worker_on_kubernetes_a_gpu(
    file: str, kuberay: dict[str, jsonschema.Draft202012Validator]
) -> None:
    manifest = read(file, gpu=True)
    kuberay[manifest["kind"]].validate(manifest)
    spec = manifest["spec"]
    (workers,) = spec.get("rayClusterSpec", spec)["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}
    head = spec.get("rayClusterSpec", spec)["headGroupSpec"]["template"]["spec"]
    assert "tolerations" not in head, "the head computes nothing"
    if "entrypoint" in spec:
        assert spec["entrypoint"].endswith(" --train.use-gpu")
    plain = read(file)["spec"]
    assert "gpu" not in json.dumps(plain), "a cluster without GPUs would wait for one"


@pytest.mark.parametrize("file", MANIFESTS)
def test_pods_may_do_little_and_only_their_like_reach_them(file: str) -> None:
    spec = read(file)["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    policy = read("clusters/kuberay-networkpolicy.yaml")["spec"]
    (peers, dashboard) = policy["ingress"]
    assert dashboard["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert peers == {"from": [{"podSelector": policy["podSelector"]}]}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["metadata"]["labels"] == policy["podSelector"]["matchLabels"]
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/tmp", "/home/ray"}


def test_hosts_on_aws_are_in_a_group_that_the_user_has_made() -> None:
    types = read("clusters/aws.yaml")["available_node_types"]
    assert all(kind["node_config"]["SecurityGroupIds"] for kind in types.values())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("headGroupSpec", "template", "spec", "contianers"), []),
        (("headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("workerGroupSpecs", 0, "maxReplicas"), "4"),
        (("authOptions", "mode"), "password"),
        (("image",), "registry.example.org/x"),
    ],
)
def test_kuberays_schema_refuses_what_is_wrong(
    path: tuple[str | int, ...], value: Any, kuberay: dict[str, jsonschema.Draft202012Validator]
) -> None:
    manifest: Any = read(MANIFESTS[0])
    *parents, last = path
    place = manifest["spec"]
    for part in parents:
        place = place[part]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        kuberay["RayCluster"].validate(manifest)


def test_the_versions_are_those_of_the_lock() -> None:
    (locked,) = re.findall(r"^ray\[\S+\]==(\S+)|^ray==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    for file in MANIFESTS:
        spec = read(file)["spec"]
        assert spec.get("rayClusterSpec", spec)["rayVersion"] in locked
