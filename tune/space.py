"""The search space: its dimensions, which of them are open, and which of its points can be trained.

A sample maps the name of every searched dimension to a value. The module imports neither Ray nor Optuna, so that the
command line can reject an empty space immediately.
"""

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from perceiver.config import PerceiverConfig
from perceiver.cost import macs_per_image, parameter_count
from tune.config import SearchConfig

ROUNDING = 1e-12
"""Relative difference up to which two values of a range are the same, as in the 12 digits by which `propose` tells them
apart."""
Sample = dict[str, Any]
Model = TypeVar("Model", bound=PerceiverConfig)


@dataclass(frozen=True)
class Dimension:
    """A hyperparameter that can be searched.

    Attributes:
        name: name of the field of `SearchConfig` with its values, and of the field that a sample sets.
        section: whether a sample sets a field of the model's or of the training's settings.
        scale: `choice` takes one of the listed sizes; `log` takes any number between two, on a log scale.
    """

    name: str
    section: Literal["model", "train"]
    scale: Literal["choice", "log"] = "choice"


DIMENSIONS = (
    Dimension("num_latents", "model"),
    Dimension("latent_dim", "model"),
    Dimension("num_self_attention_heads", "model"),
    Dimension("num_iterations", "model"),
    Dimension("num_self_attention_blocks", "model"),
    Dimension("learning_rate", "train", "log"),
    Dimension("weight_decay", "train", "log"),
)


