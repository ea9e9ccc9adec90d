"""The imports of every module follow one dict, `MAY_IMPORT`, and each heavy library stays in its place.

The README's picture of the packages is drawn from the same dict: `python tests/test_imports.py` prints it.
"""

import ast
import graphlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("perceiver", "tune", "pipeline")
GROUND = ("pipeline.storage", "pipeline.contact", "pipeline.fields", "pipeline.masking", "pipeline.devices")
# What each package, and each module on the top floor of `pipeline`, may import of this project besides itself. An entry
# allows a module and all below it. Arrows form no circle; `perceiver` <- `tune` <- `pipeline`.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "perceiver": (),
    "tune": ("perceiver",),
    # Can be taken alone.
    "pipeline.multiworker": (),
    "pipeline.contact": (),
    "pipeline.storage": ("pipeline.contact",),
    "pipeline.masking": (),
    "pipeline.devices": ("perceiver.processor",),
    "pipeline.fields": ("pipeline.masking",),
    # Its exit code and its messages are those of every command.
    "pipeline.command": ("pipeline.contact", "pipeline.masking", "pipeline.devices"),
    # Numbers in, a page out.
    "pipeline.report": (),
    # Knows no machine learning.
    "pipeline.workflow": GROUND,
    "pipeline.data": GROUND,
    "pipeline.tracking": GROUND,
    # One worker's `fit`; knows no Ray.
    "pipeline.training": (*GROUND, "pipeline.data", "pipeline.multiworker", "perceiver"),
    "pipeline.evaluation": (*GROUND, "pipeline.data", "perceiver"),
    "pipeline.registry": (*GROUND, "pipeline.tracking", "perceiver"),
    "pipeline.workers": (
        "pipeline.multiworker",
        *GROUND,
        "pipeline.training",
        "pipeline.data",
        "pipeline.workflow",
        "perceiver",
    ),
    "pipeline.inference": (*GROUND, "pipeline.registry", "pipeline.data", "pipeline.workflow"),
    # Settings stand beside what they configure and are put together here.
    "pipeline.settings": (
        *GROUND,
        "pipeline.data.config",
        "pipeline.data.download",
        "pipeline.data.image_survey",
        "pipeline.data.sources",
        "pipeline.evaluation.config",
        "pipeline.registry.config",
        "pipeline.tracking.config",
        "pipeline.training.config",
        "tune",
        "perceiver",
    ),
    "pipeline.tasks": (
        *GROUND,
        "pipeline.settings",
        "pipeline.data",
        "pipeline.evaluation",
        "pipeline.registry",
        "pipeline.report",
        "pipeline.training",
        "pipeline.workers",
        "pipeline.workflow",
        "tune",
        "perceiver",
    ),
    # It does not train: of `training` it knows the events that a worker reports.
    "pipeline.driver": (
        *GROUND,
        "pipeline.command",
        "pipeline.settings",
        "pipeline.tasks",
        "pipeline.data",
        "pipeline.tracking",
        "pipeline.training.worker",
        "pipeline.workflow",
        "tune",
        "perceiver",
    ),
    # What a person starts.
    "pipeline.run": ("pipeline.command", "pipeline.driver", "pipeline.settings"),
    "pipeline.own_model": (
        *GROUND,
        "pipeline.command",
        "pipeline.driver",
        "pipeline.settings",
        "pipeline.tasks",
        "pipeline.training.own_model",
        "pipeline.workflow",
    ),
    "pipeline.predict": (*GROUND, "pipeline.command", "pipeline.driver.progress", "pipeline.inference"),
    "pipeline.evaluate_version": ("pipeline.command", "pipeline.data", "pipeline.evaluation", "pipeline.registry"),
    "pipeline.kept": (*GROUND, "pipeline.registry", "pipeline.tasks", "pipeline.tracking", "pipeline.workflow"),
    "pipeline.clean": (
        *GROUND,
        "pipeline.command",
        "pipeline.driver.progress",
        "pipeline.kept",
        "pipeline.tasks",
        "pipeline.workflow",
    ),
}
HEAVY = ("keras", "mlflow", "ray", "tensorflow")
WITHOUT_RAY = ("perceiver", "pipeline.training", "pipeline.evaluation", "pipeline.tracking", "pipeline.registry")
# Settings and the command line load in a moment.
LIGHT_MODULES = (
    "perceiver.config",
    "perceiver.presets",
    "perceiver.cost",
    "tune.config",
    "tune.space",
    "pipeline.settings.config",
    "pipeline.settings.presets",
    "pipeline.settings.command_line",
)
# A process of the search chooses TensorFlow's kernels in its environment, which TensorFlow reads when it is imported.
WITHOUT_TENSORFLOW = ("tune.trial_process", "pipeline.tasks.trial")
Import = tuple[int, str, str]


