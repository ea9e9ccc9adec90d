"""Runs Keras's own tests of training in one process, as they are and with `enable` after every `compile`.

    pip download keras==3.15.1 --no-deps --no-binary :all: && tar xf keras-3.15.1.tar.gz
    PYTHONPATH=. python tests/multiworker/keras_own_tests.py keras-3.15.1

prints the tests that fail with `enable` alone, and ends with 1 if there is one that docs/multiworker.md does not name.
The installed Keras is tested: only the files with the tests are taken from the folder. Nothing of it is changed.
"""

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

FILES = (
    "trainers/trainer_test.py",
    "models/model_test.py",
    "models/sequential_test.py",
    "backend/tensorflow/distribute_test.py",
    "callbacks",
)
# Tests that fail with `enable` by intent, and why; docs/multiworker.md names them too.
_DENSE = "sparse gradients are made dense"
_MIRRORED = "a MirroredStrategy of two devices, in which Keras trains by itself, is refused"
KNOWN = {
    "::DistributeTest::test_correctness_with_fit_and_regularizer": _MIRRORED,
    "::TestTrainer::test_fit_sparse_scipy_": _DENSE,
    "::TestTrainer::test_fit_sparse_tf_": _DENSE,
    "::SwapEMAWeightsTest::test_swap_ema_weights_with_tf_distribute": _MIRRORED,
}
# What the tests take from Keras's own, which is not part of its archive.
_CONFTEST = """
import keras
import pytest


def skip_if_backend(backend, reason):
    return pytest.mark.skipif(keras.config.backend() == backend, reason=reason)
"""
_ENABLE, _RESULTS = "KERAS_OWN_TESTS_ENABLE", "KERAS_OWN_TESTS_RESULTS"


def pytest_configure(config: Any) -> None:
    """Called by pytest, to which this module is a plugin."""
    for marker in ("requires_trainable_backend", "multi_device"):
        config.addinivalue_line("markers", f"{marker}: of Keras")
    import keras  # noqa: F401  (before the next line, since it uses jax where it is installed)

    # A test module imports it whatever the backend is.
    sys.modules.setdefault("jax", types.ModuleType("jax"))
    if os.environ[_ENABLE]:
        _enable_after_every_compile()


def pytest_runtest_logreport(report: Any) -> None:
    """Called by pytest with the result of each phase of each test."""
    if report.when == "call" or report.outcome != "passed":
        with open(os.environ[_RESULTS], "a") as results:
            print(json.dumps([report.nodeid, report.outcome]), file=results)


def _enable_after_every_compile() -> None:
    import keras

    from pipeline import multiworker

    trainer = next(owner for owner in keras.Model.__mro__ if owner.__name__ == "Trainer")
    compile_model = trainer.compile
    enabling = False

    @functools.wraps(compile_model)
    def compile_and_enable(model: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal enabling
        compile_model(model, *args, **kwargs)
        # Keras's tests also make models of a trainer and a layer that are no keras.Model.
        if isinstance(model, keras.Layer) and not enabling:
            enabling = True  # `enable` compiles a model itself, to see which attributes it has
            try:
                multiworker.enable(model)
                with open(os.environ[_RESULTS], "a") as results:
                    print(json.dumps(["enabled", "model"]), file=results)
            finally:
                enabling = False

    trainer.compile = compile_and_enable


def outcomes(folder: Path, enabled: bool, limit: int, only: str) -> tuple[dict[str, str], int]:
    """The outcome of each test by its name, and how many models were enabled."""
    results = folder / ("enabled.jsonl" if enabled else "stock.jsonl")
    results.touch()
    here = Path(__file__).parent
    environment = os.environ | {
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]),
        _ENABLE: "1" if enabled else "",
        _RESULTS: str(results),
    }
    options = ["-q", "-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider", "-p", "keras_own_tests"]
    options += [
        "--continue-on-collection-errors",
        "-W",
        "ignore",
        f"--timeout={limit}",
        "--tb=short",
        *(["-k", only] if only else []),
    ]
    with open(folder / f"{results.stem}.log", "w") as log:
        command = [sys.executable, "-m", "pytest", *options, str(folder)]
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    found: dict[str, str] = {}
    models = 0
    for line in results.read_text().splitlines():
        name, outcome = json.loads(line)
        if outcome == "model":
            models += 1
        else:
            found[name] = "failed" if "failed" in (outcome, found.get(name)) else outcome
    return found, models


def copied(keras_folder: Path, folder: Path) -> None:
    """Copies the tests into an empty folder, so that the installed Keras is imported and not the one beside them."""
    for name in FILES:
        path = keras_folder / "keras" / "src" / name
        for file in path.glob("*_test.py") if path.is_dir() else [path]:
            shutil.copy(file, folder)
    (folder / "conftest.py").write_text(_CONFTEST)


def main() -> int:
    """Runs the tests twice and prints those that fail only with `enable`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("keras", type=Path, help="folder of Keras's source, with its tests, of the installed version")
    parser.add_argument("-k", dest="only", default="", help="only the tests whose names match, as in pytest")
    parser.add_argument("--limit", type=int, default=100, help="seconds that a test may take")
    parser.add_argument("--logs", type=Path, help="where what pytest prints is to stay, a new folder")
    options = parser.parse_args()
    if not (options.keras / "keras" / "src" / FILES[0]).exists():
        parser.error(f"{options.keras} has no keras/src/{FILES[0]}: take Keras's source, not the installed package")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.logs or Path(temporary)
        folder.mkdir(exist_ok=True)
        copied(options.keras, folder)
        (stock, _), (enabled, models) = (
            outcomes(folder.resolve(), e, options.limit, options.only) for e in (False, True)
        )
    for title, found in (("as they are", stock), ("with enable", enabled)):
        counts = {kind: list(found.values()).count(kind) for kind in ("passed", "failed", "skipped")}
        print(f"{title}: {', '.join(f'{number} {kind}' for kind, number in counts.items())}")
    print(f"{models} models were enabled")
    worse = [name for name, outcome in stock.items() if outcome == "passed" and enabled.get(name) != "passed"]
    for name in worse:
        known = next((why for part, why in KNOWN.items() if part in name), "")
        print(f"only with enable {enabled.get(name, 'not run')}: {name}{f' (known: {known})' if known else ''}")
    return 1 if [name for name in worse if not any(part in name for part in KNOWN)] or not stock else 0


if __name__ == "__main__":
    sys.exit(main())
