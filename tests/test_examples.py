"""The examples run as they are, in a separate folder."""

import importlib
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.own_model import OwnModel, _check_workers_have, train_own_model, why_not_loaded
from pipeline.settings.command_line import parse
from pipeline.tasks.new_process import new_call_id
from pipeline.tasks.own_model import sealed
from pipeline.workers.ray_internals import POLL_SECONDS_VARIABLE

EXAMPLES = Path(__file__).parents[1] / "examples"


def accuracy(script: str, pattern: str, cwd: Path, *args: str, **variables: str) -> int:
    """Runs an example; returns the number in its output that `pattern` captures."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | variables
    environment.pop("TF_CONFIG", None)
    command = [sys.executable, str(EXAMPLES / script), *args]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = re.search(pattern, done.stdout)
    assert found, done.stdout
    return int(found[1])


@pytest.mark.long
def test_two_processes_train(tmp_path: Path) -> None:
    """Although the environment has a proxy, as in most companies: TensorFlow would look for the other worker there."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    assert accuracy("keras_two_processes.py", r"200 rows predicted, (\d+)% of them right", tmp_path, **proxies) >= 80


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_two_ray_workers_train(tmp_path: Path) -> None:
    """On the cluster of the tests, which is quicker than to start another one."""
    cluster = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, POLL_SECONDS_VARIABLE: "0.5"}
    pattern = r"validation accuracy after epoch 5: (\d+)\.\d%"
    assert accuracy("ray_train_own_model.py", pattern, tmp_path, **cluster) >= 80


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_a_model_of_ones_own_trains_in_the_pipeline_and_is_not_trained_again(tmp_path: Path) -> None:
    cluster = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, POLL_SECONDS_VARIABLE: "0.5"}
    # One worker, whose start is quicker; two are tested in tests/training and by the benchmarks.
    few = ("quickstart", "--train.epochs", "5", "--train.num-workers", "1")
    command = ("own_model.py", r"test top-1 (\d+)\.\d%", tmp_path, *few)
    found = accuracy(*command, **cluster)
    assert found >= 80
    start = time.monotonic()
    assert accuracy(*command, **cluster) == found
    assert time.monotonic() - start < 10
    assert [len(list((tmp_path / "runs" / "tasks" / task).iterdir())) for task in ("train", "evaluate")] == [1, 1]


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_a_program_with_a_ray_of_its_own_trains_models_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook; what the workers cannot import is refused before anything is trained."""
    few = ["quickstart", "--train.epochs", "1", "--train.num-workers", "1", "--search.num-trials", "0"]
    config = parse([*few, "--storage", str(tmp_path / "runs")])[1].config
    (tmp_path / "nowhere.py").write_text("def build(**settings): ...")
    sys.path.insert(0, str(tmp_path))
    try:
        elsewhere = OwnModel(importlib.import_module("nowhere").build)
    finally:
        sys.path.remove(str(tmp_path))
    message = (
        r"build of the module nowhere cannot be imported by Ray's workers on [\d.]+: No module named 'nowhere': put"
    )
    with pytest.raises(ValueError, match=message):
        train_own_model(config, elsewhere)
    # As a function of a notebook or of the script that runs is sent.
    monkeypatch.setattr(small_model, "__module__", "__main__")
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(train_own_model, config, OwnModel(small_model)).result()
    assert found["evaluate"]["num_examples"] == 360
    assert ray.is_initialized()


def small_model(image_shape: Any, num_classes: int, **statistics: Any) -> Any:
    import keras

    images = keras.Input(image_shape, dtype="uint8")
    return keras.Model(images, keras.layers.Dense(num_classes)(keras.layers.Flatten()(images)))


def test_a_module_that_fails_or_is_another_one_in_a_worker_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this, one process would train another function than the one whose key the result gets."""

    def written(folder: str, code: str) -> None:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "of_somebody.py").write_text(f"{code}\ndef build(**settings): ...\n")
        monkeypatch.syspath_prepend(tmp_path / folder)
        monkeypatch.delitem(sys.modules, "of_somebody", raising=False)

    written("here", "")
    model = OwnModel(importlib.import_module("of_somebody").build)
    sent = sealed(model, model.key())
    assert why_not_loaded(sent) == ""
    for number, (code, message) in enumerate(
        {
            "CHANNELS = 64": f"another file is found there, {tmp_path}/there0/of_somebody.py",
            "open('of_this_folder.json')": "it ends with FileNotFoundError: .*of_this_folder.json",
            "import sys; sys.exit('usage: train.py DATA')": "it ends with SystemExit: usage",
            "import of_nobody": "No module named 'of_nobody'",
        }.items()
    ):
        written(f"there{number}", code)
        assert re.match(message, why_not_loaded(sent))


def test_a_builder_that_cannot_be_sent_to_workers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locked_model, "__module__", "__main__")
    with pytest.raises(ValueError, match=r"builder locked_model uses something that cannot be sent.*lock.*: make it"):
        _check_workers_have(OwnModel(locked_model), new_call_id())


LOCK = threading.Lock()


def locked_model(**settings: Any) -> Any:
    with LOCK:
        return None


def test_of_this_project_two_examples_use_multiworker_only() -> None:
    for script in set(EXAMPLES.glob("*.py")) - {EXAMPLES / "own_model.py"}:
        imported = re.findall(
            r"^\s*(?:from|import) ((?:pipeline|perceiver|tune)\b.*)$", script.read_text(), re.MULTILINE
        )
        assert imported == ["pipeline import multiworker"], script