@dataclass(frozen=True)
class Space:
    """The points that a search may try: models that can be built and that are within the budget.

    Attributes:
        values: choices of each searched dimension in ascending order, or its lowest and highest value. A dimension with
            one value is fixed.
        model: the model settings in which a sample replaces fields.
        max_gflops: budget in GFLOPs per image, forward pass.
        max_parameters: budget in parameters.
    """

    values: Mapping[str, tuple[Any, ...]]
    model: PerceiverConfig
    max_gflops: float | None = None
    max_parameters: int | None = None

    @classmethod
    def of(cls, settings: SearchConfig, model: PerceiverConfig) -> "Space":
        """The space that `settings` describe, with all other fields as in `model`.

        Raises:
            ValueError: if none of its points can be trained, or all are beyond the cost limit of the best trial.
        """
        values = {d.name: tuple(sorted(set(getattr(settings, d.name)))) for d in DIMENSIONS}
        values = {name: listed for name, listed in values.items() if listed}
        space = cls(values, model, settings.max_gflops, settings.max_parameters)
        if not any(space.allows(shape) for shape in space.shapes()):
            raise ValueError(f"the search space is empty: {space.rejection(next(space.shapes()))}")
        space._check_cost_limit(settings.cost_limit_gflops)
        return space

    @property
    def open(self) -> tuple[Dimension, ...]:
        """The dimensions with more than one value."""
        return tuple(d for d in DIMENSIONS if len(self.values.get(d.name, ())) > 1)

    @property
    def fixed(self) -> Sample:
        """The values of the dimensions that have a single one."""
        return {name: listed[0] for name, listed in self.values.items() if len(listed) == 1}

    def shapes(self) -> Iterator[Sample]:
        """Every combination of the model's dimensions, including models that cannot be built."""
        names = [d.name for d in DIMENSIONS if d.section == "model" and d.name in self.values]
        for combination in itertools.product(*(self.values[name] for name in names)):
            yield dict(zip(names, combination, strict=True))

    def allows(self, sample: Mapping[str, Any]) -> bool:
        """Whether the model of `sample` can be built and is within the budget."""
        return self.rejection(sample) is None

    def rejection(self, sample: Mapping[str, Any]) -> str | None:
        """The reason for which `sample` is not tried, with a remedy; None if it is allowed."""
        try:
            model = to_model(sample, self.model)
        except ValueError as error:
            return str(error)
        costs = {"max_gflops": gflops_per_image(model), "max_parameters": parameter_count(model)}
        for name, cost in costs.items():
            limit = getattr(self, name)
            if limit is not None and cost > limit:
                low, high = told_apart(limit, cost)
                return f"search.{name} = {low} is less than the {high} of a model: raise it, or search smaller ones"
        return None

    def _check_cost_limit(self, limit: float | None) -> None:
        """Refuses a limit below all models: the search would find out only at its end that it has no best trial."""
        if limit is None:
            return
        cheapest = min(gflops_per_image(to_model(shape, self.model)) for shape in self.shapes() if self.allows(shape))
        if cheapest > limit:
            low, high = told_apart(limit, cheapest)
            raise ValueError(
                f"search.cost_limit_gflops = {low} is less than the {high} of the cheapest model of the "
                "search: raise it, or search smaller ones"
            )

    def contains(self, sample: Mapping[str, Any]) -> bool:
        """Whether `sample`, which may come from another search, is a point of this space.

        Earlier versions tried values that rounding had put just outside a range: they count as its end.
        """
        if sample.keys() != self.values.keys():
            return False
        for dimension in DIMENSIONS:
            if listed := self.values.get(dimension.name):
                value = sample[dimension.name]
                inside = value in listed
                if dimension.scale == "log":
                    inside = math.isclose(value, _into(listed, value), rel_tol=ROUNDING)
                if not inside:
                    return False
        return self.allows(sample)

    def nearest(self, wanted: Mapping[str, Any]) -> Sample:
        """The values closest to those of `wanted`, dimension by dimension. The point may not be allowed."""
        sample = self.fixed
        for dimension in self.open:
            listed, value = self.values[dimension.name], wanted[dimension.name]
            if dimension.scale == "log":
                sample[dimension.name] = _into(listed, value)
            else:
                sample[dimension.name] = min(listed, key=lambda choice: abs(math.log(choice / value)))
        return self.ordered(sample)

    def grid(self, points: int) -> Iterator[Sample]:
        """All allowed points of a grid, with `points` evenly spaced values of each dimension on a log scale."""
        axes = []
        for dimension in DIMENSIONS:
            listed = self.values.get(dimension.name, ())
            if dimension.scale == "log" and len(listed) > 1:
                low, high = listed
                steps = [k / (points - 1) for k in range(points)] if points > 1 else [0.5]
                # The last one may be above the highest value, by rounding.
                listed = tuple(_into(listed, low * (high / low) ** step) for step in steps)
            if listed:
                axes.append([(dimension.name, value) for value in listed])
        for combination in itertools.product(*axes):
            if self.allows(sample := dict(combination)):
                yield sample

    def draw(self, rng: random.Random) -> Sample:
        """A random allowed point: choices are equally likely, ranges are uniform on their log scale."""
        while True:
            sample = self.fixed
            for dimension in self.open:
                listed = self.values[dimension.name]
                if dimension.scale == "log":
                    drawn = math.exp(rng.uniform(math.log(listed[0]), math.log(listed[-1])))
                    sample[dimension.name] = _into(listed, drawn)
                else:
                    sample[dimension.name] = rng.choice(listed)
            if self.allows(sample):
                return self.ordered(sample)

    def within(self, sample: Mapping[str, Any]) -> Sample:
        """`sample` with each value of a range inside it, where rounding had put one just outside."""
        log = {d.name for d in DIMENSIONS if d.scale == "log" and d.name in self.values}
        return {name: _into(self.values[name], value) if name in log else value for name, value in sample.items()}

    def ordered(self, sample: Mapping[str, Any]) -> Sample:
        """`sample` in the order of the dimensions."""
        return {d.name: sample[d.name] for d in DIMENSIONS if d.name in sample}


def to_model(sample: Mapping[str, Any], base: Model) -> Model:
    """`base` with the model's fields of `sample`.

    Raises:
        ValueError: if the model cannot be built.
    """
    return replace(base, **_fields(sample, "model"))


def training_values(sample: Mapping[str, Any]) -> Sample:
    """The training's fields of `sample`."""
    return _fields(sample, "train")


def gflops_per_image(model: PerceiverConfig) -> float:
    """GFLOPs of a forward pass for one image. A multiply-accumulate counts as two operations."""
    return 2 * macs_per_image(model) / 1e9


def told_apart(*numbers: float) -> list[str]:
    """The numbers as text: whole ones in full, others with six digits, or with more where they would look the same."""
    if all(isinstance(number, int) for number in numbers):
        return [f"{number:,}" for number in numbers]
    digits = 6
    while len(set(texts := [f"{number:.{digits}g}" for number in numbers])) < len(set(numbers)):
        digits += 1
    return texts


def _into(listed: tuple[Any, ...], value: float) -> float:
    """`value`, or the end of the range that is nearest to it."""
    return min(max(value, listed[0]), listed[-1])


def _fields(sample: Mapping[str, Any], section: str) -> Sample:
    return {d.name: sample[d.name] for d in DIMENSIONS if d.section == section and d.name in sample}
