"""The report is self-contained, has a section for everything that the run has, and escapes all names and settings."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from pipeline.evaluation.metrics import recalls, scores
from pipeline.report.render import ReportInputs, render
from pipeline.report.svg_charts import line_chart, matrix_chart, percent, ticks

NUM_CLASSES, NUM_ROWS, ITERATIONS = 30, 90, 2
VOID = {"meta", "img", "br", "line", "rect", "circle", "polyline"}


class Outline(HTMLParser):
    """Checks that all tags are closed, and collects the headings and addresses."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def report_inputs(**changes: object) -> ReportInputs:
    """A run with a search, superclasses and attention. A class, a superclass and a setting look like markup."""
    random = np.random.default_rng(0)
    labels = np.arange(NUM_ROWS) % NUM_CLASSES
    predicted = np.where(random.random(NUM_ROWS) < 0.6, labels, (labels + 1) % NUM_CLASSES)
    confusion = confusion_matrix(labels, predicted, labels=range(NUM_CLASSES))
    rows = [
        {"row_id": int(i), "label": int(labels[i]), "predicted": int(predicted[i]), "confidence": 0.9}
        for i in np.flatnonzero(labels != predicted)[:5]
    ]
    of_class = np.arange(NUM_CLASSES) % 3
    bins = [{"lower": 0.0, "upper": 0.5, "rows": 0, "confidence": None, "accuracy": None}]
    bins += [{"lower": 0.5, "upper": 1.0, "rows": NUM_ROWS, "confidence": 0.8, "accuracy": 0.6}]
    reliability = {"ece": 0.2, "bins": bins}
    classes = [{"label": 1, "accuracy": 0.0, "rows": 3, "examples": rows[:2]}]
    results = {
        "label_names": ["<script>alert(1)</script>", *(f"class_{k}" for k in range(1, NUM_CLASSES))],
        "coarse_label_names": ["one & two", "three", "four"],
        "test": scores(random.normal(size=(NUM_ROWS, NUM_CLASSES)), labels)
        | {"top1": 0.6, "top5": 0.8, "balanced_accuracy": 0.5555, "loss": 1.5},
        "per_class": recalls(confusion),
        "confusion": confusion.tolist(),
        "superclasses": {
            "of_class": of_class.tolist(),
            "top1": 0.7,
            "confusion": confusion_matrix(of_class[labels], of_class[predicted]).tolist(),
            "per_superclass": [0.7, 0.6, 0.8],
        },
        "calibration": {
            "num_bins": 2,
            "temperature": 1.3,
            "loss_before": 1.5,
            "loss_after": 1.4,
            "before": reliability,
            "after": reliability,
        },
        "robustness": {
            "num_examples": 50,
            "severities": [1, 5],
            "clean_top1": 0.6,
            "top1": {"noise": [0.5, 0.3], "blur": [0.6, 0.4]},
            "mean_top1": 0.45,
        },
        "speed": {
            "batch_1_median_ms": 2.0,
            "batch_1_p95_ms": 3.0,
            "batch_256_images_per_second": 1000.0,
            "device": "CPU, 2 cores",
        },
        "slices": {
            "worst_classes": classes,
            "best_classes": classes,
            "confident_mistakes": rows,
            "confused_pairs": [{"label": 0, "predicted": 1, "rows": 2}],
        },
    }
    history = [
        {"epoch": n, "loss": 3.0 / n, "val_loss": 3.1 / n, "accuracy": n / 5, "val_accuracy": n / 6}
        | {"images_per_second": 100.0, "learning_rate": 1e-3, "seconds": 1200.0, "num_workers": 2}
        for n in range(1, 4)
    ]
    trials = [
        {"name": f"trial-000{n}", "values": {"num_latents": 8 * n, "kind": "x"}, "status": "finished"}
        | {"history": [{"epoch": 1}, {"epoch": 2}], "gflops": 0.1 * n, "best_value": 0.2 * n}
        for n in (1, 2)
    ]
    splits = {name: {"rows": NUM_ROWS, "digest": f"{name} digest"} for name in ("train", "validation", "test")}
    fields = {
        "title": "Perceiver on <data>",
        "outputs": {
            "preprocess": {"digest": "whole digest", "splits": splits},
            "search": {"trials": trials, "best_trial": "trial-0002", "best_value": 0.4, "figures": ["a/search.html"]},
            "train": {"history": history, "best_epoch": 3, "images_per_second": 100.0},
            "register": {
                "uri": "models:/m/3",
                "name": "m",
                "alias": "challenger",
                "reason": "no better than version 2",
            },
        },
        "seconds": {"train": 99.0, "evaluate": 5.0},
        "settings": {"train.learning_rate": 0.001, "data.source": '"><img src=x onerror=alert(2)>'},
        "results": results,
        "pictures": {
            "row_ids": np.arange(NUM_ROWS),
            "images": random.integers(0, 256, (NUM_ROWS, 8, 8, 3), dtype=np.uint8),
            "labels": labels,
            "attention": random.random((ITERATIONS, 2, 4, 4), dtype=np.float32),
            "attention_row_ids": np.array([0, 4]),
            "latent_attention": random.random((ITERATIONS, 3, 4, 4), dtype=np.float32),
            "latents": np.arange(3),
        },
        "parameters": 500_000,
        "macs_per_image": 50_000_000,
        "workers": 2,
        "cpus_per_worker": 0.5,
        "run_id": "abc",
    }
    return ReportInputs(**fields | changes)  # type: ignore[arg-type]


