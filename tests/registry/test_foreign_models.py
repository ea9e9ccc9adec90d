"""A model of a stranger runs no Python code when it is described or loaded, unless it is trusted."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from image_models import save_perceiver

from perceiver import presets
from pipeline.registry.export import export
from pipeline.registry.fetch import RegisteredModel, fetch

PYTHON = "python_function"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    path = save_perceiver(presets.quickstart(), folder / "model.keras")
    (folder / "model").mkdir()
    export(
        path,
        folder / "model",
        temperature=1.0,
        input_example=np.zeros((1, 8, 8, 1), np.uint8),
        label_names=[str(digit) for digit in range(10)],
        metadata={},
        card="",
    )
    return folder / "model"


def changed(exported: Path, folder: Path, flavor: str, **settings: Any) -> Path:
    """A copy of the model whose description has other settings; with code that leaves a mark when it is imported."""
    shutil.copytree(exported, folder)
    path = folder / "MLmodel"
    described = yaml.safe_load(path.read_text())
    described["flavors"].setdefault(flavor, {}).update(settings)
    path.write_text(yaml.safe_dump(described))
    (folder / "code").mkdir()
    (folder / "code" / "strangers_code.py").write_text(
        f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\n"
        "class Model:\n    def predict(self, images):\n        return images\n"
        "def _load_pyfunc(path):\n    return Model()\n"
    )
    return folder


def test_a_model_of_this_pipeline_is_loaded(exported: Path, tmp_path: Path) -> None:
    predict = fetch(str(exported), None, tmp_path).load()
    assert predict(np.zeros((2, 8, 8, 1), np.uint8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("flavor", "settings", "message"),
    [
        (
            PYTHON,
            {"loader_module": "strangers_code", "code": "code"},
            "code = 'code', loader_module = 'strangers_code'",
        ),
        (PYTHON, {"code": "code"}, "code = 'code'"),
        (PYTHON, {"loader_module": "mlflow.pyfunc.model"}, "loader_module = 'mlflow.pyfunc.model'"),
        (PYTHON, {"python_model": "python_model.pkl"}, "python_model = 'python_model.pkl'"),
        ("keras", {"save_exported_model": False}, "no exported Keras model"),
        ("keras", {"data": "../../elsewhere"}, "no exported Keras model"),
        ("sklearn", {"pickled_model": "model.pkl"}, "the flavor 'sklearn'"),
    ],
)
def test_a_model_of_another_kind_is_refused(
    exported: Path, tmp_path: Path, flavor: str, settings: dict[str, Any], message: str
) -> None:
    folder = changed(exported, tmp_path / "model", flavor, **settings)
    with pytest.raises(ValueError, match=f"may run code when it is loaded, for it has .*{message}.*give --trust"):
        fetch(str(folder), None, tmp_path)
    assert not (folder / "ran").exists()


def test_a_trusted_model_runs_its_code(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = changed(exported, tmp_path / "model", PYTHON, loader_module="strangers_code", code="code")
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = RegisteredModel.from_folder(folder, str(folder), trust=True)
    assert not (folder / "ran").exists(), "to describe it runs nothing"
    model.load()
    assert (folder / "ran").exists()


@pytest.mark.parametrize(
    ("label_names", "shape"),
    [
        (lambda: nested(60), None),
        (lambda: {"a": 1}, None),
        (lambda: None, (-1, -1, 8, 1)),
        (lambda: None, (-1, 8, 0, 1)),
        (lambda: None, (-1, 8, 8)),
    ],
    ids=["names that grow without end", "a mapping", "any height", "no width", "no channels"],
)
def test_a_description_that_is_no_classifier_is_refused(
    label_names: Callable[[], Any], shape: tuple[int, ...] | None, exported: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    described = yaml.safe_load((folder / "MLmodel").read_text())
    if (names := label_names()) is not None:
        described["metadata"]["label_names"] = names
    if shape:
        described["signature"]["inputs"] = json.dumps(
            [{"type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": shape}}]
        )
    (folder / "MLmodel").write_text(yaml.safe_dump(described))
    began = time.process_time()
    with pytest.raises(ValueError, match=r"log it with a signature of one uint8 array|no MLmodel file that can"):
        fetch(str(folder), None, tmp_path)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("dtype", "metadata", "message"),
    [
        (
            *("float32", None),
            r"has the inputs \[Tensor\('float32', \(-1, 8, 8, 1\)\)\] in its signature and label_names in its metadata",
        ),
        (*("uint8", {}), r"has the inputs .*'uint8', .* and no label_names in its metadata"),
        (*("uint8", {"label_names": "cats"}), r" and str, not a list of names, as label_names in its metadata"),
        (*(None, None), r"has no inputs in its signature and label_names in its metadata"),
    ],
    ids=["floating-point images", "no names", "a text", "outputs alone"],
)
def test_what_a_description_lacks_is_said_with_what_was_found(
    dtype: str | None, metadata: dict[str, Any] | None, message: str, exported: Path, tmp_path: Path
) -> None:
    shutil.copytree(exported, tmp_path / "model")
    described = yaml.safe_load((tmp_path / "model" / "MLmodel").read_text())
    tensor = {"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": [-1, 8, 8, 1]}}
    described["signature"]["inputs"] = dtype and json.dumps([tensor])
    described["metadata"] = described["metadata"] if metadata is None else metadata
    (tmp_path / "model" / "MLmodel").write_text(yaml.safe_dump(described))
    needed = r": log it with a signature of one uint8 array \(-1, H, W, C\), .* the list label_names in its metadata$"
    with pytest.raises(ValueError, match=message + needed):
        RegisteredModel.from_folder(tmp_path / "model", "models:/m/1")


def nested(depth: int) -> list[Any]:
    """Lists that YAML writes in a few lines, and `str` in 2 ** depth words."""
    value: list[Any] = ["x", "x"]
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch ran']\n",
        "flavors: !!python/object/new:os.system ['touch ran']\n",
        "[" * 100_000,
        "- not a mapping\n",
        "\0",
        "#" + "x" * (17 << 20),
    ],
    ids=["tag", "tag within", "brackets", "list", "nul", "17 MiB"],
)
def test_a_description_that_cannot_be_read_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "MLmodel").write_text(text)
    began = time.process_time()
    with pytest.raises(ValueError, match="has no MLmodel file that can be read:") as caught:
        fetch(str(tmp_path / "model"), None, tmp_path)
    assert time.process_time() - began < 5
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "ran").exists()
