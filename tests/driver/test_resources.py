"""Which cluster a run joins, and whether its workers and trials fit into it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.driver.resources import check_resources, connect
from pipeline.settings.config import PipelineConfig
from pipeline.settings.presets import quickstart
from pipeline.storage import Storage

ROOT = Path(__file__).parents[2]
# Prints "foreign" if `connect` has joined the cluster of FOREIGN, else "own".
CONNECT = """if True:
    import sys
    from dataclasses import replace
    import ray
    from pipeline.driver import resources
    from pipeline.driver.resources import connect
    from pipeline.settings.presets import quickstart
    from pipeline.storage import Storage
    joined = connect(quickstart(), Storage(sys.argv[1]))
    assert joined == ("foreign" in ray.cluster_resources())
    if joined:
        resources.JOIN_SECONDS, said = 1.5, []
        greedy = replace(quickstart(), train=replace(quickstart().train, num_workers=8))
        ray.shutdown()
        try:
            connect(greedy, Storage(sys.argv[1]), said.append)
        except ValueError as error:
            assert "take 8 CPUs, but the cluster has 4" in str(error), error
            assert len(said) == 1 and "waiting up to 1.5 s for more nodes" in said[0], said
        else:
            raise AssertionError("8 CPUs of 4")
    nodes = ray.nodes()
    assert connect(quickstart(), Storage(sys.argv[1])) and ray.nodes() == nodes, "a process that is connected stays so"
    print("foreign" if "foreign" in ray.cluster_resources() else "own")
"""
FOREIGN = """if True:
    import sys, ray
    ray.init(num_cpus=4, resources={"foreign": 1}, include_dashboard=False, log_to_driver=False)
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""


def config(train: dict[str, Any], search: dict[str, Any]) -> PipelineConfig:
    base = quickstart()
    train = {"global_batch_size": 84} | train
    return replace(base, train=replace(base.train, **train), search=replace(base.search, **search))


@pytest.mark.parametrize(
    ("train", "search", "available", "message"),
    [
        ({}, {}, {"CPU": 2.0}, None),
        ({"num_workers": 1, "cpus_per_worker": 2.0}, {}, {"CPU": 2.0}, None),
        ({"num_workers": 4, "cpus_per_worker": 0.5}, {}, {"CPU": 2.0}, None),
        ({"use_gpu": True}, {}, {"CPU": 2.0, "GPU": 2.0}, None),
        ({"use_gpu": True}, {}, {"CPU": 2.0, "GPU": None}, None),
        ({"num_workers": 14}, {}, {"CPU": None, "GPU": None}, None),
        ({}, {"cpus_per_trial": 0.5}, {"CPU": 2.0}, None),
        ({}, {"cpus_per_trial": 4.0, "num_trials": 0}, {"CPU": 2.0}, None),
        ({"num_workers": 3}, {}, {"CPU": 2.0}, r"num_workers = 3 .* take 3 CPUs, .* has 2: .* 0\.666\)"),
        ({"num_workers": 7, "cpus_per_worker": 2.5}, {}, {"CPU": 16.0}, r"take 17\.5 CPUs, .* has 16: .* 2\.285\)"),
        ({}, {}, {}, r"take 2 CPUs, but the cluster has 0: take fewer workers"),
        ({}, {"cpus_per_trial": 2.5}, {"CPU": 2.0}, r"search\.cpus_per_trial = 2\.5 .* has 2 CPUs: .*-trial 2"),
        ({}, {"workers_per_trial": 4}, {"CPU": 2.0}, r"search\.workers_per_trial = 4 .* take 4 CPUs, .* has 2 CPUs"),
        ({"use_gpu": True}, {}, {"CPU": 2.0, "GPU": 1.0}, r"use_gpu = True .*num_workers = 2 .* has 1: .*no-use-gpu"),
        ({"use_gpu": True}, {}, {"CPU": 2.0}, r"train\.use_gpu = True .* has 0"),
    ],
)
def test_what_can_never_fit_is_refused(
    train: dict[str, Any], search: dict[str, Any], available: dict[str, float | None], message: str | None
) -> None:
    if message is None:
        check_resources(config(train, search), available, "the cluster")
    else:
        with pytest.raises(ValueError, match=message):
            check_resources(config(train, search), available, "the cluster")


@pytest.mark.parametrize("cpus", [1.0, 2.0, 16.0, 96.0])
def test_the_remedy_fits(cpus: float) -> None:
    for workers in range(1, 40):
        greedy = config({"num_workers": workers, "global_batch_size": workers, "cpus_per_worker": 97.0}, {})
        with pytest.raises(ValueError, match=r"--train\.cpus-per-worker") as raised:
            check_resources(greedy, {"CPU": cpus}, "the cluster")
        remedy = float(str(raised.value).rpartition(" ")[2].rstrip(")"))
        assert 0 <= cpus / workers - remedy < 0.001


def test_a_cluster_is_joined_only_if_ray_start_left_it(ray_folder: Path, tmp_path: Path) -> None:
    environment = os.environ | {"RAY_TMPDIR": str(ray_folder), "RAY_AUTH_MODE": "disabled"}

    def connected() -> str:
        command = [sys.executable, "-c", CONNECT, str(tmp_path)]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()[-1]

    foreign = subprocess.Popen(
        [sys.executable, "-c", FOREIGN], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert foreign.stdout is not None
        address = foreign.stdout.readline().split()[-1]
        assert connected() == "own"  # the cluster of another program is not joined
        (ray_folder / "ray" / "ray_current_cluster").write_text(address)  # as `ray start` does
        assert connected() == "foreign"
    finally:
        foreign.communicate()


@pytest.mark.usefixtures("not_connected")
def test_an_address_at_which_nothing_answers_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ValueError, match=r"RAY_ADDRESS = 127\.0\.0\.1:9: no cluster answers: start it, or unset"):
        connect(quickstart(), Storage(str(tmp_path)))
