"""The key of a model of one's own: what it covers, which builders have none, and where it is compared."""

import copy
import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import own_models
import pytest
from ray import cloudpickle

from pipeline.settings.presets import quickstart
from pipeline.storage import Storage
from pipeline.tasks.graph import TASKS
from pipeline.tasks.own_model import own_model_tasks, sealed
from pipeline.training import own_model
from pipeline.training.models import build_model
from pipeline.training.own_model import OwnModel
from pipeline.training.worker import OwnModelError
from pipeline.workflow.run import Run

SMALL = OwnModel(own_models.convolutional, image_shape=(8, 8, 1), num_classes=10)


def test_all_that_makes_another_model_makes_another_key(tmp_path: Path) -> None:
    def keys(model: OwnModel) -> dict[str, str]:
        return Run(own_model_tasks(model), config, storage).keys

    config, storage = quickstart(), Storage(str(tmp_path))
    others = [replace(SMALL, version=1), replace(SMALL, arguments={"channels": 5})]
    others += [
        replace(SMALL, builder=own_models.attending),
        replace(SMALL, builder=_from_file(tmp_path / "one.py", "return 1")),
    ]
    others.append(replace(SMALL, builder=_from_file(tmp_path / "two.py", "return 2")))
    found = [keys(model) for model in (SMALL, *others)]
    assert len({each["train"] for each in found}) == len({each["evaluate"] for each in found}) == len(found)
    assert keys(replace(SMALL, arguments={})) == found[0], "the same model has the same key"
    of_the_pipeline = Run(TASKS, config, storage).keys
    for task in ("ingest", "preprocess"):
        assert {each[task] for each in found} == {of_the_pipeline[task]}, "the data are shared"
    assert of_the_pipeline["train"] not in {each["train"] for each in found}


def _from_file(script: Path, body: str) -> Callable[..., Any]:
    script.write_text(f"def build(**_):\n    {body}\n")
    names: dict[str, Any] = {}
    exec(compile(script.read_text(), str(script), "exec"), names)
    return names["build"]


def test_defaults_are_in_the_key_and_change_none_that_has_none() -> None:
    """The same lines give other defaults each time they run."""

    def with_default(width: Any) -> OwnModel:
        def build(image_shape: Any, num_classes: int, pixel_mean: Any, pixel_std: Any, width: Any = width) -> Any: ...

        return OwnModel(build)

    one, two = with_default(1).key(), with_default((2, 3)).key()
    assert (one.pop("defaults"), two.pop("defaults")) == ({"width": 1}, {"width": [2, 3]})
    assert one == two
    given: dict[str, Any] = {"arguments": {"width": 4}}  # what is given is not left to the default
    assert replace(with_default(1), **given).key() == replace(with_default(object()), **given).key() == one | given
    assert set(one) == set(OwnModel(own_models.attending).key()) == {"builder", "source", "arguments", "version"}
    message = r"with_default.<locals>.build has the default width = <object .*>, which no key holds: pass it in `argum"
    with pytest.raises(ValueError, match=message):
        with_default(object()).key()


def test_two_functions_of_one_name_in_a_file_have_two_keys() -> None:
    def made(deep: bool) -> OwnModel:
        if deep:

            def build(**_: Any) -> Any:
                return "deep"

        else:

            def build(**_: Any) -> Any:
                return "flat"

        return OwnModel(build)

    assert made(True).key() == made(True).key() == {k: v for k, v in made(False).key().items() if k != "number"}
    assert made(False).key()["number"] == 1


class Built:
    def method(self, **_: Any) -> Any: ...

    def __call__(self, **_: Any) -> Any: ...


def _capturing(width: int) -> Callable[..., Any]:
    def build(**_: Any) -> Any:
        return width

    return build


