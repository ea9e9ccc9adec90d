"""A model of a stranger runs no Python code when it is described or loaded, unless it is trusted."""

import shutil
import sys
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
