"""Named settings of the whole pipeline: a function each, whose docstring says what it is."""

from dataclasses import asdict, replace
from typing import Any

from perceiver import presets as model_presets
from perceiver.config import PerceiverConfig
from pipeline.config import DatasetConfig, ModelConfig, PipelineConfig, TrainingConfig
from pipeline.datasets import SOURCES
from tune.config import SearchConfig


def quickstart() -> PipelineConfig:
    """Handwritten digits embedded in scikit-learn (1,797 images of 8 x 8): the whole pipeline in a few minutes.

    python pipeline/run.py quickstart
    """
    return _preset(
        "digits",
        model_presets.quickstart(),
        search=SearchConfig(
            num_trials=4,
            epochs=6,
            num_latents=(8, 16),
            latent_dim=(32, 64),
            num_iterations=(1, 2),
            num_self_attention_blocks=(1, 2),
            weight_decay=(1e-3, 0.1),
        ),
        train=TrainingConfig(
            epochs=30,
            global_batch_size=64,
            learning_rate=3e-3,
            warmup_epochs=5.0,
            weight_decay=0.01,
            random_crop_padding=0,
            random_flip=False,
        ),
    )


def cifar100() -> PipelineConfig:
    """CIFAR-100 with a small convolutional stem, 64 tokens and 32 latents; the search is off, the recipe is fixed.

    python pipeline/run.py cifar100
    """
    return _preset(
        "cifar100",
        model_presets.cifar100(),
        search=SearchConfig(num_trials=0),
        train=TrainingConfig(epochs=8, label_smoothing=0.1),
    )


def keras_example() -> PipelineConfig:
    """The settings of the published Keras example (53% top-1 after 40 epochs on a V100), as they are.

    python pipeline/run.py keras_example
    """
    return _preset(
        "cifar100",
        model_presets.keras_example(),
        # Adam has no weight decay, and without an output projection the latents have the width of the values.
        search=SearchConfig(num_trials=0, latent_dim=(), weight_decay=()),
        train=TrainingConfig(
            epochs=50,
            global_batch_size=64,
            optimizer="adam",
            learning_rate=1e-3,
            learning_rate_schedule="plateau",
            weight_decay=0.0,
            random_crop_padding=0,
            random_zoom=0.2,
        ),
    )


def with_source(config: PipelineConfig, source: str) -> PipelineConfig:
    """`config` on another data source, with its image shape and classes, and without flips where they make no sense."""
    info = SOURCES[source]
    return replace(
        config,
        data=replace(config.data, source=info.name),  # type: ignore[arg-type]  # a key of SOURCES
        model=replace(config.model, image_shape=info.image_shape, num_classes=info.num_classes),
        train=replace(config.train, random_flip=config.train.random_flip and info.flips),
    )


def _preset(source: str, model: PerceiverConfig, **sections: Any) -> PipelineConfig:
    return PipelineConfig(data=DatasetConfig(source=source), model=ModelConfig(**asdict(model)), **sections)  # type: ignore[arg-type]


PRESETS = {"cifar100": cifar100, "keras_example": keras_example, "quickstart": quickstart}