def _class_within() -> Callable[..., Any]:
    class Within: ...

    return Within


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        (_capturing(3), "the builder _capturing.<locals>.build uses width of the function around it: no key tells"),
        (lambda **_: own_models.no_model(), "the builder <lambda> is a lambda, which has no name: no key tells"),
        (functools.partial(own_models.convolutional, channels=3), "is an object of functools.partial: no key tells"),
        (Built().method, r"the builder Built.method is bound to <.*Built object .*>: no key tells"),
        (Built(), r"is an object of .*test_own_model_key.Built: no key tells"),
        (_class_within(), "the builder _class_within.<locals>.Within is a class within a function, whose variables"),
    ],
)
def test_a_builder_with_a_state_that_no_key_holds_is_refused(builder: Callable[..., Any], message: str) -> None:
    """Before it is built, and before anything else is done with it."""
    with pytest.raises(ValueError, match=message + ".*; define a function with `def`, and pass what it needs in `arg"):
        own_model_tasks(replace(SMALL, builder=builder))


def test_what_has_no_key_is_refused() -> None:
    with pytest.raises(ValueError, match="the builder print has no source file: define it with `def` in a file"):
        OwnModel(print).key()
    with pytest.raises(ValueError, match="give numbers, texts and lists of them"):
        replace(SMALL, arguments={"layer": object()}).key()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"conv": 32, "pool": 2}, {"pool": 2, "conv": 32}),
        ([{"conv": 32, "pool": 2}], [{"pool": 2, "conv": 32}]),
        ({1: 2}, {"1": 2}),
        ({"a": {True: 2}}, {"a": {1: 2}}),
        ({"a": 1, "b": 2}, [["a", 1], ["b", 2]]),
        ({"a": 1, "b": 2}, {"object": True, "pairs": [["a", 1], ["b", 2]]}),
    ],
)
def test_objects_that_a_builder_tells_apart_have_two_keys(one: Any, other: Any) -> None:
    """The keys of an object are sorted, and are texts, when the key of a task is made."""

    def built(blocks: Any) -> Any: ...

    def texts(blocks: Any) -> list[str]:
        def with_default(blocks: Any = blocks) -> Any: ...

        models = OwnModel(built, {"blocks": blocks}), OwnModel(with_default)
        return [json.dumps(model.key(), sort_keys=True) for model in models]

    assert not set(texts(one)) & set(texts(other))
    assert texts(one) == texts(copy.deepcopy(one))


