"""The report: complete in itself, with every section that the run has something for, and nothing a name can break."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from pipeline import figures
from pipeline.metrics import confusion_matrix, recalls
from pipeline.report import RunRecord, render

NUM_CLASSES, NUM_ROWS, ITERATIONS = 30, 90, 2
VOID = {"meta", "img", "br", "line", "rect", "circle", "polyline"}


class Outline(HTMLParser):
    """Whether all tags are closed, and what headings, addresses and pictures there are."""

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


def run_record(**changes: object) -> RunRecord:
    """A run with a search, superclasses and attention; class 0 has a name that looks like markup."""
    random = np.random.default_rng(0)
    labels = np.arange(NUM_ROWS) % NUM_CLASSES
    predicted = np.where(random.random(NUM_ROWS) < 0.6, labels, (labels + 1) % NUM_CLASSES)
    confusion = confusion_matrix(labels, predicted, NUM_CLASSES)
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
        "test": {"top1": 0.6, "top5": 0.8, "loss": 1.5, "num_examples": NUM_ROWS},
        "per_class": recalls(confusion),
        "confusion": confusion.tolist(),
        "superclasses": {
            "of_class": of_class.tolist(),
            "top1": 0.7,
            "confusion": confusion_matrix(of_class[labels], of_class[predicted], 3).tolist(),
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
        | {"images_per_second": 100.0, "learning_rate": 1e-3}
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
            "search": {"trials": trials, "best_trial": "trial-0002", "best_value": 0.4},
            "train": {"history": history, "best_epoch": 3, "images_per_second": 100.0},
            "register": {
                "uri": "models:/m/3",
                "name": "m",
                "alias": "challenger",
                "reason": "no better than version 2",
            },
        },
        "seconds": {"train": 3600.0, "evaluate": 5.0},
        "settings": {"train.learning_rate": 0.001},
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
    return RunRecord(**fields | changes)  # type: ignore[arg-type]


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


def test_the_page_is_complete_in_itself() -> None:
    html = render(run_record())
    outline = Outline(html)
    assert outline.open == []
    assert outline.headings == SECTIONS
    assert len([a for a in outline.addresses if a.startswith("data:image/png;base64,")]) > 15
    assert {a.partition(":")[0] for a in outline.addresses if not a.startswith("#")} == {"data"}
    assert not re.search(r"https?://|url\(|@import|<script", html)
    assert len(html) < 5e6


def test_what_a_person_wants_to_know_is_there() -> None:
    html = render(run_record())
    for fragment in (
        "60.0%",
        "test top-1, ± 10.1 (95%)",
        "models:/m/3 (m@challenger). No better than version 2.",
        "A temperature of 1.300",
        "whole digest",
        "one &amp; two",
        "iteration 2",
        "GFLOPs an image",
    ):
        assert fragment in html, fragment
    assert re.search(r"training, core-hours</td><td class=\"n\">1<", html), "3600 s of 2 workers of half a CPU"


def test_names_are_text_and_not_markup() -> None:
    html = render(run_record())
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_what_the_run_has_not_is_left_out() -> None:
    record = run_record()
    pictures = {name: record.pictures[name] for name in ("row_ids", "images", "labels")}
    outputs = dict(record.outputs) | {"search": {"best": None, "trials": []}}
    results = dict(record.results) | {"robustness": None, "superclasses": None}
    html = render(run_record(pictures=pictures, outputs=outputs, results=results))
    left_out = {"Search", "Robustness", "Where the model looks"}
    assert Outline(html).headings == [name for name in SECTIONS if name not in left_out]


def test_a_search_whose_best_trial_is_of_an_earlier_one() -> None:
    trials = [
        {"name": f"trial-000{n}", "values": {"num_latents": 8 * n, "learning_rate": 1e-3}, "status": "finished"}
        | {"history": [{"epoch": 1}] * n, "gflops": 0.1 * n, "best_value": value}
        for n, value in ((1, 0.3), (2, 0.2), (3, None))
    ]
    search = {"trials": trials, "best_trial": "trial-0007", "best_value": 0.4}
    html = render(run_record(outputs=dict(run_record().outputs) | {"search": search}))
    assert "3 trials, of which 1 gave no value. The best, trial 0007, reached a validation top-1 of 40%" in html
    assert "GFLOPs an image" in html
    assert "<h3>learning_rate</h3>" not in html, "one value is no choice"
    assert re.search(r"<td>trial 0002</td><td class=\"n\">16</td><td class=\"n\">2</td>", html), "two epochs"


def test_few_classes_are_named_in_the_matrix() -> None:
    chart = figures.matrix_chart(np.array([[8, 2], [0, 5]]), ["cat", "dog & co"])
    assert "cat, taken for dog &amp; co: 2 rows" in chart
    assert "taken for cat" not in chart, "what never happened has no cell"


def test_log_ticks_are_round_and_within() -> None:
    assert figures.log_ticks(0.0013, 0.017) == [0.002, 0.005, 0.01]
    assert figures.log_ticks(1, 100) == [1, 2, 5, 10, 20, 50, 100]
    assert figures.log_ticks(0.0021, 0.0049) == [0.0021, 0.0049], "no two round ones"


def labels(svg: str) -> list[str]:
    """Of the ticks: first those of the vertical axis."""
    return re.findall(r'text-anchor="(?:end|middle)">([^<]*)</text>', svg)


def test_sizes_have_whole_numbers_and_a_constant_has_no_room_above_all() -> None:
    svg = figures.scatter_chart({"a": (1, 0.5), "b": (2, 0.6)}, x_label="iterations", y_label="y")
    assert [label for label in labels(svg) if "." not in label] == ["1", "2", "iterations"]
    best = {"best": [(1.0, 0.9), (2.0, 0.9)]}
    svg = figures.line_chart(best, x_label="trials", y_label="y", y_format=figures.percent)
    shares = [float(label[:-1]) for label in labels(svg) if label.endswith("%")]
    assert shares
    assert max(shares) < 100


def test_ticks_are_round_and_within() -> None:
    assert figures.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert figures.ticks(13, 87) == [20, 40, 60, 80]
    assert figures.ticks(3, 3) == [3]
    for low, high in np.random.default_rng(0).normal(size=(50, 2)):
        low, high = sorted((low, high))
        found = figures.ticks(low, high)
        assert 2 <= len(found) <= 6
        assert low - 1e-9 <= found[0] <= found[-1] <= high + 1e-9


def test_values_that_are_not_finite_are_left_out_of_a_chart() -> None:
    chart = figures.line_chart({"loss": [(1, float("nan")), (2, 1.0), (3, 0.5)]}, x_label="epoch", y_label="loss")
    assert "nan" not in chart
    (points,) = re.findall(r'points="([^"]*)"', chart)
    assert len(points.split()) == 2


def test_attention_is_bright_where_it_is() -> None:
    weights = np.zeros((4, 4), np.float32)
    weights[0, 3] = 1
    overlay = figures.attention_overlay(np.zeros((8, 8, 1), np.uint8), weights, size=32).sum(axis=-1)
    assert overlay[:8, 24:].mean() > 10 * overlay[16:, :16].mean() + 1
