"""A Keras model of one's own in the place of a Perceiver: what `fit` and the tasks need to know of it.

Imports neither TensorFlow nor Keras; the builder does, in the processes that train.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class OwnModel:
    """A function that builds a Keras model, and what it is called with.

    The model maps uint8 images (B, H, W, channels) to logits (B, K), without a softmax. In mixed precision its last
    layer needs `dtype="float32"`. BatchNormalization is made to use the moments of all workers. The optimizer takes the
    last variable named `kernel` for the classifier, unless the model has a layer `logits` as its attribute.

    The file of the function is part of the key of a training: a change in it trains again. Of what the file imports
    nothing is known; raise `version` when something there changes.

    Attributes:
        builder: Called with `image_shape`, `num_classes`, `pixel_mean`, `pixel_std` and `arguments`, all by name. Where
            it is not defined in the script that runs, all workers must be able to import its module.
        arguments: Further arguments, as values that JSON can hold.
        version: Number that is raised by hand when the same file comes to give another model.
        image_shape: Height, width and channels.
        num_classes: K.
        pixel_mean: Mean of each channel, for values in 0..1; None: not known yet.
        pixel_std: Standard deviation of each channel.
    """

    builder: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    version: int = 0
    image_shape: tuple[int, int, int] = (32, 32, 3)
    num_classes: int = 100
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None

    def for_data(self, data: Mapping[str, Any]) -> "OwnModel":
        """This model for the images, classes and pixel statistics in an output of `preprocess`."""
        height, width, channels = data["image_shape"]
        return replace(
            self,
            image_shape=(height, width, channels),
            num_classes=data["num_classes"],
            pixel_mean=tuple(data["pixel_mean"]),
            pixel_std=tuple(data["pixel_std"]),
        )

    def build(self) -> Any:
        """What the builder returns."""
        return self.builder(
            image_shape=self.image_shape,
            num_classes=self.num_classes,
            pixel_mean=self.pixel_mean,
            pixel_std=self.pixel_std,
            **self.arguments,
        )

    @property
    def name(self) -> str:
        """Name of the builder, for messages."""
        return getattr(self.builder, "__qualname__", repr(self.builder))

    def key(self) -> dict[str, Any]:
        """What decides the model besides the data, as a part of the key of a task.

        Raises:
            ValueError: if the builder has no source file, or JSON cannot hold the arguments.
        """
        try:
            source = Path(inspect.getsourcefile(self.builder) or "").read_bytes()
        except (OSError, TypeError) as error:
            raise ValueError(f"the builder {self.name} has no source file: define it with `def` in a file") from error
        try:
            arguments = json.loads(json.dumps(dict(self.arguments)))
        except TypeError as error:
            raise ValueError(
                f"arguments = {self.arguments} of the builder {self.name}: give numbers, texts and lists of them"
            ) from error
        return {
            "builder": self.name,
            "source": hashlib.sha256(source).hexdigest(),
            "arguments": arguments,
            "version": self.version,
        }