SECTIONS = [
    "Learning curves",
    "Search",
    "Classes",
    "Confusion",
    "Most confident mistakes",
    "Calibration",
    "Robustness",
    "Where the model looks",
    "Speed and cost",
    "Settings",
]


def test_the_page_is_self_contained() -> None:
    html = render(report_inputs())
    outline = Outline(html)
    assert outline.open == []
    assert outline.headings == SECTIONS
    assert len([a for a in outline.addresses if a.startswith("data:image/png;base64,")]) > 15
    assert {a.partition(":")[0] for a in outline.addresses if not a.startswith("#")} == {"data"}
    assert not re.search(r"https?://|url\(|@import|<script", html)
    assert len(html) < 5e6


def test_the_main_results_are_shown() -> None:
    html = render(report_inputs())
    for fragment in (
        "60.0%",
        "test top-1, 49.7 to 69.5 (95%)",
        "models:/m/3 (m@challenger). No better than version 2.",
        "A temperature of 1.300",
        "whole digest",
        "one &amp; two",
        "iteration 2",
        "GFLOPs per image",
        "a/search.html",
        "the mean recall of the classes that have test rows: 55.55%",
    ):
        assert fragment in html, fragment
    assert re.search(r"training, core-hours</td><td class=\"n\">1<", html), (
        "three epochs of 1200 s on 2 workers of half a CPU, most of them before the last attempt"
    )


def test_the_interval_of_a_model_without_a_mistake_is_not_empty() -> None:
    results = report_inputs().results
    results["test"] |= {"top1": 1.0, "num_examples": 30}  # type: ignore[index]
    assert "test top-1, 88.6 to 100.0 (95%)" in render(report_inputs(results=results))


def test_names_and_settings_are_escaped() -> None:
    html = render(report_inputs())
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_sections_without_content_are_left_out() -> None:
    inputs = report_inputs()
    pictures = {name: inputs.pictures[name] for name in ("row_ids", "images", "labels")}
    outputs = dict(inputs.outputs) | {"search": {"best": None, "trials": []}}
    results = dict(inputs.results) | {"robustness": None, "superclasses": None}
    # An evaluation of an earlier version has no balanced accuracy.
    results["test"] = {name: value for name, value in results["test"].items() if name != "balanced_accuracy"}
    html = render(report_inputs(pictures=pictures, outputs=outputs, results=results))
    assert "Balanced accuracy" not in html
    left_out = {"Search", "Robustness", "Where the model looks"}
    assert Outline(html).headings == [name for name in SECTIONS if name not in left_out]
    without_matrix = render(report_inputs(results=dict(report_inputs().results) | {"confusion": None}))
    assert "confusion of all classes" in render(report_inputs())
    assert "confusion of all classes" not in without_matrix, "there are too many classes"
    assert "Most frequent mistakes" in without_matrix