@pytest.mark.parametrize("value", [3, "x", [1, [2]], {}, {"a": 1}, {"a": {"b": [1]}}, [{"a": None}]])
def test_values_without_an_order_are_in_the_key_as_they_are(value: Any) -> None:
    """So that finished runs keep their keys."""
    assert replace(SMALL, arguments={"value": value}).key()["arguments"] == {"value": value}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Path]]:
    """Writes a module, which can be imported then, and is forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(own_model, "_BUILT_HERE", set())
    before = set(sys.modules)

    def write(file: str, code: str) -> Path:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
        importlib.invalidate_caches()
        return path

    yield write
    for name in set(sys.modules) - before:
        if name.partition(".")[0].startswith("of_"):
            del sys.modules[name]


Write = Callable[[str, str], Path]


def test_two_classes_of_one_name_in_a_file_have_two_keys(written: Write) -> None:
    net = "class Net:\n        width = {}\n        def __init__(self, **_): ..."
    code = f"BIG = {{}}\nif BIG:\n    {net.format(64)}\nelse:\n    {net.format(8)}\n"
    keys = []
    for big in (1, 0):
        written("of_classes.py", code.format(big))
        sys.modules.pop("of_classes", None)
        keys.append(OwnModel(importlib.import_module("of_classes").Net).key())
    assert [key.get("number", 0) for key in keys] == [0, 1]
    path = written("of_classes.py", code.format(1).replace("def __init__(self, **_): ...", "..."))
    sys.modules.pop("of_classes")
    with pytest.raises(
        ValueError, match=f"{path} defines 2 classes Net, and no method tells .*: give them different n"
    ):
        OwnModel(importlib.import_module("of_classes").Net).key()


def test_the_files_of_a_package_are_in_the_key(written: Write, tmp_path: Path) -> None:
    written("of_package/sub/net.py", "from of_package import blocks\ndef build(**_): return blocks.ACT\n")
    blocks = written("of_package/blocks.py", "ACT = 'relu'\n")
    model = OwnModel(importlib.import_module("of_package.sub.net").build)
    first = model.key()
    for ignored in (".hidden/a.py", "__pycache__/a.py", "sub/.#net.py", "notes.txt"):
        written(f"of_package/{ignored}", "x = 1")
    (tmp_path / "of_package" / "link.py").symlink_to("nothing.py")
    assert model.key() == first
    blocks.write_text("ACT = 'tanh'\n")
    second = model.key()
    assert {name for name in first if first[name] != second[name]} == {"package"}
    blocks.rename(blocks.with_name("others.py"))
    assert model.key()["package"] not in (first["package"], second["package"])


def test_an_installed_package_is_not_in_the_key_unless_it_was(written: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written("site-packages/of_installed/net.py", "def build(**_): ...\n").parents[1]
    monkeypatch.syspath_prepend(path)
    model = OwnModel(importlib.import_module("of_installed.net").build)
    assert "package" not in model.key()
    elsewhere = model.key(of_package=True)  # where it is not installed
    assert "package" in elsewhere
    assert model.change_of(elsewhere) == ""


@pytest.mark.parametrize("changed", ["net.py", "blocks.py"])
def test_a_model_is_not_built_from_another_file_than_that_of_its_key(written: Write, changed: str) -> None:
    """Else it would be committed under the key of the file with which the run began."""
    written("of_run/blocks.py", "ACT = 'relu'\n")
    written("of_run/net.py", "def build(**_): return 'built'\n")
    plain = OwnModel(importlib.import_module("of_run.net").build)
    model = sealed(plain, plain.key())
    assert model.name == "build"
    path = written(f"of_run/{changed}", "def build(**_): return 'anothe")  # as it is saved
    message = r"of_run/net.py, or another file of its package of_run, has changed since this run began: undo the"
    with pytest.raises(OwnModelError, match=f"^[^:]*{message}"):
        build_model(model)
    path.write_text("ACT = 'relu'\n" if changed == "blocks.py" else "def build(**_): return 'built'\n")
    assert model.build() == "built"


def test_what_a_process_has_built_it_builds_again(written: Write) -> None:
    """At the end of a training, whose file may be edited meanwhile; the module is in memory as it was."""
    path = written("of_again.py", "def build(**_): return 'built'\n")
    plain = OwnModel(importlib.import_module("of_again").build)
    model = sealed(plain, plain.key())
    assert model.build() == "built"
    path.write_text("def build(**_): return 'another'\n")
    assert model.build() == "built"
    with pytest.raises(OwnModelError, match="has changed"):
        sealed(plain, model.builder.key | {"version": 1}).build()  # type: ignore[attr-defined]


def test_a_model_whose_module_has_gone_is_not_built(written: Write) -> None:
    path = written("of_module.py", "def build(**_): return 'built'\n")
    plain = OwnModel(importlib.import_module("of_module").build)
    model = sealed(plain, plain.key())
    path.unlink()
    with pytest.raises(OwnModelError, match=r"of_module.py has changed since this run began"):
        model.build()
    del sys.modules["of_module"]
    with pytest.raises(OwnModelError, match="the builder build failed: ModuleNotFoundError"):
        build_model(model)


def test_a_builder_of_the_script_comes_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file may be on no other machine, and what was edited there since is not what is built."""
    monkeypatch.setattr(of_the_script, "__module__", "__main__")
    model = OwnModel(of_the_script, {"nan": float("nan")})
    assert sealed(model, model.key() | {"source": "another"}).build() == "built"
    monkeypatch.setattr(of_the_script, "__module__", __name__)
    assert model.change_of(model.key()) == ""
    assert "has changed" in model.change_of(model.key() | {"source": "another"})


def of_the_script(**_: Any) -> str:
    return "built"


def test_what_hands_a_model_on_does_not_import_its_module(written: Write) -> None:
    """It may have one from before it was edited, without this builder."""
    written("of_later.py", "def build(**_): return 'built'\n")
    plain = OwnModel(importlib.import_module("of_later").build)
    handed = cloudpickle.dumps(own_model_tasks(plain))
    del sys.modules["of_later"]
    tasks = cloudpickle.loads(handed)
    assert "of_later" not in sys.modules
    assert tasks[2].run.__self__.model.build() == "built"
