"""The private names of Ray that pipeline/workers/ray_internals.py relies on."""

import importlib

import pytest
import ray

from pipeline.workers import ray_internals

NAMES = [(module, name) for module, names in ray_internals.PRIVATE_NAMES.items() for name in names]


def test_ray_has_the_private_names_that_are_relied_on() -> None:
    ray_internals.check_ray()


# Another version of Ray cannot be installed beside this one, so the test changes the modules of this one.
@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_ray_without_a_private_name_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    monkeypatch.delattr(importlib.import_module(module), name.partition("=")[0])
    with pytest.raises(RuntimeError, match=f"Ray {ray.__version__} has no {module}.{name}: .*pin Ray"):
        ray_internals.check_ray()


def test_a_ray_that_reads_another_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = importlib.import_module("ray.train.v2._internal.constants")
    monkeypatch.setattr(constants, "HEALTH_CHECK_INTERVAL_S_ENV_VAR", "RAY_TRAIN_POLL_S")
    with pytest.raises(RuntimeError, match="HEALTH_CHECK_INTERVAL_S_ENV_VAR=RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"):
        ray_internals.check_ray()


@pytest.mark.parametrize("owner", sorted(ray_internals.PRIVATE_FIELDS))
def test_a_ray_without_a_private_field_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, owner: str) -> None:
    module, name = owner.rsplit(".", 1)
    monkeypatch.setattr(importlib.import_module(module), name, type(name, (), {}))
    with pytest.raises(RuntimeError, match=f"has no {owner}.{ray_internals.PRIVATE_FIELDS[owner]}"):
        ray_internals.check_ray()
