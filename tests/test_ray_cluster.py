"""ray_cluster.yaml is what Ray takes: its schema, its fill-in, and what neither of them checks."""

import copy
import re
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


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def test_ray_accepts_the_file_and_starts_every_worker(cluster: dict[str, Any]) -> None:
    workers = len(cluster["provider"]["worker_ips"])
    filled_in = prepare_config(copy.deepcopy(cluster))
    validate_config(filled_in)
    node_type = filled_in["available_node_types"]["local.cluster.node"]
    assert (node_type["min_workers"], node_type["max_workers"]) == (workers, workers)


def test_rays_schema_refuses_a_command_that_is_no_string(cluster: dict[str, Any]) -> None:
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
    for remote, local in mounts.items():
        assert (ROOT / local).exists(), f"{local} is not in the repository"
        assert remote == f"~/keras-perceiver-ray/{local}"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, packages = settings["project"], settings["tool"]["setuptools"]["packages"]
    needed = {"pyproject.toml", "requirements.txt", project["readme"], *project["license-files"], *packages}
    assert set(mounts.values()) == needed


def test_nothing_is_mounted_where_the_driver_would_import_it(cluster: dict[str, Any]) -> None:
    # `ray submit` puts the home directory first on sys.path.
    for remote in cluster["file_mounts"]:
        top_level = remote.removeprefix("~/").split("/")[0]
        assert not top_level.isidentifier(), f"{remote} could be imported as {top_level}"


def test_only_the_loopback_serves_the_dashboard(cluster: dict[str, Any]) -> None:
    (start,) = [command for command in cluster["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start


def test_no_secret_and_no_real_address_in_the_file() -> None:
    text = (ROOT / "ray_cluster.yaml").read_text()
    assert not re.search(r"RAY_AUTH_TOKEN|PRIVATE KEY|[0-9a-fA-F]{32}|[0-9a-f]{8}-[0-9a-f]{4}-", text)
    addresses = re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", text)
    assert all(address.startswith("192.0.2.") or address == "127.0.0.1" for address in addresses), addresses
