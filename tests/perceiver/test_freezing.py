"""What is frozen in a Perceiver is frozen in its copies and in those that are loaded."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from tiny_perceivers import TINY

from perceiver.attention import MultiHeadAttention
from perceiver.blocks import MLP, CrossAttentionBlock, SelfAttentionBlock
from perceiver.model import Perceiver
from perceiver.preprocessing import ConvStem, PatchStem


@pytest.fixture
def model() -> Perceiver:
    made = Perceiver(**asdict(TINY["patches"]), name="of_somebody")
    made.build((None, 8, 8, 3))
    return made


def flags(model: Perceiver) -> dict[str, bool]:
    """`trainable` of all layers and weights, by their paths below the model."""
    parts = [*model._flatten_layers(include_self=False), *model.weights]
    return {part.path.partition("/")[2]: part.trainable for part in parts if part.path}


def saved_and_loaded(model: Perceiver, folder: Path) -> Perceiver:
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


def test_frozen_parts_stay_frozen(model: Perceiver, tmp_path: Path) -> None:
    model.stem.trainable = False
    model.latents.trainable = False
    model.latent_transformers[0][0].attention.trainable = False
    model.cross_attends[0].trainable = False
    model.cross_attends[0].mlp.hidden.trainable = True  # a part that is trained within one that is not
    expected = [weight.path for weight in model.trainable_variables]
    assert 0 < len(expected) < len(model.weights)
    unbuilt = Perceiver.from_config(model.get_config())
    copied = Perceiver.from_config(unbuilt.get_config())
    copied.build((None, 8, 8, 3))
    for other in (saved_and_loaded(model, tmp_path), copied):
        assert [weight.path for weight in other.trainable_variables] == expected
        assert flags(other) == flags(model)


@pytest.mark.parametrize(
    ("layer", "shapes", "part"),
    [
        (MLP(name="part"), [(3, 4)], "hidden"),
        (MultiHeadAttention(2, 8, 8, 4, name="part"), [(3, 4), (5, 6)], "query"),
        (SelfAttentionBlock(2, dropout=0.1, name="part"), [(3, 4)], "attention/value"),
        (CrossAttentionBlock(dropout=0.1, name="part"), [(3, 4), (5, 6)], "mlp"),
        (PatchStem(4, 8, name="part"), [(8, 8, 3)], "projection"),
        (ConvStem(2, 4, num_residuals=1, name="part"), [(8, 8, 3)], "convolution_0"),
    ],
)
def test_frozen_parts_of_a_block_in_a_model_of_ones_own_stay_frozen(
    layer: keras.Layer, shapes: list[tuple[int, ...]], part: str, tmp_path: Path
) -> None:
    inputs = [keras.Input(shape) for shape in shapes]
    made = keras.Model(inputs, layer(*inputs))
    assert "frozen" not in layer.get_config(), "earlier versions do not know the argument"
    frozen: Any = layer
    for name in part.split("/"):
        frozen = next(each for each in frozen._layers if each.name == name)
    frozen.trainable = False
    expected = [weight.path for weight in made.trainable_variables]
    assert 0 < len(expected) < len(made.weights) or part == "projection"
    made.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    copied = type(layer).from_config(type(layer).from_config(layer.get_config()).get_config())
    copied(*inputs)
    for other in (loaded, copied):
        assert [weight.path for weight in other.trainable_variables] == expected
    copied.trainable = True  # it is no longer frozen, and its config says so
    for each in copied._flatten_layers():
        each.trainable = True
    assert "frozen" not in copied.get_config()


def test_a_training_goes_on_with_the_state_of_its_optimizer(model: Perceiver, tmp_path: Path) -> None:
    model.stem.trainable = False
    model.compile(optimizer="adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.optimizer.build(model.trainable_variables)
    loaded = saved_and_loaded(model, tmp_path)
    shapes = [[tuple(variable.shape) for variable in each.optimizer.variables] for each in (model, loaded)]
    assert shapes[0] == shapes[1]


def test_a_model_that_is_frozen_as_a_whole_or_not_at_all_lists_nothing(model: Perceiver, tmp_path: Path) -> None:
    """Earlier versions do not know the argument, and read these."""
    assert "frozen" not in model.get_config()
    model.trainable = False
    assert "frozen" not in model.get_config()
    loaded = saved_and_loaded(model, tmp_path)
    assert not loaded.trainable
    assert not loaded.trainable_variables
    for weight, expected in zip(loaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"frozen = \['stem/nothing'\]: the model has no such layers or weights"):
        Perceiver(**asdict(TINY["patches"]), frozen=["stem/nothing"]).build((None, 8, 8, 3))
