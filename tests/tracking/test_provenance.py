"""Provenance from a real checkout, and energy from counters in the kernel's format."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from pipeline.tracking import provenance
from pipeline.tracking.provenance import EnergyMeter, cluster_hardware, collect_provenance, training_cost


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_commit_and_changes_are_those_of_the_checkout(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    assert "mlflow.source.git.commit" not in collect_provenance(tmp_path).tags, "nothing is committed yet"
    (tmp_path / "code.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    clean = collect_provenance(tmp_path)
    assert clean.tags["mlflow.source.git.commit"] == git(tmp_path, "rev-parse", "HEAD").strip()
    assert clean.tags["mlflow.source.git.dirty"] == "false"
    assert "changes.diff" not in clean.texts
    (tmp_path / "code.py").write_text("x = 2\n")
    (tmp_path / "new.py").write_text("y = 3\n")
    dirty = collect_provenance(tmp_path)
    assert dirty.tags["mlflow.source.git.dirty"] == "true"
    assert "-x = 1\n+x = 2\n" in dirty.texts["changes.diff"]
    assert "Not in git: new.py" in dirty.texts["changes.diff"]
    (tmp_path / "code.py").write_text("x = 2\n" * 300_000)
    assert len(collect_provenance(tmp_path).texts["changes.diff"]) < 1_100_000
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / "new.py").unlink()
    # Applied to the commit, the diff gives the code that ran.
    git(tmp_path, "apply", "--include=code.py", _file(tmp_path.parent / "a.diff", dirty.texts["changes.diff"]))
    assert (tmp_path / "code.py").read_text() == "x = 2\n"


def _file(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_versions_and_machine_are_collected_but_not_passwords(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--tracking.uri", "https://me:secret@host/path", "a b"])
    found = collect_provenance(tmp_path)
    assert found.tags["command"] == "run.py --tracking.uri 'https://***@host/path' 'a b'"
    assert found.texts["command.txt"] == f"{found.tags['command']}\n"
    assert found.tags["version.keras"] == keras.__version__
    assert f"keras=={keras.__version__}\n" in found.texts["packages.txt"]
    assert float(found.tags["memory_gib"]) > 0.5
    assert int(found.tags["cpu_count"]) >= 1
    assert found.tags["cpu"]
    assert "mlflow.source.git.commit" not in found.tags


def test_files_with_settings_of_a_place_are_named_and_not_shown(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    private = ("ray_cluster.yaml", "clusters/aws.yaml", "deep/.env")
    for name in (*private, "code.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    for name in private:
        (tmp_path / name).write_text("export KEY=hunter2\n")
    found = collect_provenance(tmp_path)
    assert found.tags["mlflow.source.git.dirty"] == "true"
    assert "hunter2" not in found.texts["changes.diff"]
    assert all(f"Changed, and not shown: {name}\n" in found.texts["changes.diff"] for name in private)
    (tmp_path / "code.py").write_text("after\n")
    assert "+after" in collect_provenance(tmp_path).texts["changes.diff"]


def test_cost_counts_the_workers_of_each_epoch() -> None:
    history = [{"seconds": 1800.0, "num_workers": 4}, {"seconds": 3600.0, "num_workers": 1}]
    assert training_cost(history, cpus_per_worker=0.5) == {"core_hours": 1.5}
    on_gpus = [epoch | {"num_gpus": epoch["num_workers"]} for epoch in history]
    assert training_cost(on_gpus, cpus_per_worker=8) == {"gpu_hours": 3.0}


def test_what_ran_on_cpus_costs_no_gpu_hours() -> None:
    history = [
        {"seconds": 3600.0, "num_workers": 2, "num_gpus": 0},
        {"seconds": 3600.0, "num_workers": 2, "num_gpus": 2},
    ]
    assert training_cost(history[:1], cpus_per_worker=4) == {"core_hours": 8.0}
    assert training_cost(history, cpus_per_worker=4) == {"core_hours": 8.0, "gpu_hours": 2.0}


def zone(root: Path, name: str, microjoules: int, most: int = 1000 * 10**6) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder


def test_energy_is_the_sum_over_packages_even_if_a_counter_wraps_around(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 900 * 10**6)
    zone(tmp_path, "intel-rapl:0:0", 5)  # the cores of package 0, included in its counter
    zone(tmp_path, "intel-rapl:1", 0)
    meter = EnergyMeter(tmp_path)
    assert meter.kwh == 0
    zone(tmp_path, "intel-rapl:0", 100 * 10**6)
    zone(tmp_path, "intel-rapl:1", 160 * 10**6)
    zone(tmp_path, "intel-rapl:0:0", 500 * 10**6)
    meter.sample()
    assert meter.kwh == pytest.approx((200 + 160) / 3.6e6)


def test_energy_is_none_if_no_counter_is_readable(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path).kwh is None
    (tmp_path / "intel-rapl:0").mkdir()
    assert EnergyMeter(tmp_path).kwh is None


def test_hardware_lists_the_nodes_that_are_alive() -> None:
    nodes = [
        {"Alive": True, "NodeManagerHostname": "a", "Resources": {"CPU": 2.0, "memory": 4.0, "object_store_memory": 1}},
        {"Alive": False, "NodeManagerHostname": "b", "Resources": {"CPU": 8.0}},
    ]
    assert cluster_hardware(nodes) == [{"host": "a", "CPU": 2.0, "GPU": 0, "memory": 4.0}]


def test_neither_a_hook_nor_the_settings_of_a_person_change_what_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook of git names its repository in the environment; many look at diffs with another program."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine, other):
        folder.mkdir()
        git(folder, "init", "--quiet")
        (folder / "code.py").write_text(f"x = '{folder.name}'\n")
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "--message", folder.name)
    for setting in ("color.ui=always", "diff.external=/bin/echo", "diff.noprefix=true"):
        git(mine, "config", *setting.split("="))
    (mine / "code.py").write_text("x = 2\n")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    found = collect_provenance(mine)
    monkeypatch.delenv("GIT_DIR")
    assert found.tags["mlflow.source.git.commit"] == git(mine, "rev-parse", "HEAD").strip()
    assert "\n--- a/code.py\n+++ b/code.py\n@@ -1 +1 @@\n-x = 'mine'\n+x = 2\n" in found.texts["changes.diff"]


def test_a_package_under_another_name_is_recorded_with_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version("scikit-learn")
    monkeypatch.setattr(provenance, "PACKAGES", ("sklearn", "nonesuch"))
    tags = collect_provenance(Path("/")).tags
    assert (tags["version.sklearn"], tags["version.nonesuch"]) == (f"{version} (scikit-learn)", "unknown")
