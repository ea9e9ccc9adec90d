"""A Keras model of one's own in the place of a Perceiver: what `fit` and the tasks need to know of it.

Imports neither TensorFlow nor Keras; the builder does, in the processes that train.
"""

import hashlib
import inspect
import json
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.training.builders import (
    digest_of_package,
    folders_of_package,
    is_installed,
    number_among_namesakes,
    state_of,
)
from pipeline.training.worker import OwnModelError

OF_THE_DATA = ("image_shape", "num_classes", "pixel_mean", "pixel_std")
"""What every builder is called with."""
_BUILT_HERE: set[tuple[bytes, str]] = set()
"""The sealed builders, and their keys, that this process has called: all that they import is in its memory."""


@dataclass(frozen=True)
class SealedBuilder:
    """A builder that is imported where it is called, and not in the processes that only hand it on.

    Attributes:
        name: Its name, for messages.
        pickled: The builder, for `pickle.loads`.
        key: `OwnModel.key` when the run began.
    """

    name: str
    pickled: bytes
    key: Mapping[str, Any]

    def open(self) -> Callable[..., Any]:
        """The builder, imported in this process."""
        builder: Callable[..., Any] = pickle.loads(self.pickled)
        return builder

    def __call__(self, **settings: Any) -> Any:
        return self.open()(**settings)


@dataclass(frozen=True)
class OwnModel:
    """A function that builds a Keras model, and what it is called with.

    The model maps uint8 images (B, H, W, channels) to logits (B, K), without a softmax. In mixed precision its last
    layer needs `dtype="float32"`. BatchNormalization is made to use the moments of all workers. The optimizer takes the
    last variable named `kernel` for the classifier, unless the model has a layer `logits` as its attribute.

    The file of the function is part of the key of a training, and so are the Python files of its package, if it is in
    one that is not installed: a change in them trains again. Of what else the file imports nothing is known; raise
    `version` when something there changes. What else decides the model has to be in `arguments`: a builder with a state
    of its own has no key.

    Attributes:
        builder: A function defined with `def`, or a class. Called with `image_shape`, `num_classes`, `pixel_mean`,
            `pixel_std` and `arguments`, all by name. Where it is not defined in the script that runs, all workers must
            be able to import its module.
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
        """What the builder returns.

        Raises:
            OwnModelError: if it is sealed and built for the first time in this process, which imports what it needs
                then, and its files are not those with which the run began.
        """
        builder = self.builder
        if isinstance(builder, SealedBuilder):
            model, this = replace(self, builder=builder.open()), (builder.pickled, text_of(builder.key))
            if this not in _BUILT_HERE and (change := model.change_of(builder.key)):
                raise OwnModelError(change)
            built = model.build()
            _BUILT_HERE.add(this)
            return built
        return builder(
            image_shape=self.image_shape,
            num_classes=self.num_classes,
            pixel_mean=self.pixel_mean,
            pixel_std=self.pixel_std,
            **self.arguments,
        )

    def sealed(self, pickled: bytes, key: Mapping[str, Any]) -> "OwnModel":
        """This model for other processes: its builder is imported and compared with `key` where it is built."""
        return replace(self, builder=SealedBuilder(self.name, pickled, key))

    def change_of(self, key: Mapping[str, Any]) -> str:
        """What a person is told if the files of the builder are not those of `key` any more; else an empty string."""
        if not self.has_file_here:
            return ""
        try:
            # A package may be installed on one machine and not on another one.
            same = text_of(self.key(of_package="package" in key)) == text_of(key)
        except (ValueError, SyntaxError):  # the file has gone, or only half of it has been written yet
            same = False
        if same:
            return ""
        what = inspect.getsourcefile(self.builder) or self.name
        if "package" in key:
            what += f", or another file of its package {self.builder.__module__.partition('.')[0]},"
        return (
            f"{what} has changed since this run began: undo the change, and the same command goes on; or give the "
            "command again as it is (in a notebook reload the module first), and it trains the changed model"
        )

    @property
    def has_file_here(self) -> bool:
        """Whether this process has imported the builder: one of the script that runs comes with the model instead."""
        return self.builder.__module__ in sys.modules.keys() - {"__main__"}

    @property
    def name(self) -> str:
        """Name of the builder, for messages."""
        if isinstance(self.builder, SealedBuilder):
            return self.builder.name
        return getattr(self.builder, "__qualname__", repr(self.builder))

    def key(self, of_package: bool | None = None) -> dict[str, Any]:
        """What decides the model besides the data, as a part of the key of a task.

        Args:
            of_package: Whether the files of the builder's package are part of it; None: if it is not an installed one.

        Raises:
            ValueError: if the builder has no source file or a state that no key holds, if JSON cannot hold the
                arguments or the defaults that they leave, or if it is one of several classes of one name.
        """
        if state := state_of(self.builder):
            raise ValueError(
                f"the builder {self.name} {state}: no key tells it from another one, which would be given its result; "
                "define a function with `def`, and pass what it needs in `arguments`"
            )
        try:
            file = inspect.getsourcefile(self.builder) or ""
            source = Path(file).read_bytes()
        except (OSError, TypeError) as error:
            raise ValueError(f"the builder {self.name} has no source file: define it with `def` in a file") from error
        try:
            arguments = {name: _as_key(value) for name, value in self.arguments.items()}
        except TypeError as error:
            raise ValueError(
                f"arguments = {self.arguments} of the builder {self.name}: give numbers, texts and lists of them"
            ) from error
        key = {
            "builder": self.name,
            "source": hashlib.sha256(source).hexdigest(),
            "arguments": arguments,
            "version": self.version,
        }
        # Only where there are any, so that finished runs of other builders keep their keys.
        if defaults := self._defaults():
            key["defaults"] = defaults
        if number := number_among_namesakes(self.builder, file, source):
            key["number"] = number
        folders = folders_of_package(self.builder)
        if folders and (not is_installed(folders) if of_package is None else of_package):
            key["package"] = digest_of_package(folders)
        return key

    def _defaults(self) -> dict[str, Any]:
        """The defaults with which the builder is called: the same lines may give another one each time they run."""
        function: Any = self.builder.__init__ if inspect.isclass(self.builder) else self.builder
        defaults = {}
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is parameter.empty or name in OF_THE_DATA or name in self.arguments:
                continue
            try:
                defaults[name] = _as_key(parameter.default)
            except TypeError as error:
                raise ValueError(
                    f"the builder {self.name} has the default {name} = {parameter.default!r}, which no key holds: pass "
                    "it in `arguments`, as numbers, texts and lists of them"
                ) from error
        return defaults


def text_of(key: Mapping[str, Any]) -> str:
    """A key as a text, which is equal for equal keys; NaN is not equal to itself."""
    return json.dumps(key, sort_keys=True)


def _as_key(value: Any) -> Any:
    """A value as JSON that has the same text for no other value, where the keys of objects are sorted and are texts.

    An object with one key, which is a text, is left as it is; any other one becomes a list of pairs, in an object of a
    form that cannot be meant.

    Raises:
        TypeError: if JSON cannot hold it.
        ValueError: if it contains itself.
    """
    json.dumps(value)
    if isinstance(value, dict):
        pairs = [[name, _as_key(inner)] for name, inner in value.items()]
        if not pairs or (len(pairs) == 1 and isinstance(pairs[0][0], str)):
            return dict(pairs)
        return {"object": True, "pairs": pairs}
    if isinstance(value, list | tuple):
        return [_as_key(each) for each in value]
    return json.loads(json.dumps(value))
