"""Values that `report.html.jinja` needs for its sections about the evaluation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.report.inline_images import attention_overlay, data_uri, is_small, matrix_image, picture_uri
from pipeline.report.svg_charts import line_chart, matrix_chart, percent

Results = Mapping[str, Any]
Pictures = Mapping[str, np.ndarray]
# With more classes than this, their names do not fit into a chart.
MOST_NAMED = 20
MOST_PAIRS = 15


class LabelledImage(NamedTuple):
    """An image with a label below it. `pixelated` keeps its pixels visible when the browser enlarges it."""

    uri: str
    label: str
    pixelated: bool = False


def evaluation_values(results: Results, pictures: Pictures) -> dict[str, Any]:
    """Values for the template, from what `pipeline.evaluation.evaluate.evaluate` returns."""
    names = [_readable(name) for name in results["label_names"]]
    return {
        "names": names,
        "few_classes": len(names) <= MOST_NAMED,
        "class_bars": _sorted_bars(names, results["per_class"]),
        "image_uri": lambda row_id: picture_uri(_image_of(pictures, row_id)),
        "pixelated": is_small(pictures["images"].shape[1:]),
        **_confusion(results, names),
        **_robustness(results),
        **_attention(pictures, names),
    }


def _confusion(results: Results, names: Sequence[str]) -> dict[str, Any]:
    superclasses = results["superclasses"]
    pairs = results["slices"]["confused_pairs"][:MOST_PAIRS]
    values: dict[str, Any] = {
        "confused_pairs": [[names[pair["label"]], names[pair["predicted"]], pair["rows"]] for pair in pairs],
        "superclass_bars": [],
        "superclass_matrix": "",
        "class_matrix_uri": "",
    }
    if superclasses:
        superclass_names = [_readable(name) for name in results["coarse_label_names"]]
        values["superclass_bars"] = _sorted_bars(superclass_names, superclasses["per_superclass"])
    if results["confusion"] is None:  # there are too many classes
        return values
    matrix = np.array(results["confusion"])
    if len(names) <= MOST_NAMED:
        return values | {"class_matrix": matrix_chart(matrix, names)}
    if superclasses:
        order = np.argsort(superclasses["of_class"], kind="stable")
        matrix = matrix[order][:, order]
        values["superclass_matrix"] = matrix_chart(np.array(superclasses["confusion"]), superclass_names)
    return values | {"class_matrix_uri": data_uri(matrix_image(matrix))}


def _robustness(results: Results) -> dict[str, Any]:
    """Top-1 accuracy by corruption and severity; nothing if it was not measured."""
    found = results["robustness"]
    if not found:
        return {}
    severities, clean = found["severities"], found["clean_top1"]
    lines = {
        name: [(0.0, clean), *zip(map(float, severities), values, strict=True)]
        for name, values in found["top1"].items()
    }
    chart = line_chart(
        lines,
        x_label="severity (0: uncorrupted)",
        y_label="top-1",
        y_format=percent,
        y_range=(0, max(top1 for points in lines.values() for _, top1 in points)),
        markers=True,
    )
    by_corruption = {"uncorrupted": [clean] * len(severities)} | found["top1"]
    return {
        "robustness_chart": chart,
        "robustness_header": ["corruption", *(f"severity {severity}" for severity in severities)],
        "robustness_rows": [[name, *(f"{100 * top1:.1f}%" for top1 in row)] for name, row in by_corruption.items()],
    }


def _attention(pictures: Pictures, names: Sequence[str]) -> dict[str, Any]:
    """Attention maps of each iteration: their mean for several images, and single latents for the first image."""
    if "attention" not in pictures:
        return {"attention_by_image": []}
    row_ids = [int(row_id) for row_id in pictures["attention_row_ids"]]
    labels = dict(zip(pictures["row_ids"].tolist(), pictures["labels"].tolist(), strict=True))
    by_image = []
    for index, row_id in enumerate(row_ids):
        image = _image_of(pictures, row_id)
        maps = _overlays(image, pictures["attention"][:, index], lambda i: f"iteration {i + 1}")
        by_image.append([LabelledImage(picture_uri(image), names[labels[row_id]], is_small(image.shape)), *maps])
    first = _image_of(pictures, row_ids[0])
    by_iteration = [
        _overlays(first, maps, lambda i: f"latent {pictures['latents'][i]}") for maps in pictures["latent_attention"]
    ]
    return {"attention_by_image": by_image, "attention_by_iteration": by_iteration}


def _overlays(image: np.ndarray, maps: np.ndarray, label: Callable[[int], str]) -> list[LabelledImage]:
    """`image` below each of the attention maps (N, rows, columns)."""
    return [LabelledImage(picture_uri(attention_overlay(image, weights)), label(i)) for i, weights in enumerate(maps)]


def _sorted_bars(names: Sequence[str], shares: Sequence[float | None]) -> list[tuple[str, float]]:
    """Names with their shares, the highest share first; without those that have no rows."""
    known = [(name, share) for name, share in zip(names, shares, strict=True) if share is not None]
    return sorted(known, key=lambda pair: -pair[1])


def _image_of(pictures: Pictures, row_id: int) -> np.ndarray:
    (position,) = np.flatnonzero(pictures["row_ids"] == row_id)
    return pictures["images"][position]


def _readable(name: str) -> str:
    return name.replace("_", " ")
