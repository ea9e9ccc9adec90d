"""Named configurations of the whole pipeline, a function each; its docstring says what it trains.

`with_source` fits any of them to the images and classes of a source. The model follows the rule of
`perceiver.presets.for_images`; random shifts grow with the images, in whole multiples of 32 pixels, so that they stay
the same share of the side. docs/data.md has what that gives at common sizes.
"""

import copy
from dataclasses import asdict, replace
from typing import Any, TypeVar

from perceiver import presets as model_presets
from perceiver.config import PerceiverConfig
from pipeline.data.config import DatasetConfig
from pipeline.data.sources import source_of
from pipeline.settings.config import ModelConfig, PipelineConfig
from pipeline.training.config import TrainingConfig
from tune.config import SearchConfig

# Side in pixels of the images for which the presets' random shifts are meant.
SHIFTED_SIDE = 32
T = TypeVar("T")


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
    """CIFAR-100 with a small convolutional stem, 64 tokens and 8 latents; the search is off, the recipe is fixed.

    python pipeline/run.py cifar100
    """
    return _preset(
        "cifar100",
        model_presets.cifar100(),
        search=SearchConfig(num_trials=0),
        train=_recipe(epochs=33, weight_decay=0.2, muon_steps=3, alternating_flip=True),
    )


def cifar100_pixels() -> PipelineConfig:
    """`cifar100` without a convolution; docs/results.md has its accuracy.

    python pipeline/run.py cifar100_pixels
    """
    return _preset(
        "cifar100",
        model_presets.cifar100_pixels(),
        search=SearchConfig(num_trials=0),
        train=_recipe(epochs=28, cutmix=0.25, muon_steps=3),
    )


def cifar100_gpu() -> PipelineConfig:
    """A larger model for one GPU; docs/results.md has the speed of its step. Its accuracy is not measured.

    python pipeline/run.py cifar100_gpu
    """
    return _preset(
        "cifar100",
        model_presets.cifar100_gpu(),
        search=SearchConfig(num_trials=0),
        train=_recipe(
            epochs=200,
            global_batch_size=512,
            warmup_epochs=5.0,
            num_workers=1,
            cpus_per_worker=4.0,
            use_gpu=True,
        ),
    )


def cifar100_8gpu() -> PipelineConfig:
    """A still larger one for eight GPUs, on one host or several; nothing of it is measured.

    python pipeline/run.py cifar100_8gpu
    """
    one = cifar100_gpu()
    return _preset(
        "cifar100",
        model_presets.cifar100_8gpu(),
        search=one.search,
        train=replace(one.train, epochs=300, early_stopping_patience=300, global_batch_size=1024, num_workers=8),
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


def _recipe(epochs: int, **changes: Any) -> TrainingConfig:
    """What the presets for CIFAR-100 share. No training stops early: what a cosine brings, it brings at its end."""
    shared: dict[str, Any] = {
        "optimizer": "muon",
        "learning_rate": 4e-3,
        "label_smoothing": 0.1,
        "cutmix": 0.5,
        "precision": "mixed_bfloat16",
    }
    return TrainingConfig(epochs=epochs, early_stopping_patience=epochs, **shared | changes)


def with_source(config: PipelineConfig, data: DatasetConfig) -> PipelineConfig:
    """`config` with another data source, fitted to its images and classes; no flips where they may change the class.

    The sections are not checked against each other, since options of the command line may correct what does not fit.

    Args:
        config: A preset.
        data: Names the source; if it is `files`, `find_images` has found them.
    """
    info = source_of(data)
    try:
        model = model_presets.for_images(config.model, info.image_shape, info.num_classes)
    except ValueError:  # such as patches that do not divide the image
        model = _unchecked(config.model, image_shape=info.image_shape, num_classes=info.num_classes)
    return _unchecked(
        config,
        data=data,
        model=model,
        train=replace(
            config.train,
            random_flip=config.train.random_flip and bool(info.flips),
            random_crop_padding=config.train.random_crop_padding * max(1, min(info.image_shape[:2]) // SHIFTED_SIDE),
        ),
    )


def _unchecked(section: T, **changes: Any) -> T:
    """`dataclasses.replace` without the checks of `__post_init__`."""
    made = copy.copy(section)
    for name, value in changes.items():
        object.__setattr__(made, name, value)
    return made


def _preset(source: str, model: PerceiverConfig, **sections: Any) -> PipelineConfig:
    return PipelineConfig(data=DatasetConfig(source=source), model=ModelConfig(**asdict(model)), **sections)  # type: ignore[arg-type]


PRESETS = {
    preset.__name__: preset
    for preset in (cifar100, cifar100_pixels, cifar100_gpu, cifar100_8gpu, keras_example, quickstart)
}
