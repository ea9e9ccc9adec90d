"""Against real SQLite stores, and in one test a real server; other processes are real too."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import keras
import numpy as np
import pytest

from perceiver.config import PerceiverConfig
from perceiver.model import Perceiver
from pipeline.tracking import BackgroundTracker, Tracker, environment_tags, register

PROJECT = Path(__file__).parents[1]
SHA256 = "0123456789abcdef" * 4
LABELS = ["circle", "square", "triangle"]


@pytest.fixture(scope="module", autouse=True)
def hostile_environment() -> Iterator[None]:
    """Settings of the environment that must not matter: nothing listens there, and no such run exists."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        patch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.setenv("MLFLOW_RUN_ID", "0" * 32)
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
        patch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
        yield


def open_tracker(folder: Path) -> Tracker:
    return Tracker(f"sqlite:///{folder}/mlflow.db", "shapes", f"{folder}/mlartifacts")


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return open_tracker(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    keras.utils.set_random_seed(0)
    config = PerceiverConfig(
        image_shape=(8, 8, 1), num_classes=3, num_latents=4, latent_dim=16, conv_channels=8, data_dim=16
    )
    model = Perceiver(**asdict(config))
    model(np.zeros((1, 8, 8, 1), np.uint8))
    path = tmp_path_factory.mktemp("model") / "best.keras"
    model.save(path)
    return os.fspath(path)


def run_python(code: str, *arguments: object, cwd: Path, isolated: bool = False) -> subprocess.Popen:
    flags = ["-I"] if isolated else []
    command = [sys.executable, *flags, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True)


def test_repeated_calls_make_no_doubles(tracker: Tracker) -> None:
    history = [{"epoch": 1, "loss": 2.0, "timestamp": 1e9}, {"epoch": 2, "loss": 1.5, "val/top1": 0.5}]
    for number in range(3):
        # The second time with a tracker that remembers nothing, as after a crash.
        again = tracker if number < 2 else Tracker(tracker.client.tracking_uri, "shapes")
        run_id = again.find_or_create_run("train", "repeated")
        again.log_params(run_id, {f"section.field_{i}": i for i in range(150)})
        again.log_history(run_id, history)
        again.log_metrics(run_id, {"test/top1": 0.75, "test/loss": math.nan})
        again.log_dataset(run_id, "shapes", SHA256, "/data/shapes", "training", {"rows": 10})
    assert len(tracker.client.search_runs([tracker.experiment_id], "tags.`pipeline.identity` = 'repeated'")) == 1
    run = tracker.client.get_run(run_id)
    assert len(run.data.params) == 150
    assert [(m.step, m.value) for m in tracker.client.get_metric_history(run_id, "loss")] == [(1, 2.0), (2, 1.5)]
    assert tracker.client.get_metric_history(run_id, "loss")[0].timestamp == 1_000_000_000_000
    assert [(m.step, m.value) for m in tracker.client.get_metric_history(run_id, "val/top1")] == [(2, 0.5)]
    assert [m.value for m in tracker.client.get_metric_history(run_id, "test/top1")] == [0.75]
    assert len(tracker.client.get_metric_history(run_id, "test/loss")) == 1
    assert math.isnan(run.data.metrics["test/loss"])
    assert run.inputs
    (dataset_input,) = run.inputs.dataset_inputs
    assert dataset_input.dataset.digest == SHA256[:36]
    assert dataset_input.dataset.profile == '{"rows": 10}'
    assert {tag.key: tag.value for tag in dataset_input.tags} == {"mlflow.data.context": "training", "sha256": SHA256}
    assert run.data.tags["dataset.sha256"] == SHA256


def test_a_longer_history_adds_only_what_is_new(tracker: Tracker) -> None:
    run_id = tracker.find_or_create_run("train", "growing")
    history = [{"epoch": epoch, "loss": 1 / epoch, "lr": math.inf} for epoch in range(1, 1201)]
    for length in (1, 2, 1200):
        tracker.log_history(run_id, history[:length])
    logged = tracker.client.get_metric_history(run_id, "loss")
    assert [(m.step, m.value) for m in logged] == [(row["epoch"], row["loss"]) for row in history]
    assert tracker.client.get_metric_history(run_id, "lr")[0].value > 1e308


def test_what_changed_is_kept_beside_what_was(tracker: Tracker) -> None:
    run_id = tracker.find_or_create_run("train", "changing")
    tracker.log_params(run_id, {"train.num_workers": 2, "text": "x" * 10_000})
    tracker.log_params(run_id, {"train.num_workers": 1, "text": "x" * 10_000})
    tracker.log_metrics(run_id, {"top1": 0.5})
    tracker.log_metrics(run_id, {"top1": 0.6})
    data = tracker.client.get_run(run_id).data
    assert data.params["train.num_workers"] == "2"
    assert {key: tag for key, tag in data.tags.items() if key.startswith("changed.")} == {
        "changed.train.num_workers": "1"
    }
    assert len(data.params["text"]) == 6000
    assert data.metrics["top1"] == 0.6


def test_runs_form_a_tree_and_open_again(tracker: Tracker) -> None:
    pipeline = tracker.find_or_create_run("pipeline", "tree", tags={"preset": "quickstart"})
    search = tracker.find_or_create_run("search", "tree/search", pipeline)
    trial = tracker.find_or_create_run("trial 0", "tree/search/0", search)
    tracker.finish(pipeline, "KILLED")
    assert tracker.find_or_create_run("another name", "tree") == pipeline
    assert tracker.find_run("tree/search/0") == trial
    assert tracker.find_run("tree/train") is None
    runs = [tracker.client.get_run(run_id) for run_id in (pipeline, search, trial)]
    assert [run.data.tags.get("mlflow.parentRunId") for run in runs] == [None, pipeline, search]
    assert [run.info.run_name for run in runs] == ["pipeline", "search", "trial 0"]
    assert [run.info.status for run in runs] == ["RUNNING"] * 3
    assert runs[0].data.tags["preset"] == "quickstart"
    tracker.finish(trial)
    assert tracker.client.get_run(trial).info.status == "FINISHED"


def test_files_go_below_the_artifact_location_only(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_id = tracker.find_or_create_run("evaluate", "files")
    (tmp_path / "plot.svg").write_text("<svg/>")
    tracker.log_file(run_id, tmp_path / "plot.svg", "plots")
    tracker.log_text(run_id, "hello", "note.txt")
    tracker.log_dict(run_id, {"epochs": 2}, "config/resolved.json")
    folder = Path(tracker.client.get_experiment(tracker.experiment_id).artifact_location) / run_id / "artifacts"
    assert {os.fspath(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == {
        "plots/plot.svg",
        "note.txt",
        "config/resolved.json",
    }
    assert json.loads((folder / "config/resolved.json").read_text()) == {"epochs": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["plot.svg"]


def test_a_deleted_experiment_is_refused(tracker: Tracker) -> None:
    deleted = Tracker(tracker.client.tracking_uri, "deleted")
    deleted.client.delete_experiment(deleted.experiment_id)
    with pytest.raises(ValueError, match=r"tracking\.experiment = 'deleted' was deleted"):
        Tracker(tracker.client.tracking_uri, "deleted")


def test_two_processes_at_once_make_one_run(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from pipeline.tracking import Tracker
        folder, number = Path(sys.argv[1]), sys.argv[2]
        (folder / f"ready{number}").touch()
        while len(list(folder.glob("ready*"))) < 2:
            time.sleep(0.001)
        tracker = Tracker(f"sqlite:///{folder}/mlflow.db", "shapes", f"{folder}/mlartifacts")
        print(*(tracker.find_or_create_run("train", f"identity {i}") for i in range(20)))
    """
    processes = [run_python(code, tmp_path, number, cwd=PROJECT) for number in range(2)]
    first, second = (process.communicate(timeout=120)[0].split() for process in processes)
    assert len(set(first)) == 20
    assert first == second
    tracker = open_tracker(tmp_path)
    assert sorted(run.info.run_id for run in tracker.client.search_runs([tracker.experiment_id])) == sorted(first)


def register_shapes(tracker: Tracker, identity: str, model_path: str, images: np.ndarray) -> dict[str, str]:
    return register(
        tracker,
        model_path=model_path,
        name="shapes",
        identity=identity,
        run_id=tracker.find_or_create_run("register", identity),
        input_example=images[:2],
        label_names=LABELS,
        tags={"dataset.sha256": SHA256},
        metadata={"source": "drawn"},
    )


def test_a_killed_registration_goes_on_to_one_version(tmp_path: Path, model_path: str, images: np.ndarray) -> None:
    code = """
        import os, signal, sys
        import numpy as np
        from pathlib import Path
        from tests.test_tracking import open_tracker, register_shapes
        folder, model_path, step = sys.argv[1:]
        tracker = open_tracker(Path(folder))
        work = getattr(tracker.client, step)
        def work_and_die(*args, **kwargs):
            work(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(tracker.client, step, work_and_die)
        register_shapes(tracker, "once", model_path, np.load(f"{folder}/images.npy"))
    """
    np.save(tmp_path / "images.npy", images)
    for step in ("log_model_artifacts", "create_model_version"):
        process = run_python(code, tmp_path, model_path, step, cwd=PROJECT)
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL
    tracker = open_tracker(tmp_path)
    assert "champion" not in tracker.client.get_registered_model("shapes").aliases
    registered = register_shapes(tracker, "once", model_path, images)
    assert registered["uri"] == "models:/shapes/1"
    assert [int(version.version) for version in tracker.client.search_model_versions("name = 'shapes'")] == [1]
    assert int(tracker.client.get_model_version_by_alias("shapes", "champion").version) == 1
    (model,) = tracker.client.search_logged_models([tracker.experiment_id])
    assert (model.model_id, str(model.status)) == (registered["model_id"], "READY")
    run = tracker.client.get_run(tracker.find_or_create_run("register", "once"))
    assert run.outputs
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]


LOAD_ELSEWHERE = """
    import sys
    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("perceiver", "pipeline", "tune"):
                raise ImportError(f"{name} is not installed here")
    sys.meta_path.insert(0, Refuse())
    import mlflow, numpy as np
    uri, images, output = sys.argv[1:]
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    model = mlflow.pyfunc.load_model("models:/shapes@champion")
    assert model.metadata.metadata == {"source": "drawn", "label_names": ["circle", "square", "triangle"]}
    np.save(output, model.predict(np.load(images)))
"""


def check_loads_elsewhere(
    uri: str, tmp_path: Path, model_path: str, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh process without the project and without pickle predicts the same."""
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    np.save(elsewhere / "images.npy", images)
    process = run_python(LOAD_ELSEWHERE, uri, "images.npy", "output.npy", cwd=elsewhere, isolated=True)
    process.communicate(timeout=120)
    assert process.returncode == 0
    probabilities = np.load(elsewhere / "output.npy")
    assert probabilities.shape == (len(images), len(LABELS))
    assert probabilities.dtype == np.float32
    logits = keras.saving.load_model(model_path).predict(images, verbose=0)
    expected = keras.ops.convert_to_numpy(keras.ops.softmax(logits))
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert np.ptp(probabilities) > 0.01


def test_registered_model_loads_where_the_project_is_not(
    tracker: Tracker, tmp_path: Path, model_path: str, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = register_shapes(tracker, "first", model_path, images)
    second = register_shapes(tracker, "second", model_path, images)
    assert register_shapes(tracker, "first", model_path, images) == first
    assert (first["version"], second["version"]) == ("1", "2")
    champion = tracker.client.get_model_version_by_alias("shapes", "champion")
    assert int(champion.version) == 2
    assert json.loads(champion.tags["label_names"]) == LABELS
    assert champion.tags["dataset.sha256"] == SHA256
    check_loads_elsewhere(tracker.client.tracking_uri, tmp_path, model_path, images, monkeypatch)


def test_background_calls_keep_their_order_and_report_failures_once(tracker: Tracker) -> None:
    run_id = tracker.find_or_create_run("train", "background")
    background = BackgroundTracker()
    for value in range(20):
        background.submit(tracker.set_tags, run_id, {"last": value})
        background.submit(tracker.set_tags, "no such run", {"last": value})
    with pytest.warns(UserWarning, match="20 tracking calls failed, the first with: .*no such run"):
        background.close()
    assert tracker.client.get_run(run_id).data.tags["last"] == "19"


def test_environment_tags_tell_versions_and_keep_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--tracking.uri", "https://me:secret@host/path", "a b"])
    tags = environment_tags()
    assert tags["command"] == "run.py --tracking.uri https://***@host/path 'a b'"
    assert tags["version.keras"] == keras.__version__
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=False)
    if (PROJECT / ".git").exists() and commit.returncode == 0:
        assert tags["mlflow.source.git.commit"] == commit.stdout.strip()
        assert tags["mlflow.source.git.dirty"] in ("true", "false")
    else:
        assert "mlflow.source.git.commit" not in tags


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """URI and process of a tracking server that keeps its own artifacts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        f"{tmp_path}/files",
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    with open(tmp_path / "server.log", "w") as log:
        # A session of its own: the server starts workers, which end with their process group.
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120  # imports of a busy machine; 5 s of an idle one
        while True:
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
                time.sleep(0.1)
        yield uri, process
    finally:
        stop(process)


def stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_takes_the_same_calls(
    server: tuple[str, subprocess.Popen],
    tmp_path: Path,
    model_path: str,
    images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri, process = server
    tracker = Tracker(uri, "shapes")
    run_id = tracker.find_or_create_run("pipeline", "remote")
    assert Tracker(uri, "shapes").find_or_create_run("pipeline", "remote") == run_id
    for _ in range(2):
        tracker.log_history(run_id, [{"epoch": 1, "loss": math.nan}, {"epoch": 2, "loss": 1.0}])
    assert [metric.step for metric in tracker.client.get_metric_history(run_id, "loss")] == [1, 2]
    registered = register_shapes(tracker, "remote", model_path, images)
    assert register_shapes(tracker, "remote", model_path, images) == registered
    check_loads_elsewhere(uri, tmp_path, model_path, images, monkeypatch)

    stop(process)
    background = BackgroundTracker()
    started = time.monotonic()
    background.submit(tracker.set_tags, run_id, {"late": "yes"})
    assert time.monotonic() - started < 0.1
    with pytest.warns(UserWarning, match="1 tracking calls failed"):
        background.close()