def imports(tree: ast.Module) -> Iterator[Import]:
    """Line, dotted name and bound name of every import, including those inside of functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, alias.asname or alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}", alias.asname or alias.name


def package_of(module: str) -> str:
    """The key of `MAY_IMPORT` to which a module belongs: `perceiver`, `tune` or `pipeline.<first name>`."""
    top, _, rest = module.partition(".")
    return f"{top}.{rest.partition('.')[0]}" if top == "pipeline" and rest else top


def broken_rule(module: str, name: str, bound: str) -> str | None:
    """The rule that `module` breaks if it imports `name` and calls it `bound`; None if it keeps all."""
    package, top = package_of(module), name.split(".")[0]
    if name.startswith("."):
        # It is also installed by itself, under another name.
        within = package == "pipeline.multiworker" and not name.startswith("..")
        return None if within else "imports are absolute"
    if package not in MAY_IMPORT and module != "pipeline":
        return f"MAY_IMPORT does not know {package}"
    if top in PACKAGES and package_of(name) != package:
        allowed = MAY_IMPORT.get(package, ())
        if not any(f"{name}.".startswith(f"{entry}.") for entry in allowed):
            return f"{package} may import {', '.join(allowed) or 'nothing of this project'}"
    if package == "perceiver" and top not in {"perceiver", "keras", "numpy"} | sys.stdlib_module_names:
        return "perceiver imports Keras, NumPy and the standard library only"
    if top == "mlflow" and package not in ("pipeline.tracking", "pipeline.registry"):
        return "only tracking and registry import MLflow"
    if name == "mlflow.MlflowClient" and module != "pipeline.tracking.tracker":
        return "only pipeline/tracking/tracker.py knows MLflow's client"
    if name.startswith("keras.src") and module != "pipeline.multiworker.keras_internals":
        return "only multiworker/keras_internals.py touches private names of Keras"
    if top == "ray" and "._" in name and module != "pipeline.workers.ray_internals":
        return "only pipeline/workers/ray_internals.py touches private names of Ray"
    if top == "ray" and package in WITHOUT_RAY:
        return f"{package} knows no Ray"
    if top in ("keras", "tensorflow", "perceiver") and package == "pipeline.workflow":
        return "the workflow knows no machine learning"
    if top in HEAVY and module in LIGHT_MODULES:
        return f"settings load without {top}"
    if top == "ray" and bound == "tune":
        return "`tune` is this project's: write `import ray.tune`"
    return None


def violations(root: Path) -> list[str]:
    """`file:line: name: rule` of every import below `root` that breaks a rule."""
    found = []
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        file = path.relative_to(root)
        module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        for line, name, bound in imports(ast.parse(path.read_text(), filename=str(path))):
            if rule := broken_rule(module, name, bound):
                found.append(f"{file}:{line}: {name}: {rule}")
    return found


def shadows(root: Path) -> list[str]:
    """Files and folders on the top floor of `pipeline` that have the name of a module that can be imported elsewhere.

    `python pipeline/run.py` puts `pipeline/` first on sys.path, so that they would be imported instead.
    """
    distributions = importlib.metadata.packages_distributions()
    taken = sys.stdlib_module_names | set(distributions) | set(PACKAGES)
    children = sorted(path for path in (root / "pipeline").iterdir() if path.name != "__pycache__")
    return [f"{path.relative_to(root)}: shadows the module {path.stem}" for path in children if path.stem in taken]


def arrows() -> dict[str, set[str]]:
    """The packages that each package may import."""
    return {package: {package_of(entry) for entry in allowed} for package, allowed in MAY_IMPORT.items()}


def diagram() -> str:
    """The packages as a Mermaid flowchart, without the arrows that follow from others and without the ground floor."""
    drawn = {package: targets - set(GROUND) for package, targets in arrows().items() if package not in GROUND}
    reachable: dict[str, set[str]] = {}
    for package in graphlib.TopologicalSorter(drawn).static_order():
        reachable[package] = drawn[package].union(*(reachable[target] for target in drawn[package]))
    lines = ["flowchart TB"]
    for package, targets in drawn.items():
        direct = targets - set().union(*(reachable[target] for target in targets))
        lines.append(f"    {package.removeprefix('pipeline.')}")
        lines += [
            f"    {package.removeprefix('pipeline.')} --> {target.removeprefix('pipeline.')}"
            for target in sorted(direct)
        ]
    return "\n".join(lines)


def test_every_import_is_allowed() -> None:
    assert not violations(ROOT)


def test_nothing_in_pipeline_hides_an_installed_module() -> None:
    assert not shadows(ROOT)


def test_the_packages_form_no_circle() -> None:
    graphlib.TopologicalSorter(arrows()).prepare()


def test_the_dict_has_no_package_that_is_gone_and_no_arrow_that_nobody_uses() -> None:
    used: dict[str, set[str]] = {package: set() for package in MAY_IMPORT}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        names = [name for _, name, _ in imports(ast.parse(path.read_text()))]
        if module.removesuffix(".__init__") != "pipeline":
            used[package_of(module.removesuffix(".__init__"))].update(names)
    for package, allowed in MAY_IMPORT.items():
        assert (ROOT / package.replace(".", "/")).is_dir() or (ROOT / f"{package.replace('.', '/')}.py").is_file()
        for entry in set(allowed) - set(GROUND):
            assert any(f"{name}.".startswith(f"{entry}.") for name in used[package]), f"{package} imports no {entry}"


def test_the_readme_draws_these_packages() -> None:
    assert f"```mermaid\n{diagram()}\n```" in (ROOT / "README.md").read_text(), "python tests/test_imports.py prints it"


@pytest.mark.parametrize(
    ("file", "source", "rule"),
    [
        ("perceiver/model.py", "import pipeline.fields", "perceiver may import nothing of this project"),
        ("perceiver/model.py", "def f():\n    from tune import space", "perceiver may import nothing of this project"),
        ("perceiver/attention.py", "import tensorflow as tf", "perceiver imports Keras"),
        ("perceiver/layers/attention.py", "import ray", "perceiver imports Keras"),
        ("perceiver/model.py", "from . import attention", "imports are absolute"),
        ("perceiver/config.py", "import keras", "settings load without keras"),
        ("tune/search.py", "from pipeline.workers.train import train", "tune may import perceiver"),
        ("tune/search.py", "from ray import tune", "write `import ray.tune`"),
        ("tune/search.py", "import ray.tune as tune", "write `import ray.tune`"),
        ("tune/config.py", "import ray.tune", "settings load without ray"),
        ("tune/search.py", "import ray.train.v2._internal.x", "only pipeline/workers/ray_internals.py touches private"),
        ("pipeline/data/rows.py", "from pipeline.training import fit", "pipeline.data may import pipeline.storage"),
        ("pipeline/driver/drive.py", "def f():\n    import pipeline.training.fit", "pipeline.driver may import"),
        ("pipeline/settings/config.py", "from pipeline.training.fit import fit", "pipeline.settings may import"),
        ("pipeline/settings/config.py", "from pipeline import workers", "pipeline.settings may import"),
        ("pipeline/wing/room.py", "import os", "MAY_IMPORT does not know pipeline.wing"),
        ("pipeline/loft.py", "import os", "MAY_IMPORT does not know pipeline.loft"),
        ("pipeline/training/fit.py", "import ray", "pipeline.training knows no Ray"),
        ("pipeline/training/fit.py", "from keras.src.backend import x", "only multiworker/keras_internals.py"),
        ("pipeline/multiworker/data.py", "from keras.src import x", "only multiworker/keras_internals.py"),
        ("pipeline/multiworker/data.py", "from ..data import rows", "imports are absolute"),
        ("pipeline/workers/train.py", "from mlflow import MlflowClient", "only tracking and registry import MLflow"),
        ("pipeline/registry/fetch.py", "from mlflow import MlflowClient", "tracker.py knows MLflow's client"),
        ("pipeline/workers/train.py", "from ray._private import x", "only pipeline/workers/ray_internals.py touches"),
        ("pipeline/workflow/run.py", "import keras", "the workflow knows no machine learning"),
        ("pipeline/settings/config.py", "def f():\n    import keras", "settings load without keras"),
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
        ("pipeline/tracking/tracker.py", "from mlflow import MlflowClient\nfrom pipeline.storage import Storage"),
        ("pipeline/workers/train.py", "import keras, ray.train, tensorflow\nfrom pipeline.training.fit import fit"),
        ("pipeline/driver/progress.py", "from pipeline.training.worker import EpochEnded"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert not violations(tmp_path)


@pytest.mark.parametrize(
    "package", sorted(file.parent for name in PACKAGES for file in ROOT.glob(f"{name}/**/__init__.py"))
)
def test_the_docstring_of_a_package_has_a_line_for_each_of_its_files(package: Path) -> None:
    said = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    named = {line.split()[0] for line in said.splitlines() if line.strip()}
    assert not {file.name for file in package.glob("*.py")} - named - {"__init__.py"}


@pytest.mark.parametrize("name", ["mlflow.py", "ray", "tune", "json.py", "yaml"])
def test_a_file_or_folder_that_hides_a_module_is_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "pipeline" / name).mkdir(parents=True)
    (tmp_path / "pipeline" / "workflow").mkdir()
    assert shadows(tmp_path) == [f"pipeline/{name}: shadows the module {name.removesuffix('.py')}"]


def test_settings_load_no_heavy_library() -> None:
    # In a new process, since this one may have loaded them all; through other modules too, which the AST cannot see.
    code = f"import sys\nfor module in {LIGHT_MODULES}:\n    __import__(module)\n"
    code += f"    print(module, *sorted({set(HEAVY)} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == list(LIGHT_MODULES)


def test_a_process_of_the_search_starts_without_tensorflow() -> None:
    code = f"import sys\nfor module in {WITHOUT_TENSORFLOW}:\n    __import__(module)\n"
    code += "print(*sorted({'tensorflow', 'keras'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


if __name__ == "__main__":
    print(diagram())
