"""The registered model is loaded and served by processes without this project, also in a separate environment."""

import json
import os
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path

import keras
import numpy as np
import pytest
from image_models import register_perceiver, save_perceiver
from tracking_server import free_port, kill, wait_until_healthy

from perceiver.config import PerceiverConfig
from pipeline.evaluation.metrics import softmax
from pipeline.registry.promotion import Evidence
from pipeline.registry.versions import CARD_FILE, RETRAIN_FILE
from pipeline.tracking.tracker import Tracker

LABELS = ["circle", "square", "triangle"]
TEMPERATURE = 1.7
BIN = Path(sys.executable).parent

PREDICT = """
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


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = PerceiverConfig(
        image_shape=(8, 8, 1), num_classes=3, num_latents=4, latent_dim=16, conv_channels=8, data_dim=16
    )
    return save_perceiver(config, tmp_path_factory.mktemp("model") / "best.keras")


@pytest.fixture(scope="module")
def expected(model_path: str, images: np.ndarray) -> np.ndarray:
    logits = np.asarray(keras.saving.load_model(model_path).predict(images, verbose=0))
    found = softmax(logits, TEMPERATURE)
    assert np.ptp(found) > 0.01
    assert np.abs(found - softmax(logits)).max() > 0.01, "otherwise a model without the temperature would pass"
    return found


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, model_path: str, images: np.ndarray) -> Tracker:
    """A store in which the model is registered."""
    folder = tmp_path_factory.mktemp("store")
    tracker = Tracker(f"sqlite:///{folder}/mlflow.db", "shapes", f"{folder}/mlartifacts")
    evidence = Evidence("d" * 64, np.arange(5), np.ones(5, bool), 0.02, 5.0)
    register_perceiver(
        tracker, "shapes", model_path, LABELS, images[:2], TEMPERATURE, evidence, metadata={"source": "drawn"}
    )
    return tracker


def environment(uri: str, **more: str) -> dict[str, str]:
    """Environment variables without the project on the path, which forbid unpickling."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("MLFLOW_")}
    return kept | {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **more,
    }


def check_predicts(python: Path | str, uri: str, folder: Path, images: np.ndarray, expected: np.ndarray) -> None:
    """Asserts that a new process of the interpreter, in an empty folder, predicts the same as the trained model."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    np.save(elsewhere / "images.npy", images)
    command = [str(python), "-I", "-c", textwrap.dedent(PREDICT), uri, "images.npy", "output.npy"]
    result = subprocess.run(command, cwd=elsewhere, env=environment(uri), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    found = np.load(elsewhere / "output.npy")
    assert (found.shape, found.dtype) == ((len(images), len(LABELS)), np.float32)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def served(binaries: Path, uri: str, folder: Path, images: np.ndarray) -> np.ndarray:
    """Answer of `mlflow models serve` to images sent as JSON."""
    port, log = free_port(), folder / "serve.log"
    command = [str(binaries / "mlflow"), "models", "serve", "-m", "models:/shapes@champion", "--env-manager", "local"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=environment(uri, PATH=f"{binaries}:{os.environ['PATH']}"),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/ping", process, log)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"inputs": images.tolist()}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return np.array(json.load(answer)["predictions"])
    finally:
        kill(process)


def test_a_process_without_the_project_predicts_the_same(
    registered: Tracker, tmp_path: Path, images: np.ndarray, expected: np.ndarray
) -> None:
    check_predicts(sys.executable, registered.uri, tmp_path, images, expected)


def test_the_additional_files_are_there(registered: Tracker, model_path: str) -> None:
    version = registered.client.get_model_version_by_alias("shapes", "champion")
    folder = Path(str(version.source))
    assert (folder / RETRAIN_FILE).read_bytes() == Path(model_path).read_bytes()
    assert (folder / CARD_FILE).read_text() == "# shapes\n"
    assert json.loads(version.tags["label_names"]) == LABELS
    assert not list(folder.rglob("*.pkl"))


def test_mlflow_serves_it(registered: Tracker, tmp_path: Path, images: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(served(BIN, registered.uri, tmp_path, images), expected, atol=1e-5)


@pytest.fixture(scope="module")
def fresh_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder `bin` of an environment with only the packages that the model needs, from the package index."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    versions = subprocess.run(
        [sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True, check=True
    ).stdout.split()
    wanted = [line for line in versions if line.split("==")[0] in ("mlflow", "keras", "tensorflow")]
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *wanted]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"no package index: {installed.stderr.strip()[-300:]}")
    return folder / "bin"


@pytest.mark.slow
def test_an_environment_of_mlflow_keras_and_tensorflow_is_enough(
    fresh_environment: Path, registered: Tracker, tmp_path: Path, images: np.ndarray, expected: np.ndarray
) -> None:
    listed = subprocess.run([fresh_environment / "python", "-m", "pip", "list"], capture_output=True, text=True)
    assert "keras-perceiver-ray" not in listed.stdout
    assert "ray " not in listed.stdout
    check_predicts(fresh_environment / "python", registered.uri, tmp_path, images, expected)
    np.testing.assert_allclose(served(fresh_environment, registered.uri, tmp_path, images), expected, atol=1e-5)
