"""A model of one's own: what is refused, what its key covers, its multiply-accumulates, and its optimizer."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import own_models
import pytest
from tiny_perceivers import TINY
from tiny_training import TRAIN

from perceiver import Perceiver, PerceiverConfig
from perceiver.cost import macs_per_image
from pipeline.settings.presets import quickstart
from pipeline.storage import Storage
from pipeline.tasks.graph import TASKS
from pipeline.tasks.own_model import own_model_tasks
from pipeline.training.config import TrainingConfig
from pipeline.training.models import build_model, count_macs, macs_of
from pipeline.training.optimization import optimizer
from pipeline.training.own_model import OwnModel
from pipeline.training.worker import OwnModelError
from pipeline.workflow.run import Run

SMALL = OwnModel(own_models.convolutional, image_shape=(8, 8, 1), num_classes=10)


@pytest.mark.parametrize("config", [TINY["conv"], TINY["pixels"]], ids=["conv", "pixels"])
def test_the_counted_macs_are_those_of_the_closed_form(config: PerceiverConfig) -> None:
    model = Perceiver(**asdict(config))
    model.build()
    assert count_macs(model, config.image_shape) == macs_per_image(config) == macs_of(config, model)


def test_the_counted_macs_are_those_counted_by_hand() -> None:
    convolution, depthwise, dense, head = 4 * 4 * 4 * 9, 3 * 3 * 4 * 4, 3 * 3 * 4 * 6, 6 * 10
    assert macs_of(SMALL, build_model(SMALL)) == convolution + depthwise + dense + head
    attending = replace(SMALL, builder=own_models.attending)
    # 8 rows of 8: queries and keys of 2 x 3, values of 2 x 5, logits and weighted sums, the output, the classes
    attention = 8 * 8 * (6 + 6 + 10) + 2 * 8 * 8 * (3 + 5) + 8 * 10 * 8
    assert macs_of(attending, build_model(attending)) == attention + 8 * 10


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        (own_models.with_too_few_logits, r"gives \(None, 9\): it should give logits \(None, 10\)"),
        (own_models.no_model, "the builder no_model returns str: return a keras.Model"),
        (own_models.failing, "the builder failing failed: RuntimeError: no such layer"),
    ],
)
def test_what_is_no_classifier_is_refused(builder: Callable[..., Any], message: str) -> None:
    with pytest.raises(OwnModelError, match=message):
        build_model(replace(SMALL, builder=builder))
    other_images = replace(SMALL, builder=lambda **_: own_models.convolutional((9, 9, 1), 10, (), ()))
    with pytest.raises(OwnModelError, match=r"does not take uint8 images \(8, 8, 1\)"):
        build_model(other_images)


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


def test_what_has_no_key_is_refused() -> None:
    with pytest.raises(ValueError, match="the builder print has no source file: define it with `def` in a file"):
        OwnModel(print).key()
    with pytest.raises(ValueError, match="give numbers, texts and lists of them"):
        replace(SMALL, arguments={"layer": object()}).key()


def test_muon_leaves_the_last_kernel_to_adamw() -> None:
    model = build_model(SMALL)
    config = TrainingConfig(**TRAIN | {"optimizer": "muon"})
    made = optimizer(config, model, steps_per_epoch=10)
    made.build(model.trainable_variables)
    by_muon = [v.path for v, adam in zip(model.trainable_variables, made.adam_velocities, strict=True) if adam is None]
    assert by_muon == ["convolution/kernel", "depthwise/kernel", "dense/kernel"]
