"""The benchmarks run, at sizes that take seconds: a table, then one line of JSON."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ablation_studies
import ablations
import image_forms
import matrix_products
import numpy as np
import pytest
import train_overhead
from benchmark_run import benchmark

from perceiver import presets
from perceiver.cost import macs_per_image
from pipeline.data.config import DatasetConfig
from pipeline.data.image_rows import load_files
from pipeline.data.image_survey import find_images
from pipeline.data.rows import RawDataset, Rows
from pipeline.training.config import TrainingConfig

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_chunked_attention() -> None:
    table, result = benchmark(
        "chunked_attention",
        *("--num-inputs", "2048", "--chunk-sizes", "256", "--num-latents", "64", "--num-heads", "2", "--rounds", "2"),
    )
    assert "Chunk sizes, 2,048 inputs x 64 latents, 2 heads" in table
    plain, chunked = result["by_chunk_size"]
    assert (plain["chunk_size"], chunked["chunk_size"]) == (None, 256)
    assert 0 < chunked["difference"] < 1e-5
    assert chunked["milliseconds"] > 0
    assert plain["peak_mib"] > 0


@pytest.mark.slow
def test_model_step() -> None:
    table, rows = benchmark(
        "model_step",
        *("--models", "cifar100", "--precisions", "float32", "--compilers", "plain", "--batch-size", "1"),
        *("--rounds", "2", "--peak-side", "256"),
    )
    assert "of products" in table
    assert [(row["model"], row["compiler"]) for row in rows] == [
        ("peak", ""),
        ("cifar100", "plain"),
        ("cifar100", "products"),
    ]
    peak, step, products = rows
    assert peak["gflop_per_image"] == pytest.approx(2 * 256**3 / 1e9)
    gflop = pytest.approx(6 * macs_per_image(presets.cifar100()) / 1e9)
    assert step["gflop_per_image"] == gflop
    assert products["gflop_per_image"] == gflop
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_image_sizes() -> None:
    small = ("--preset", "quickstart", "--sides", "16", "8", "--channels", "1", "--batch-size", "2", "--rounds", "1")
    table, result = benchmark("image_sizes", *small)
    assert "quickstart, 100 classes, float32, batch 2" in table
    assert [(row["side"], row["tokens"]) for row in result["rows"]] == [(8, 16), (16, 64)]
    assert all(row["images_per_second"] > 0 for row in result["rows"])


def test_streaming(tmp_path: Path) -> None:
    small = ("--cache", str(tmp_path), "--rows", "600", "--rounds", "1", "--shards", "3", "--peers")
    table, result = benchmark("streaming", *small)
    assert "600 rows of 64 x 64 x 3, noise" in table
    assert [(row["reader"], row["shards"]) for row in result["readers"]] == [("shards", 44), ("shards", 3)]
    assert all(row["rows_per_second"] > 0 and row["resumed_seconds"] > 0 for row in result["readers"])


@pytest.mark.slow
def test_streaming_beside_tfrecord(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    small = ("--cache", str(tmp_path), "--rows", "600", "--rounds", "2", "--shards", "--peers", "tfrecord")
    _, result = benchmark("streaming", *small, "--record", str(record))
    assert json.loads(record.read_text()) == result
    own, peer = result["readers"]
    assert result["ratios"] == {"tfrecord": own["rows_per_second"] / peer["rows_per_second"]}


@pytest.mark.parametrize("form", image_forms.FORMS)
def test_every_form_of_the_images_of_an_archive_has_its_rows(form: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ["apple", "bear", "cup"]
    splits = []
    for count in (30, 12):
        labels = rng.permutation(np.arange(count) % 3).astype(np.int32)
        images = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        splits.append(Rows.of(images, labels, (labels > 0).astype(np.int32)))
    train, test = splits
    raw = RawDataset(train, test, names, ["fruit", "thing"])
    order = "classes" if form == "folders" else "archive"
    image_forms.FORMS[form](image_forms.encode(raw, order), raw, tmp_path / "images")
    found = load_files(find_images(DatasetConfig("files", path=str(tmp_path / "images")), str(tmp_path)))
    assert found.label_names == names
    for rows, expected in ((found.train, raw.train), (found.test, raw.test)):
        position = np.argsort(expected.labels, kind="stable") if form == "folders" else slice(None)
        np.testing.assert_array_equal(rows.images, expected.images[position])
        np.testing.assert_array_equal(rows.labels, expected.labels[position])
        if form in ("metadata", "parquet"):
            np.testing.assert_array_equal(rows.coarse_labels, expected.coarse_labels)


def test_the_listing_of_many_names() -> None:
    table, result = benchmark("image_sources", "--names", "3000")
    assert "3,000" in table
    assert min(result["list_seconds"], result["divide_seconds"], result["bytes"]) > 0


@pytest.mark.slow
def test_batch_inference() -> None:
    table, result = benchmark("batch_inference", *("--num-images", "600", "--part-rows", "200", "--num-processes", "1"))
    assert "600 images, 1 processes" in table
    assert result["ratio"] == pytest.approx(result["pipeline_images_per_second"] / result["loop_images_per_second"])
    assert min(result["loop_start_seconds"]) > 0
    assert result["pipeline_start_seconds"] > 0


def test_the_products_of_a_step_are_those_that_the_cost_counts() -> None:
    unwhitened = replace(presets.cifar100_pixels(), patch_whitening=False)  # which is not a product of each image
    for config in (presets.cifar100(), unwhitened, presets.keras_example(), presets.keras_example_fixed()):
        batch = 4
        shapes = matrix_products.product_shapes(config, batch)
        counted = sum(count * m * k * n for count, m, k, n in shapes)
        # The closed form counts the first queries, the same for all images, for each; and the head, left out here.
        first = (batch - 1) * config.num_latents * config.latent_dim * config.cross_qk_dim
        head = config.head_hidden_dim or 0
        classifier = head * config.latent_dim + (head or config.latent_dim) * config.num_classes
        assert counted + first + batch * classifier == batch * macs_per_image(config)


def test_train_overhead_names_the_ratios_that_are_required() -> None:
    def row(kind: str, threads: int, workers: int, rate: float, feed: str = "tf.data", xla: bool = False) -> Any:
        case = {"kind": kind, "threads": threads, "num_workers": workers, "feed": feed, "xla": xla}
        return case | {"images_per_second": rate}

    rows = [
        row("plain", 1, 1, 90.0),
        row("plain", 1, 1, 100.0, feed="generator"),
        row("plain", 1, 1, 1000.0, feed="none"),  # trains on one batch only, so it is not compared
        row("plain", 2, 1, 160.0),
        row("plain", 1, 1, 50.0, xla=True),
        row("pipeline", 1, 1, 95.0),
        row("streamed", 1, 1, 76.0),
        row("pipeline", 1, 2, 190.0),
        row("pipeline", 1, 2, 60.0, xla=True),
    ]
    assert train_overhead.targets(rows) == {
        "(b)/(a), 1 thread": 0.95,
        "(d)/(b), 1 thread": 0.8,
        "(c)/(a on one core)": 1.9,
        "(c)/(a on one core), XLA": 1.2,
        "best (c)/best (a on one core)": 1.9,
        "best (c)/best (a, 2 threads)": 190 / 160,
    }


@pytest.mark.slow
def test_train_overhead() -> None:
    table, result = benchmark(
        "train_overhead",
        *("--rounds", "2", "--steps", "3", "--threads", "1", "--xla", "no", "--feeds", "tf.data", "generator"),
    )
    assert "workers, 2 x 1 thread" in table
    required = {"(b)/(a), 1 thread", "(c)/(a on one core)", "(d)/(b), 1 thread", "best (c)/best (a on one core)"}
    assert set(result["ratios"]) == required
    assert [len(case["turns"]) for case in result["cases"]] == [2] * 5


@pytest.mark.slow
def test_all_reduce() -> None:
    table, result = benchmark("all_reduce", "--presets", "cifar100", "--rounds", "2", "--steps", "2")
    assert "packed bfloat16" in table
    agreement = {row["way"]: row["agrees"] for row in result["rows"]}
    assert max(agreement[way] for way in ("one by one", "list", "packed")) < 1e-6 < agreement["packed bfloat16"] < 1e-2


@pytest.mark.parametrize("study", ablation_studies.STUDIES)
def test_every_variant_of_a_study_is_a_valid_change_of_its_base(study: str, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.touch()  # only its digest is taken
    variants = ablation_studies.STUDIES[study].variants
    base = ablation_studies.configure(ablation_studies.STUDIES[study], {}, str(archive))
    for name, changes in variants.items():
        assert ablation_studies.configure(ablation_studies.STUDIES[study], changes, str(archive)) != base, name


@pytest.mark.slow
def test_ablations_go_on_from_their_record(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    small = ("digits", "--steps", "4", "--rounds", "1", "--only", "pixels", "--record", str(record))
    table, first = benchmark("ablations", *small)
    assert "Budget: 4 steps of the base, equal time" in table
    assert {(run["variant"], run["seed"]) for run in first["runs"]} == {("as it is", 0), ("pixels", 0)}
    pixels = next(run for run in first["runs"] if run["variant"] == "pixels")
    assert pixels["steps_taken"] == max(1, round(4 / pixels["relative_step_time"]))
    with record.open("a") as file:
        file.write('{"cut off')
    _, again = benchmark("ablations", *small, "--seeds", "0", "1")
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert lines[:2] == first["runs"], "what was done is not done again"
    assert {(run["variant"], run["seed"]) for run in lines[2:]} == {("as it is", 1), ("pixels", 1)}
    assert len(again["runs"]) == 4
    _, by_operations = benchmark("ablations", *small, "--equal", "operations")
    base, pixels = (
        next(run for run in by_operations["runs"] if run["variant"] == name) for name in ("as it is", "pixels")
    )
    assert base["steps_taken"] == 4
    assert pixels["steps_taken"] == max(1, round(4 * base["mmacs"] / pixels["mmacs"])) != 4


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (4, 1), (5, 2), (17, 5)])
def test_an_ablation_has_the_epochs_of_its_steps(steps: int, epochs: int) -> None:
    """CutMix that ends before the training does so in an ablation too."""
    settings = TrainingConfig(epochs=1, global_batch_size=8, cutmix=1.0, cutmix_until=0.5)
    assert ablations.over_steps(settings, steps, num_rows=37) == replace(settings, epochs=epochs)


@pytest.mark.slow
def test_accuracy_of_runs_and_their_figure(tmp_path: Path) -> None:
    record, figure = tmp_path / "record.jsonl", tmp_path / "figure.svg"
    steps = [{"seconds": 30.0 * i, "loss": 4.0, "val_loss": 3.0, "val_accuracy": 0.1 * i} for i in (1, 2)]
    curve = [step | {"val_top5_accuracy": 0.5, "images_per_second": 100.0} for step in steps]
    row = {"settings": {}, "training_seconds": 60.0, "epochs": 2, "pflop": 0.5, "parameters": 10, "curve": curve}
    runs = [row | {"name": "small", "seed": seed, "test": {"top1": 0.2 + seed / 10, "top5": 0.6}} for seed in (0, 1)]
    runs.append(row | {"name": "other", "seed": 0, "test": {"top1": 0.1, "top5": 0.3}})
    record.write_text("".join(json.dumps(run) + "\n" for run in runs))
    table, result = benchmark("accuracy", "--record", str(record), "--figure", str(figure))
    assert "25.00% (20.00% to 30.00%)" in table
    assert result["runs"] == runs
    drawn = figure.read_bytes()
    assert drawn.startswith(b"<?xml")
    benchmark("accuracy", "--record", str(record), "--figure", str(figure))
    assert figure.read_bytes() == drawn


@pytest.mark.slow
def test_accuracy_trains_and_goes_on_with_what_is_missing(
    tmp_path: Path, cifar100_archive: tuple[Path, str], ray_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(ray_folder))
    record = tmp_path / "record.jsonl"
    shape = ("--model.num-latents", "4", "--model.latent-dim", "8", "--model.conv-channels", "4")
    training = ("--model.data-dim", "8", "--train.epochs", "1", "--train.global-batch-size", "500")
    command = ("accuracy", "--archive", str(cifar100_archive[0]), "--record", str(record), "--", *shape, *training)
    _, result = benchmark(*command)
    (run,) = result["runs"]
    assert run["settings"]["train"]["seed"] == run["seed"] == 0
    assert run["test"]["num_examples"] == 10_000
    assert run["epochs"] == len(run["curve"]) == 1
    assert 0 < run["training_seconds"] < run["task_seconds"]
    _, again = benchmark(*command)
    assert again == result


@pytest.mark.slow
def test_published_training(tmp_path: Path, cifar100_archive: tuple[Path, str]) -> None:
    record = tmp_path / "record.jsonl"
    few = ("--minutes", "0.1", "--points", "2", "--validation-rows", "16", "--test-rows", "32")
    benchmark("published_training", "--archive", str(cifar100_archive[0]), "--record", str(record), *few)
    (run,) = [json.loads(line) for line in record.read_text().splitlines()]
    assert run["name"] == "published example"
    assert [point["seconds"] >= 3 * i for i, point in enumerate(run["curve"], 1)] == [True, True]
    assert 0 <= run["test"]["top1"] <= run["test"]["top5"] <= 1
    assert run["test"]["num_examples"] == 32
    table, _ = benchmark("accuracy", "--record", str(record))
    assert "published example" in table


def test_search_table(tmp_path: Path) -> None:
    trials, packed = str(ROOT / "benchmarks/data/search_trials.json.gz"), tmp_path / "again.json.gz"
    table, result = benchmark("search_table", trials, "--pack", str(packed))
    assert result["statuses"] == {"finished": 18, "stopped early": 22}
    best = max(result["trials"], key=lambda trial: trial["best"])
    assert best["name"] in table
    assert f"{best['best']:.2%}" in table
    _, again = benchmark("search_table", str(packed))
    assert again == result
