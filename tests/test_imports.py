"""The imports of every module keep the layering: perceiver <- tune <- pipeline, and each heavy library in its place."""

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("perceiver", "tune", "pipeline")
HEAVY = ("keras", "mlflow", "ray", "tensorflow")
MLFLOW_MODULES = ("pipeline.tracking", "pipeline.registry", "pipeline.registered_model", "pipeline.export")
CONFIG_MODULES = (
    "perceiver.config",
    "perceiver.presets",
    "perceiver.cost",
    "tune.config",
    "tune.space",
    "pipeline.config",
    "pipeline.presets",
    "pipeline.command_line",
)


def imports(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Line, dotted name and bound name of every import, those inside of functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, alias.asname or alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}", alias.asname or alias.name


def broken_rule(module: str, name: str, bound: str) -> str | None:
    """The rule of the layering that `module` breaks if it imports `name` and calls it `bound`; None if it keeps all."""
    package, top = module.split(".")[0], name.split(".")[0]
    if name.startswith("."):
        return "imports are absolute"
    if package == "perceiver" and top not in {"perceiver", "keras", "numpy"} | sys.stdlib_module_names:
        return "perceiver imports Keras, NumPy and the standard library only"
    if package == "tune" and top == "pipeline":
        return "tune does not import pipeline: it gets the training driver as an argument"
    if top == "mlflow" and module not in MLFLOW_MODULES:
        return "only a few modules import MLflow"
    if name.startswith("keras.src") and module != "pipeline.multiworker":
        return "only pipeline/multiworker.py touches private names of Keras"
    if top == "ray" and "._" in name and module != "pipeline.ray_internals":
        return "only pipeline/ray_internals.py touches private names of Ray"
    if top in HEAVY and module in CONFIG_MODULES:
        return f"settings load without {top}"
    if top == "ray" and bound == "tune":
        return "`tune` is this project's: write `import ray.tune`"
    return None


def violations(root: Path) -> list[str]:
    """`file:line: name: rule` of every import below `root` that breaks the layering, and of every shadowing file."""
    found = []
    taken = sys.stdlib_module_names | set(importlib.metadata.packages_distributions()) | set(PACKAGES)
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        file = path.relative_to(root)
        module = ".".join(file.with_suffix("").parts)
        for line, name, bound in imports(ast.parse(path.read_text(), filename=str(path))):
            if rule := broken_rule(module, name, bound):
                found.append(f"{file}:{line}: {name}: {rule}")
        # `python pipeline/run.py` puts pipeline/ first on sys.path.
        if file.parent == Path("pipeline") and path.stem in taken:
            found.append(f"{file}: shadows the module {path.stem}")
    return found


def test_the_project_keeps_the_layering() -> None:
    assert not violations(ROOT)


@pytest.mark.parametrize(
    ("file", "source", "rule"),
    [
        ("perceiver/model.py", "import pipeline.config", "perceiver imports Keras"),
        ("perceiver/model.py", "def f():\n    from tune import space", "perceiver imports Keras"),
        ("perceiver/attention.py", "import tensorflow as tf", "perceiver imports Keras"),
        ("perceiver/layers/attention.py", "import ray", "perceiver imports Keras"),
        ("perceiver/model.py", "from . import attention", "imports are absolute"),
        ("perceiver/config.py", "import keras", "settings load without keras"),
        ("tune/search.py", "from pipeline.train import train", "tune does not import pipeline"),
        ("tune/search.py", "from ray import tune", "write `import ray.tune`"),
        ("tune/search.py", "import ray.tune as tune", "write `import ray.tune`"),
        ("tune/config.py", "import ray.tune", "settings load without ray"),
        ("pipeline/train.py", "from mlflow import MlflowClient", "only a few modules import MLflow"),
        ("pipeline/fit.py", "from keras.src.backend import x", "only pipeline/multiworker.py touches private names"),
        ("pipeline/train.py", "from ray._private import x", "only pipeline/ray_internals.py touches private names"),
        ("tune/search.py", "import ray.train.v2._internal.x", "only pipeline/ray_internals.py touches private names"),
        ("pipeline/config.py", "def f():\n    import keras", "settings load without keras"),
        ("pipeline/mlflow.py", "", "shadows the module mlflow"),
        ("pipeline/ray.py", "", "shadows the module ray"),
        ("pipeline/tune.py", "", "shadows the module tune"),
        ("pipeline/json.py", "", "shadows the module json"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, file: str, source: str, rule: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (found,) = violations(tmp_path)
    assert found.startswith(file)
    assert rule in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("perceiver/model.py", "import math\nimport keras\nimport numpy as np\nfrom perceiver.attention import MLP"),
        ("tune/search.py", "import ray.tune\nfrom ray.tune.search.optuna import OptunaSearch\nimport perceiver.config"),
        ("pipeline/tracking.py", "import mlflow.keras\nfrom tune import search"),
        ("pipeline/train.py", "import keras, ray.train, tensorflow\nfrom tune.config import SearchConfig"),
    ],
)
def test_what_the_layering_allows_passes(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert not violations(tmp_path)


@pytest.mark.parametrize("module", CONFIG_MODULES)
def test_settings_load_no_heavy_library(module: str) -> None:
    # In a new process, since this one may have loaded them all; through other modules too, which the AST cannot see.
    code = f"import sys, {module}; print(*sorted({set(HEAVY)} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
