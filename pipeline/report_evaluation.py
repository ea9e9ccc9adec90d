"""What an evaluation found, as sections of the report: classes, confusion, mistakes, calibration and more.

Each function takes the results of `pipeline.evaluate.evaluate` and, where it shows any, its pictures, and returns HTML.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from pipeline import figures, page
from pipeline.figures import percent

Results = Mapping[str, Any]
Pictures = Mapping[str, np.ndarray]
MOST_NAMED = 20
"""Classes whose names find room in a figure."""
MOST_PAIRS = 15


def classes(results: Results, pictures: Pictures) -> str:
    """Share of hits by superclass and by class; the worst and the best classes with pictures."""
    names = _names(results)
    hits = _sorted_bars(names, results["per_class"])
    few = len(hits) <= MOST_NAMED
    charts = []
    if superclasses := results["superclasses"]:
        bars = _sorted_bars(results["coarse_label_names"], superclasses["per_superclass"])
        words = f"The right superclass is found for {percent(round(superclasses['top1'], 4))} of the rows."
        charts.append(page.figure("Superclasses", page.bars(bars), words))
    if few:
        charts.append(page.figure("Share of hits", page.bars(hits)))
    size = math.ceil(len(hits) / 3)
    thirds = page.columns(*(page.bars(hits[i : i + size]) for i in range(0, len(hits), size)))
    worst = "<h3>The worst, by what the model says instead</h3>" + _examples(results, pictures, "worst_classes")
    best = "<h3>The best</h3>" + _examples(results, pictures, "best_classes")
    return (
        (page.columns(*charts) if charts else "")
        + ("" if few else page.details(f"Share of hits of all {len(hits)} classes", thirds))
        + page.columns(f"<div>{worst}</div>", f"<div>{best}</div>")
    )


def _sorted_bars(names: Sequence[str], shares: Sequence[float | None]) -> list[tuple[str, float]]:
    """The highest first; without those that have no rows."""
    known = [(_named(name), share) for name, share in zip(names, shares, strict=True) if share is not None]
    return sorted(known, key=lambda pair: -pair[1])


def _examples(results: Results, pictures: Pictures, kind: str) -> str:
    names, parts = _names(results), []
    for entry in results["slices"][kind]:
        shown = []
        for row in entry["examples"]:
            said = names[row["predicted"]] if row["predicted"] != row["label"] else ""
            shown.append((_picture_of(pictures, row["row_id"]), said, f"{100 * row['confidence']:.0f}% sure"))
        title = f"{names[entry['label']]}: {percent(round(entry['accuracy'], 3))} of {entry['rows']} rows"
        parts.append(f"<h3>{escape(title)}</h3>{page.pictures(shown, small=True)}")
    return "".join(parts)


def confusion(results: Results) -> str:
    """Which classes are taken for which."""
    names, superclasses = _names(results), results["superclasses"]
    matrix = np.array(results["confusion"])
    rows = [
        [names[p["label"]], names[p["predicted"]], p["rows"]] for p in results["slices"]["confused_pairs"][:MOST_PAIRS]
    ]
    listed = page.table(["class", "taken for", "rows"], rows, numbers=False) if rows else page.text("None.")
    pairs = f"<div><h3>Most frequent mistakes</h3>{listed}</div>"
    words = page.soft("Rows are the right classes, columns what the model says; stronger is more often.")
    if len(names) <= MOST_NAMED:
        return words + page.columns(figures.matrix_chart(matrix, names), pairs, uneven=True)
    caption, parts = "", []
    if superclasses:
        order = np.argsort(superclasses["of_class"], kind="stable")
        matrix, caption = matrix[order][:, order], "Classes of a superclass lie together."
        coarse_names = [_named(name) for name in results["coarse_label_names"]]
        chart = figures.matrix_chart(np.array(superclasses["confusion"]), coarse_names)
        parts.append(f"<div><h3>Superclasses</h3>{chart}</div>")
    source = figures.matrix_picture(matrix)
    image = f'<img class="matrix" src="{source}" alt="confusion of all classes">'
    parts += [pairs, page.figure(f"All {len(names)} classes", image, caption)]
    return words + page.columns(*parts, uneven=True)


def mistakes(results: Results, pictures: Pictures) -> str:
    """The mistakes of which the model is most sure."""
    names, rows = _names(results), results["slices"]["confident_mistakes"]
    entries = [
        (
            _picture_of(pictures, row["row_id"]),
            names[row["predicted"]],
            f"{100 * row['confidence']:.0f}% sure; it is {names[row['label']]}",
        )
        for row in rows
    ]
    if not entries:
        return page.text("None: every test row is classified rightly.")
    ids = ", ".join(str(row["row_id"]) for row in rows)
    listed = page.details("Their row ids in the test set, in this order", f"<p><code>{ids}</code></p>")
    return page.soft("What the model says, how sure it is after temperature scaling, and what is right.") + (
        page.pictures(entries) + listed
    )


def calibration(results: Results) -> str:
    """Reliability diagrams before and after temperature scaling."""
    found = results["calibration"]
    words = (
        f"A temperature of {found['temperature']:.3f}, fitted on the validation split, takes the expected calibration "
        f"error ({found['num_bins']} bins of equal width) from {100 * found['before']['ece']:.2f}% to "
        f"{100 * found['after']['ece']:.2f}% on the test split and the loss from {found['loss_before']:.4f} to "
        f"{found['loss_after']:.4f}. Bars are the accuracy of rows of like confidence, tinted where the two differ and "
        "fainter where there are few rows; on the dashed line the model would be right as often as it says."
    )
    charts = [
        page.figure(f"{title} temperature scaling", figures.reliability_chart(found[state]["bins"]))
        for state, title in (("before", "Before"), ("after", "After"))
    ]
    return page.soft(words) + page.columns(*charts)


def robustness(results: Results) -> str:
    """Top-1 on corrupted images, if that was measured."""
    found = results["robustness"]
    if not found:
        return ""
    severities = found["severities"]
    lines = {
        name: [(0.0, found["clean_top1"]), *zip(map(float, severities), values, strict=True)]
        for name, values in found["top1"].items()
    }
    chart = figures.line_chart(
        lines,
        x_label="severity (0: as it is)",
        y_label="top-1",
        y_format=percent,
        y_range=(0, max(top1 for points in lines.values() for _, top1 in points)),
        markers=True,
    )
    rows = [[name, *(f"{100 * value:.1f}%" for value in values)] for name, values in found["top1"].items()]
    rows.insert(0, ["as they are", *[f"{100 * found['clean_top1']:.1f}%"] * len(severities)])
    words = f"Top-1 on {found['num_examples']:,} random test images, corrupted with the strengths of CIFAR-10-C."
    listed = page.table(["corruption", *(f"severity {s}" for s in severities)], rows)
    return page.soft(words) + page.columns(page.figure("Top-1 by severity", chart), f"<div>{listed}</div>")


def attention(results: Results, pictures: Pictures) -> str:
    """Attention maps over images, for each iteration, if there are any."""
    names = _names(results)
    if "attention" not in pictures:
        return ""
    iterations = len(pictures["attention"])
    labels = dict(zip(pictures["row_ids"].tolist(), pictures["labels"].tolist(), strict=True))
    strips = []
    for index, row_id in enumerate(pictures["attention_row_ids"]):
        image = _image_of(pictures, int(row_id))
        entries = [(figures.picture(image), names[labels[int(row_id)]], True)]
        entries += [
            (
                figures.picture(figures.attention_overlay(image, pictures["attention"][i, index])),
                f"iteration {i + 1}",
                False,
            )
            for i in range(iterations)
        ]
        strips.append(page.strip(entries))
    image = _image_of(pictures, int(pictures["attention_row_ids"][0]))
    single = []
    for i in range(iterations):
        entries = [
            (figures.picture(figures.attention_overlay(image, weights)), f"latent {latent}", False)
            for weights, latent in zip(pictures["latent_attention"][i], pictures["latents"], strict=True)
        ]
        single.append(f'<p class="soft">iteration {i + 1}</p>{page.strip(entries, wrap=True)}')
    words = (
        "Cross-attention of each iteration, brighter where more of it goes, each map scaled to its own maximum: the "
        "mean over heads and latents of an image of each of several classes that the model knows best."
    )
    return page.soft(words) + page.columns(*strips) + "<h3>Single latents, first image</h3>" + "".join(single)


def _image_of(pictures: Pictures, row_id: int) -> np.ndarray:
    (position,) = np.flatnonzero(pictures["row_ids"] == row_id)
    return pictures["images"][position]


def _picture_of(pictures: Pictures, row_id: int) -> str:
    return figures.picture(_image_of(pictures, row_id))


def _names(results: Results) -> list[str]:
    return [_named(name) for name in results["label_names"]]


def _named(name: str) -> str:
    return name.replace("_", " ")
