"""A Keras model of one's own in the place of a Perceiver: what `fit` and the tasks need to know of it.

Imports neither TensorFlow nor Keras; the builder does, in the processes that train.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import CodeType
from typing import Any

OF_THE_DATA = ("image_shape", "num_classes", "pixel_mean", "pixel_std")
"""What every builder is called with."""


@dataclass(frozen=True)
class OwnModel:
    """A function that builds a Keras model, and what it is called with.

    The model maps uint8 images (B, H, W, channels) to logits (B, K), without a softmax. In mixed precision its last
    layer needs `dtype="float32"`. BatchNormalization is made to use the moments of all workers. The optimizer takes the
    last variable named `kernel` for the classifier, unless the model has a layer `logits` as its attribute.

    The file of the function is part of the key of a training: a change in it trains again. Of what the file imports
    nothing is known; raise `version` when something there changes. What else decides the model has to be in
    `arguments`: a builder with a state of its own has no key.

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
            ValueError: if the builder has no source file or a state that no key holds, or if JSON cannot hold the
                arguments or the defaults that they leave.
        """
        if state := _state_of(self.builder):
            raise ValueError(
                f"the builder {self.name} {state}: no key tells it from another one, which would be given its result; "
                "define a function with `def`, and pass what it needs in `arguments`"
            )
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
        key = {
            "builder": self.name,
            "source": hashlib.sha256(source).hexdigest(),
            "arguments": arguments,
            "version": self.version,
        }
        # Only where there are any, so that finished runs of other builders keep their keys.
        if defaults := self._defaults():
            key["defaults"] = defaults
        if number := _number_among_namesakes(self.builder, source):
            key["number"] = number
        return key

    def _defaults(self) -> dict[str, Any]:
        """The defaults with which the builder is called: the same lines may give another one each time they run."""
        function: Any = self.builder.__init__ if inspect.isclass(self.builder) else self.builder
        defaults = {}
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is parameter.empty or name in OF_THE_DATA or name in self.arguments:
                continue
            try:
                defaults[name] = json.loads(json.dumps(parameter.default))
            except TypeError as error:
                raise ValueError(
                    f"the builder {self.name} has the default {name} = {parameter.default!r}, which no key holds: pass "
                    "it in `arguments`, as numbers, texts and lists of them"
                ) from error
        return defaults


def _state_of(builder: Callable[..., Any]) -> str:
    """What a builder holds that is neither in its file nor among its defaults, for a message; empty if nothing."""
    if inspect.isclass(builder):
        # Its attributes and methods may hold whatever the function around it had.
        return "is a class within a function, whose variables it may use" if "<locals>" in builder.__qualname__ else ""
    if inspect.ismethod(builder):
        return f"is bound to {builder.__self__!r}"
    if inspect.isbuiltin(builder):
        return ""  # it has no source file
    if not inspect.isfunction(builder):
        return f"is an object of {type(builder).__module__}.{type(builder).__qualname__}"
    if builder.__code__.co_name == "<lambda>":
        return "is a lambda, which has no name"
    if builder.__closure__:
        return f"uses {', '.join(builder.__code__.co_freevars)} of the function around it"
    return ""


def _number_among_namesakes(builder: Callable[..., Any], source: bytes) -> int:
    """How many functions of the same qualified name are defined before the builder in its file, as with `if`."""
    if not inspect.isfunction(builder):
        return 0
    own = builder.__code__

    def functions(code: CodeType) -> Iterator[CodeType]:
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                yield inner
                yield from functions(inner)

    whole = compile(source, own.co_filename, "exec", dont_inherit=True)
    lines = [code.co_firstlineno for code in functions(whole) if code.co_qualname == own.co_qualname]
    return sum(line < own.co_firstlineno for line in lines)