def test_a_search_whose_best_trial_belongs_to_an_earlier_search() -> None:
    trials = [
        {"name": f"trial-000{n}", "values": {"num_latents": 8 * n, "learning_rate": 1e-3}, "status": "finished"}
        | {"history": [{"epoch": 1}] * n, "gflops": 0.1 * n, "best_value": value}
        for n, value in ((1, 0.3), (2, 0.2), (3, None))
    ]
    search = {"trials": trials, "best_trial": "trial-0007", "best_value": 0.4, "figures": []}
    html = render(report_inputs(outputs=dict(report_inputs().outputs) | {"search": search}))
    best = "The best, trial 0007 of an earlier search, reached a validation top-1 of 40%"
    assert f"3 trials, of which 1 gave no value. {best}" in html
    header = re.findall(r"<th[^>]*>([^<]*)", html)
    assert header[:3] == ["trial", "num_latents", "GFLOPs per image"], "the learning rate has only one value"
    cells = "".join(f'<td class="n">{cell}</td>' for cell in ("16", "0.2", "2", "finished", "20%"))
    assert f"<td>trial 0002</td>{cells}" in html


def test_few_classes_are_named_in_the_matrix() -> None:
    chart = matrix_chart(np.array([[8, 2], [0, 5]]), ["cat", "dog & co"])
    assert "cat, taken for dog &amp; co: 2 rows" in chart
    assert "taken for cat" not in chart, "a count of zero has no cell"


def labels(svg: str) -> list[str]:
    """Labels of the ticks, first those of the vertical axis."""
    return re.findall(r'text-anchor="(?:end|middle)">([^<]*)</text>', svg)


def test_whole_numbers_are_labelled_and_a_constant_has_no_room_above_all() -> None:
    best = {"best": [(1.0, 0.9), (2.0, 0.9)]}
    svg = line_chart(best, x_label="epoch", y_label="y", y_format=percent)
    assert [label for label in labels(svg) if label.isdigit()] == ["1", "2"]
    shares = [float(label[:-1]) for label in labels(svg) if label.endswith("%")]
    assert shares
    assert max(shares) < 100


def test_ticks_are_round_and_within() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(13, 87) == [20, 40, 60, 80]
    assert ticks(3, 3) == [3]
    for low, high in np.random.default_rng(0).normal(size=(50, 2)):
        low, high = sorted((low, high))
        found = ticks(low, high)
        assert 2 <= len(found) <= 6
        assert low - 1e-9 <= found[0] <= found[-1] <= high + 1e-9


def test_values_that_are_not_finite_are_left_out_of_a_chart() -> None:
    chart = line_chart({"loss": [(1, float("nan")), (2, 1.0), (3, 0.5)]}, x_label="epoch", y_label="loss")
    assert "nan" not in chart
    (points,) = re.findall(r'points="([^"]*)"', chart)
    assert len(points.split()) == 2


def test_a_page_with_large_images_is_not_large() -> None:
    inputs = report_inputs()
    random = np.random.default_rng(0)
    # Noise, the worst case: 90 images of 150 kB.
    images = random.integers(0, 256, (NUM_ROWS, 224, 224, 3), dtype=np.uint8)
    rows = [{"row_id": i, "label": 0, "predicted": 1, "confidence": 0.9} for i in range(NUM_ROWS)]
    results = dict(inputs.results) | {"slices": dict(inputs.results["slices"]) | {"confident_mistakes": rows}}
    html = render(report_inputs(pictures=dict(inputs.pictures) | {"images": images}, results=results))
    assert html.count("data:image/jpeg") > NUM_ROWS
    assert 'class="raw"' not in html
    assert len(html) < 2e6
    assert 'class="raw"' in render(inputs)
