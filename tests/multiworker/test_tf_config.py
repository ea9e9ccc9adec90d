"""What is read from TF_CONFIG, and what is said of one that TensorFlow would not understand."""

import json
from typing import Any

import keras
import pytest

from pipeline import multiworker
from pipeline.multiworker.tf_config import cluster

WORKERS = {"cluster": {"worker": ["a:1", "[2001:db8::1]:2"]}, "task": {"type": "worker", "index": 1}}


def test_no_cluster_has_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CONFIG", "")
    assert cluster() == ((), None)
    multiworker.wait_for_workers(0)


@pytest.mark.parametrize(
    ("config", "own"),
    [
        (WORKERS, "[2001:db8::1]:2"),
        (WORKERS | {"task": {"type": "worker", "index": "1"}}, "[2001:db8::1]:2"),  # TensorFlow takes text too
        (WORKERS | {"task": {"type": "evaluator", "index": 0}}, None),
        ({"cluster": WORKERS["cluster"]}, None),
    ],
)
def test_the_address_of_this_process(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], own: str | None) -> None:
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert cluster() == (("a:1", "[2001:db8::1]:2"), own)


def test_a_chief_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = {"worker": ["b:1"], "chief": ["a:1"], "ps": ["c:1"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": jobs, "task": {"type": "worker", "index": 0}}))
    assert cluster() == (("a:1", "b:1"), "b:1")


@pytest.mark.parametrize(
    "text",
    [
        "{'cluster': {}}",
        "[]",
        json.dumps(WORKERS | {"task": {"type": "worker", "index": 2}}),
        json.dumps(WORKERS | {"task": {"type": "worker", "index": "first"}}),
        json.dumps({"cluster": {"worker": ["a", "b"]}}),
        json.dumps({"cluster": {"worker": ["a:1", "a:1"]}}),
        json.dumps({"cluster": {"worker": 3}}),
    ],
)
def test_another_form_is_refused_with_an_example(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match=r"^TF_CONFIG is .* not of the form \{"):
        multiworker.wait_for_workers(0)


def test_a_worker_whose_model_is_outside_of_the_scope_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    monkeypatch.setenv("TF_CONFIG", json.dumps(WORKERS))
    with pytest.raises(ValueError, match="outside of the scope of the strategy"):
        multiworker.enable(model)
    monkeypatch.setenv("TF_CONFIG", json.dumps(WORKERS | {"task": {"type": "evaluator", "index": 0}}))
    multiworker.enable(model)
